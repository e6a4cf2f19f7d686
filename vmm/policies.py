"""Network policies of a running machine: what they are, what they refused, and how they are changed. Loop thread.

One policy gives way to another in place: connections that the new one allows stay. A card's first policy, and the loss
of its last, change what passt itself does (vmm/devices/virtio/net.py), so the card gets a new passt: all its TCP
connections are reset then, for the policy knows nothing of how they began.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from virtio.backends.net import NetBackend, PcapNet
from vmm.changes import find_net
from vmm.config import POLICY, Net
from vmm.errors import ConfigError

if TYPE_CHECKING:
    from virtio.devices.net import NetDevice
    from vmm.vm import VirtualMachine


def parts(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of what a card is to be changed in: its policy, and the rest."""
    return {key: values[key] for key in values if key in POLICY}, {
        key: values[key] for key in values if key not in POLICY
    }


def prepare(vm: VirtualMachine, name: str, values: Mapping[str, Any]) -> Callable[[], Awaitable[None]]:
    """What changes a card's policy; what `values` does not name stays. Nothing has changed yet. ConfigError,
    StateError; the change itself: those, and HostError if passt does not start again."""
    device, part = find_net(vm, name), vm.net_part(name)
    if part is None or part.kind != "user":
        raise ConfigError(f"{name}: only user networking has policies; filter another network where it is made")
    part.replace(**values)  # ConfigError
    vm.check_settled()

    async def change() -> None:
        async with vm.change_lock:  # no state is taken meanwhile
            vm.check_alive()
            vm.check_settled()  # a machine that moves has told its new host the policy already
            part = vm.net_part(name)
            if part is None or vm.nets().get(name) is not device:
                raise ConfigError(f"{name}: this card is gone")
            await _change(vm, name, device, part.replace(**values))

    return change


async def _change(vm: VirtualMachine, name: str, device: NetDevice, changed: Net) -> None:
    from vmm.devices.virtio.net import policed, policy_of, user_net

    backend = policed(device)
    if backend is not None and changed.policed:
        backend.change(*policy_of(changed))
    elif (backend is not None) != changed.policed:
        recorder = device.backend if isinstance(device.backend, PcapNet) else None
        old = recorder.inner if recorder is not None else device.backend

        async def make() -> NetBackend:
            made = await user_net(changed, device.mac, lambda text: vm.tell(f"{name}: {text}"), used=True, wait=True)
            if recorder is None:
                return made
            recorder.inner = made
            return recorder

        await device.exchange(old.aclose, make, overlap=not changed.forward)  # a port is one process's alone
    vm.net_changed(name, changed)


def describe(vm: VirtualMachine, name: str, part: Net) -> dict[str, Any]:
    """For people, JSON-like: the rules as they were written, and frames that were refused, by why."""
    from vmm.devices.virtio.net import policed

    device = vm.nets().get(name)
    backend = policed(device) if device is not None else None
    refused = dict(backend.refused) if backend is not None else {}
    return {**{key: getattr(part, key) for key in POLICY}, "refused": refused}
