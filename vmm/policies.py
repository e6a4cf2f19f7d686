"""Network policies of a running machine: what they are, what they refused, and how they are changed. Loop thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vmm.changes import find_net
from vmm.config import POLICY, Net
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from vmm.vm import VirtualMachine


def parts(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of what a card is to be changed in: its policy, and the rest."""
    return {key: values[key] for key in values if key in POLICY}, {
        key: values[key] for key in values if key not in POLICY
    }


def prepare(vm: VirtualMachine, name: str, values: Mapping[str, Any]) -> Callable[[], None]:
    """What changes a card's policy; what `values` does not name stays. Nothing has changed yet. ConfigError."""
    from vmm.devices.virtio.net import policed, policy_of

    backend, part = policed(find_net(vm, name)), vm.net_part(name)
    if backend is None or part is None:
        raise ConfigError(
            f"{name}: this card has no policy that could be changed; start the machine with one, as --net user,allow=*"
        )
    changed: Net = part.replace(**values)
    if not changed.policed:
        changed = changed.replace(allow="*")  # a card that has a policy keeps one, be it that all is allowed
    policy, resolve = policy_of(changed)

    def change() -> None:
        backend.change(policy, resolve)
        vm.net_changed(name, changed)

    return change


def describe(vm: VirtualMachine, name: str, part: Net) -> dict[str, Any]:
    """For people, JSON-like: the rules as they were written, and frames that were refused, by why."""
    from vmm.devices.virtio.net import policed

    device = vm.nets().get(name)
    backend = policed(device) if device is not None else None
    refused = dict(backend.refused) if backend is not None else {}
    return {**{key: getattr(part, key) for key in POLICY}, "refused": refused}
