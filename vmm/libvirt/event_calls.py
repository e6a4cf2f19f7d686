"""Procedures that register clients for events."""

from __future__ import annotations

from typing import Any

from vmm.libvirt.client import Call
from vmm.libvirt.errors import Code, LibvirtError
from vmm.libvirt.events import NETWORK_LIFECYCLE, POOL_LIFECYCLE, POOL_REFRESH, DomainEvent
from vmm.libvirt.procedures import Procedures
from vmm.libvirt.wire import DomainRef, NetworkRef, NodeDeviceRef, PoolRef, SecretRef

calls = Procedures()


def _kind(number: int) -> DomainEvent:
    try:
        return DomainEvent(number)
    except ValueError:
        raise LibvirtError(Code.INVALID_ARG, f"unsupported event ID {number}") from None


@calls.query(105, "connect_domain_event_register", "", "registered:int")
async def connect_domain_event_register(call: Call) -> int:
    call.client.subscriptions.add(DomainEvent.LIFECYCLE, old=True)
    return 1


@calls.query(106, "connect_domain_event_deregister", "", "registered:int")
async def connect_domain_event_deregister(call: Call) -> int:
    call.client.subscriptions.remove_old(DomainEvent.LIFECYCLE)
    return 0


@calls.query(167, "connect_domain_event_register_any", "event:int")
async def connect_domain_event_register_any(call: Call, event: int) -> None:
    call.client.subscriptions.add(_kind(event), old=True)


@calls.query(168, "connect_domain_event_deregister_any", "event:int")
async def connect_domain_event_deregister_any(call: Call, event: int) -> None:
    call.client.subscriptions.remove_old(_kind(event))


@calls.query(316, "connect_domain_event_callback_register_any", "event:int dom:domain?", "id:int")
async def connect_domain_event_callback_register_any(call: Call, event: int, dom: DomainRef | None) -> int:
    return call.client.subscriptions.add(_kind(event), dom.uuid if dom is not None else None)


@calls.query(317, "connect_domain_event_callback_deregister_any", "id:int")
async def connect_domain_event_callback_deregister_any(call: Call, id: int) -> None:
    call.client.subscriptions.remove(id)


def _add(call: Call, kinds: tuple[Any, ...], event: int, subject: Any) -> int:
    if not 0 <= event < len(kinds):
        raise LibvirtError(Code.INVALID_ARG, f"unsupported event ID {event}")
    return call.client.subscriptions.add(kinds[event], subject.uuid if subject is not None else None)


@calls.query(313, "connect_network_event_register_any", "event:int net:network?", "id:int")
async def connect_network_event_register_any(call: Call, event: int, net: NetworkRef | None) -> int:
    return _add(call, (NETWORK_LIFECYCLE, "network metadata"), event, net)


@calls.query(314, "connect_network_event_deregister_any", "id:int")
async def connect_network_event_deregister_any(call: Call, id: int) -> None:
    call.client.subscriptions.remove(id)


@calls.query(368, "connect_storage_pool_event_register_any", "event:int pool:pool?", "id:int")
async def connect_storage_pool_event_register_any(call: Call, event: int, pool: PoolRef | None) -> int:
    return _add(call, (POOL_LIFECYCLE, POOL_REFRESH), event, pool)


@calls.query(369, "connect_storage_pool_event_deregister_any", "id:int")
async def connect_storage_pool_event_deregister_any(call: Call, id: int) -> None:
    call.client.subscriptions.remove(id)


@calls.query(374, "connect_node_device_event_register_any", "event:int device:nodedev?", "id:int")
async def connect_node_device_event_register_any(call: Call, event: int, device: NodeDeviceRef | None) -> int:
    return _add(call, ("device", "device update"), event, None)


@calls.query(375, "connect_node_device_event_deregister_any", "id:int")
async def connect_node_device_event_deregister_any(call: Call, id: int) -> None:
    call.client.subscriptions.remove(id)


@calls.query(380, "connect_secret_event_register_any", "event:int secret:secret?", "id:int")
async def connect_secret_event_register_any(call: Call, event: int, secret: SecretRef | None) -> int:
    return _add(call, ("secret", "secret value"), event, secret)


@calls.query(381, "connect_secret_event_deregister_any", "id:int")
async def connect_secret_event_deregister_any(call: Call, id: int) -> None:
    call.client.subscriptions.remove(id)
