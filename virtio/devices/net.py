"""Network device (virtio 1.2, 5.1).

Two data paths with one behaviour: `virtio._ring.NetEngine` for backends with descriptors, and coroutines over any
NetBackend. Loop thread only.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from virtio import _ring
from virtio.backends.net import FRAME_MAX, NetBackend
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.devices.netstate import CONNECTIONS_MAX, NetState
from virtio.errors import ConfigError, HostError, StateError
from virtio.layouts import NetConfig, NetControl, NetHeader, fast
from virtio.limits import CARD, Flow
from virtio.protocols import Chain, RandomSource
from virtio.queue import TURN, TURN_BYTES, Queue
from virtio.trust import Backend, Mistake

log = logging.getLogger(__name__)


class NetFeature(enum.IntFlag):
    """5.1.3"""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23


REQUIREMENTS: dict[int, int] = {
    NetFeature.GUEST_TSO4: NetFeature.GUEST_CSUM,
    NetFeature.GUEST_TSO6: NetFeature.GUEST_CSUM,
    NetFeature.HOST_TSO4: NetFeature.CSUM,
    NetFeature.HOST_TSO6: NetFeature.CSUM,
    NetFeature.GUEST_ANNOUNCE: NetFeature.CTRL_VQ,
    NetFeature.MQ: NetFeature.CTRL_VQ,
    NetFeature.CTRL_MAC_ADDR: NetFeature.CTRL_VQ,
}
"""5.1.3.1"""

LINK_UP, ANNOUNCE = 1, 2
HEADER = 12
COUNTERS = ("received", "bytes_received", "sent", "bytes_sent", "dropped")
ANNOUNCE_SECONDS = (0.05, 0.15, 0.25, 0.35, 0.0)
"""Between announcements that the device makes itself."""
ETHERNET_HEADER = 18
"""With a VLAN tag."""
_header = fast(NetHeader)
_control = fast(NetControl)
_CTRL_MAC, _CTRL_MAC_ADDR_SET = 1, 1
_CTRL_ANNOUNCE, _CTRL_ANNOUNCE_ACK = 3, 0
_CTRL_MQ, _CTRL_MQ_PAIRS_SET = 4, 0
_OK, _ERR = b"\0", b"\1"
_MORE, _SIGNAL, _BLOCKED, _STARVED, _CLOSED, _LIMITED, _ANSWERED = 1, 2, 4, 8, 16, 32, 64
MERGE_MAX = 64
"""Buffers that one packet is spread over at most."""


NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80
_GSO_NEEDS = {GSO_TCPV4: NetFeature.GUEST_TSO4, GSO_TCPV6: NetFeature.GUEST_TSO6}


def outgoing_header(header: bytes, length: int) -> bytes:
    """The driver's virtio_net_hdr (5.1.6.2.2) as a backend gets it, before a frame of `length` bytes."""
    flags, gso_type, hdr_len, gso_size, start, offset, _ = _header.unpack(header)
    # "The device MUST ignore flag bits that it does not recognize. If VIRTIO_NET_HDR_F_NEEDS_CSUM bit in flags is not
    # set, the device MUST NOT use the csum_start and csum_offset." "The device MUST NOT rely on hdr_len to be correct."
    flags &= NEEDS_CSUM
    if not flags:
        start = offset = 0
    return _header.pack(flags, gso_type, min(hdr_len, length), gso_size, start, offset, 0)


def incoming_header(header: bytes, features: int) -> bytes | None:
    """A backend's virtio_net_hdr (5.1.6.4.1) as this driver gets it; None: it does not take such a frame."""
    flags, gso_type, hdr_len, gso_size, start, offset, _ = _header.unpack(header)
    checksum = bool(features & NetFeature.GUEST_CSUM)
    if flags & NEEDS_CSUM and not checksum:
        return None
    if gso_type != GSO_NONE and not (flags & NEEDS_CSUM and features & _GSO_NEEDS.get(gso_type, 0)):
        return None
    # "If VIRTIO_NET_F_GUEST_CSUM is not negotiated, the device MUST set flags to zero"
    flags &= NEEDS_CSUM | DATA_VALID if checksum else 0
    if not flags & NEEDS_CSUM:
        start = offset = 0
    return _header.pack(flags, gso_type, hdr_len, gso_size, start, offset, 0)


def reverse_arp(mac: bytes) -> bytes:
    """A reverse ARP request (RFC 903) of this card to all, which any switch on its way learns from."""
    arp = b"\0\1\x08\0\6\4\0\3" + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + b"\x80\x35" + arp).ljust(60, b"\0")


def random_mac(random: RandomSource) -> bytes:
    """An address for a card that was given none: 52:54:00, which is locally administered, and three random bytes."""
    return b"\x52\x54\x00" + random(3)


def parse_mac(text: str) -> bytes:
    """ "52:54:00:12:34:56" as 6 bytes; ConfigError."""
    try:
        mac = bytes(int(part, 16) for part in text.split(":"))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1:
        raise ConfigError(f"{text!r} is no unicast MAC address")
    return mac


REPLIES_A_TURN, REPLIES_MAX = 64, 2 * CONNECTIONS_MAX
"""Frames of our own that the guest gets in one turn of the loop, and that wait for its buffers at most."""


class NetDevice(Device):
    """A network card. `mac` 6 bytes."""

    device_id = DeviceId.NET
    state_type = NetState
    feature_requirements = REQUIREMENTS

    def __init__(self, backend: NetBackend, mac: bytes, *, queue_size: int = 256) -> None:
        super().__init__()
        self.backend = backend
        self._trusted = Backend(backend, "network backend")
        self._present = asyncio.Event()
        """Not set while one backend is gone and its successor has not come: frames stay in the driver's queues."""
        self._present.set()
        self._gone = False
        self._sending = False
        """A frame is on its way into `backend.send`; its chain is returned already."""
        self._workers: dict[str, asyncio.Task[None]] = {}
        """The tasks "transmit" and "receive", which move frames where the engines do not."""
        self._mtu = backend.mtu
        # 5.1.4.1: "The device MUST set mtu to between 68 and 65535 inclusive, if it offers VIRTIO_NET_F_MTU."
        if self._mtu is not None and not 68 <= self._mtu <= 65535:
            raise ConfigError(f"net: an MTU of {self._mtu} is not between 68 and 65535")
        self.mac = mac
        self._mac_default = mac
        self.link = True
        self._peer_lost = False
        """The link is down because the other end went away."""
        self._new_peer = False
        """It was so when the state was taken that this device has; the guest is to hear of its new one."""
        self._announcing = False
        """The driver is asked to tell the network where it is, and has not said yet that it does."""
        self.pairs_max = max(len(backend.channels), 1)
        self.pairs = 1
        features = (
            NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF | NetFeature.CTRL_VQ | NetFeature.CTRL_MAC_ADDR
        )
        features |= NetFeature.GUEST_ANNOUNCE
        if self._mtu is not None:
            features |= NetFeature.MTU
        if self.pairs_max > 1:
            features |= NetFeature.MQ
        self.device_features = int(features) | backend.offloads
        self.queue_sizes = (queue_size, queue_size) * self.pairs_max + (64,)
        self._flows = {
            "in": Flow(lambda: self.clock, lambda channel: self.guarded(self._receive, channel)),
            "out": Flow(lambda: self.clock, lambda pair: self.guarded(self._transmit, pair)),
        }
        self._connections = _ring.Flows() if backend.keeps_connections else None
        self._replies: deque[bytes] = deque(maxlen=REPLIES_MAX)
        self._engines: list[_ring.NetEngine] = []
        self._connect(backend)
        self._native = False
        """This driver's queues are worked by the engines: decided at DRIVER_OK, whatever it stops later."""
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._reading: set[int] = set()
        self._writing: set[int] = set()

    def _connect(self, backend: NetBackend) -> None:
        """The path in C, and what the backend asks of the card."""
        self._engines = [_ring.NetEngine(channel.fd, channel.framing) for channel in backend.channels]
        for engine in self._engines:
            engine.limit(self._flows["out"].buckets.native, self._flows["in"].buckets.native)
            engine.watch(self._connections)
            engine.police(backend.fence)
        backend.use_clock(lambda: self.clock)
        if self._engines:
            backend.on_replies(lambda: self.next_turn(self._reply))

    def config(self) -> bytes:
        result: bytes = NetConfig.build(
            {
                "mac": self.mac,
                "status": (LINK_UP if self.link else 0) | (ANNOUNCE if self._announcing else 0),
                "max_virtqueue_pairs": self.pairs_max,
                "mtu": self._mtu or 0,
                "speed": 0xFFFFFFFF,
                "duplex": 0xFF,
                "rss_max_key_size": 0,
                "rss_max_indirection_table_length": 0,
                "supported_hash_types": 0,
            }
        )
        return result

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it, at any time (5.1.4)."""
        self._peer_lost = False
        if up == self.link:
            return
        self.link = up
        self.config_changed()
        if self.is_active and self._native:
            self._serve_all()

    @property
    def limits(self) -> dict[str, int]:
        """What is limited, as `set_limits` takes it."""
        return {
            key.replace("ps", f"ps_{way}"): value
            for way, flow in self._flows.items()
            for key, value in flow.buckets.as_dict().items()
        }

    def set_limits(self, values: Mapping[str, int]) -> None:
        """Change what it may move a second, at any time: frames by pps_in and pps_out, bytes of them by bps_in and
        bps_out, the same with _burst behind; in is what the guest receives. limits.Buckets.set. ConfigError."""
        ways: dict[str, dict[str, int]] = {way: {} for way in self._flows}
        for key, value in values.items():
            kind, _, way = key.removesuffix("_burst").partition("_")
            if way not in ways or kind not in CARD:
                known = ", ".join(f"{kind}_{way}" for kind in CARD for way in ways)
                raise ConfigError(f"{key}: no limit is called so; known are {known}, each with _burst")
            ways[way][f"{kind}_burst" if key.endswith("_burst") else kind] = value
        for way, flow in self._flows.items():
            flow.buckets.check(ways[way])
        for way, flow in self._flows.items():
            flow.buckets.set(ways[way])
            flow.go_on()

    @property
    def frames(self) -> list[tuple[int, int]]:
        """(sent, received) frames of each pair of queues; of backends with descriptors."""
        return [(engine.sent, engine.received) for engine in self._engines]

    @property
    def counters(self) -> dict[str, int]:
        """Frames and bytes so far, as the guest sees their direction, by COUNTERS' names."""
        counted = dict(self._counted)
        for engine in self._engines:
            counted["received"] += engine.received
            counted["bytes_received"] += engine.received_bytes
            counted["sent"] += engine.sent
            counted["bytes_sent"] += engine.sent_bytes
            counted["dropped"] += engine.dropped
        return counted

    def _count(self, what: str, frame: bytes) -> None:
        self._counted[what] += 1
        self._counted[f"bytes_{what}"] += len(frame)

    # Life

    def started(self, active: Activation) -> None:
        multi = bool(active.features & NetFeature.MQ)
        if self._new_peer:
            self._new_peer = False
            self.next_turn(self.set_link, True)
        if active.features & NetFeature.CTRL_VQ:
            # 5.1.2: "controlq ... 2N": N is 1 unless VIRTIO_NET_F_MQ was negotiated, else max_virtqueue_pairs
            self.spawn(self._control(active.queues[2 * self.pairs_max if multi else 2]), "control")
        self._native = bool(self._engines) and all(
            isinstance(queue.ring, _ring.Ring) for queue in active.queues if queue.enabled
        )
        self._workers.clear()
        self._work(active)

    def _work(self, active: Activation) -> None:
        """Begin to move frames between the driver and the backend, where that does not happen already."""
        self.backend.set_offloads(active.features & self.backend.offloads)
        if self._native:
            for engine in self._engines:
                engine.configure(
                    bool(active.features & NetFeature.MRG_RXBUF), self._longest(active.features), active.features
                )
            self._set_pairs(self.pairs)
        else:
            receive, transmit = active.queues[:2]
            if "transmit" not in self._workers:
                self._workers["transmit"] = self.spawn(self._send_frames(transmit), "transmit")
            if "receive" not in self._workers:
                self._workers["receive"] = self.spawn(self._deliver_frames(receive, active.features), "receive")
        self.next_turn(self._reply)

    async def exchange(
        self,
        close: Callable[[], Awaitable[None]],
        make: Callable[[], Awaitable[NetBackend]],
        *,
        overlap: bool,
    ) -> None:
        """Another backend of the same sort instead of this one, at any time: `make` gives it, `close` gives up the old
        one, before that or with `overlap` after it. Frames of the driver wait meanwhile. As after a restore, TCP
        connections that ended in the old backend are reset. What `make` raises passes; then the old one stays, or
        without `overlap` the link is down. StateError: the card is gone. Not twice at once."""
        successor = await make() if overlap else None
        self._present.clear()
        self._unregister()
        try:
            await self._stop_work()
            await close()
            if successor is None:
                successor = await make()
            if self._gone:
                raise StateError("the card is gone")
        except BaseException:
            if successor is not None:
                await successor.aclose()
            if not self._gone:
                self._link_lost(HostError("the link is down: one network is gone and no other has come"))
            raise
        self._counted = self.counters
        self.backend, self._trusted = successor, Backend(successor, "network backend")
        self._connect(successor)
        if self._connections is not None:
            self._connections.forgotten(self._connections.save())
        self._present.set()
        if self._peer_lost:
            self.set_link(True)
        if self._active is not None:
            self._work(self._active)

    async def _stop_work(self) -> None:
        """What waits for the backend ends; what waits for the driver goes on. A frame in between is lost."""
        ways = ["receive", "transmit"] if self._sending else ["receive"]
        stopped = [self._workers.pop(way) for way in ways if way in self._workers]
        for task in stopped:
            task.cancel()
        await asyncio.gather(*stopped, return_exceptions=True)

    def _longest(self, features: int) -> int:
        # 5.1.4.1: "The device MUST NOT pass received packets that exceed mtu (plus low level ethernet header length)
        # size with gso_type NONE or ECN after VIRTIO_NET_F_MTU has been successfully negotiated."
        if features & NetFeature.MTU and self._mtu is not None:
            return self._mtu + ETHERNET_HEADER
        return FRAME_MAX

    async def announce(self) -> None:
        """The card is in another place of the network, whose switches are to learn of it. A driver that negotiated
        VIRTIO_NET_F_GUEST_ANNOUNCE is asked to do that (5.1.6.5.4); for another a reverse ARP request (RFC 903) is sent
        in its name, a few times, for what is just being plugged together loses frames."""
        if self.is_active and self.active.features & NetFeature.GUEST_ANNOUNCE:
            self._announcing = True
            self.config_changed()
            return
        for pause in ANNOUNCE_SECONDS:
            await self._present.wait()
            if not self.link:
                return
            try:
                await self._trusted.call(self.backend.send_offloaded, bytes(HEADER), reverse_arp(self.mac))
            except (Mistake, OSError, HostError) as error:
                self._trusted.warn(error)
                return
            await asyncio.sleep(pause)

    def stopped(self) -> bool:
        self._announcing = False
        self._unregister()
        for flow in self._flows.values():
            flow.close()
        self.mac = self._mac_default
        self.pairs = 1
        if self._connections is not None:
            self._connections.clear()
        self._replies.clear()
        return True

    def _unregister(self) -> None:
        if not (self._reading or self._writing):
            return
        loop = asyncio.get_running_loop()
        for pair in self._reading:
            loop.remove_reader(self.backend.channels[pair].fd)
        for pair in self._writing:
            loop.remove_writer(self.backend.channels[pair].fd)
        self._reading.clear()
        self._writing.clear()

    async def aclose(self) -> None:
        self._gone = True
        await super().aclose()
        await self.backend.aclose()

    def set_address(self, mac: bytes) -> None:
        """Another address from now on, also after a reset: 6 bytes."""
        self.mac = self._mac_default = mac
        self.backend.set_mac(mac)
        self.config_changed()

    def save_device(self) -> NetState:
        limits_in, limits_out = (flow.buckets.save() for flow in self._flows.values())
        connections = () if self._connections is None else tuple(self._connections.save())
        policy = self.backend.save()
        return NetState(self.mac, self.link, self.pairs, limits_in, limits_out, self._peer_lost, connections, policy)

    def restore_device(self, state: NetState) -> None:
        if not 1 <= state.pairs <= max(1, len(self.queue_sizes) // 2):
            raise StateError(f"{state.pairs} queue pairs are not among those that the card has")
        learn = self.backend.restorer(state.policy) if state.policy is not None else None
        if self._connections is not None:
            try:
                self._connections.forgotten(state.connections)
            except ValueError as error:
                raise StateError(f"connections: {error}") from error
        if learn is not None:
            learn()
        self.mac = self._mac_default = state.mac
        self.backend.set_mac(state.mac)
        self.link, self.pairs = state.link, state.pairs
        self._new_peer = state.peer_lost
        for flow, limits in zip(self._flows.values(), (state.limits_in, state.limits_out), strict=True):
            if limits is not None:
                flow.buckets.restore(limits)

    def resume(self) -> None:
        """Device.resume."""
        super().resume()
        if self.is_active:
            self.next_turn(self._reply)

    async def quiesce(self) -> None:
        """Device.quiesce. A frame that was taken does not wait for tokens any more: they are owed."""
        self._flows["out"].set_open(True)
        try:
            await super().quiesce()
        finally:
            self._flows["out"].set_open(False)

    def _set_pairs(self, pairs: int) -> None:
        self.pairs = pairs
        if self._native:
            self._serve_all()

    def _serve_all(self) -> None:
        """Look through every queue for work."""
        for channel in range(len(self._engines)):
            self.guarded(self._receive, channel)
        for pair in range(self.pairs):
            self.guarded(self._transmit, pair)

    # The path in C: queue 2N is receiveqN, 2N + 1 transmitqN (5.1.2)

    def queue_notified(self, index: int) -> None:
        if self.paused:
            return
        pair, transmit = divmod(index, 2)
        if self._replies and index == 0:
            self.next_turn(self._reply)
        if not self._native or pair >= len(self._engines) or self._is_control(index):
            self.active.queues[index].wake()
        elif transmit:
            self._transmit(pair)
        elif pair < self.pairs:
            for channel in range(pair, len(self._engines), self.pairs):
                self._receive(channel)

    def _is_control(self, index: int) -> bool:
        return index == (2 * self.pairs_max if self.active.features & NetFeature.MQ else 2)

    def _watch(self, pair: int, kind: set[int], wanted: bool, call: Callable[[int], None]) -> None:
        loop = asyncio.get_running_loop()
        fd = self.backend.channels[pair].fd
        if wanted and pair not in kind:
            kind.add(pair)
            (loop.add_reader if kind is self._reading else loop.add_writer)(fd, self.guarded, call, pair)
        elif not wanted and pair in kind:
            kind.discard(pair)
            (loop.remove_reader if kind is self._reading else loop.remove_writer)(fd)

    def _transmit(self, pair: int) -> None:
        queue = self.active.queues[2 * pair + 1]
        if self.is_due(self._transmit, pair):
            return
        if not self._present.is_set():
            return
        if self.paused or not queue.enabled or pair >= self.pairs:
            self._watch(pair, self._writing, False, self._transmit)
            return
        if not self.link:
            self._discard(queue, pair)
            return
        flow, engine = self._flows["out"], self._engines[pair]
        if flow.must_wait(pair):
            return
        before = engine.sent
        flags = engine.transmit(queue.ring, flow.share, flow.now_ns())  # type: ignore[arg-type]
        if flags & _LIMITED:
            flow.wait(pair, engine.wait, engine.sent != before)
        if flags & _ANSWERED:
            self._reply()
        self._after(queue, flags, self._transmit, pair)
        self._watch(pair, self._writing, bool(flags & _BLOCKED) and not flags & _CLOSED, self._transmit)

    def _receive(self, channel: int) -> None:
        # 5.1.6.5.5: only queues that the driver uses get packets, so a channel may share its queue with others
        queue = self.active.queues[2 * (channel % self.pairs)]
        if not self._present.is_set():
            return
        if self.paused or not queue.enabled or not self.link:
            self._watch(channel, self._reading, False, self._receive)
            return
        flow, engine = self._flows["in"], self._engines[channel]
        if flow.must_wait(channel):
            self._watch(channel, self._reading, False, self._receive)
            return
        before = engine.received
        flags = engine.receive(queue.ring, flow.share, flow.now_ns())  # type: ignore[arg-type]
        if flags & _LIMITED:
            flow.wait(channel, engine.wait, engine.received != before)
        if flags & _ANSWERED:
            self._reply()
        self._after(queue, flags, self._receive, channel)
        # while the guest has no buffers, or there are no tokens, the frames stay in the socket
        self._watch(channel, self._reading, not flags & (_STARVED | _CLOSED | _LIMITED), self._receive)

    def _after(self, queue: Queue, flags: int, call: Callable[[int], None], pair: int) -> None:
        if flags & _SIGNAL:
            self.active.interrupts.signal_queue(queue.index)
        if flags & _CLOSED:
            self._link_lost(HostError("the peer is gone: the link is down"))
        elif flags & _MORE:
            self.next_turn(call, pair)

    def _reply(self) -> None:
        """Give the guest the frames that are answers of our own, some a turn, and when it has buffers."""
        fence = self.backend.fence if self._native else None
        if self.paused or not self.is_active:
            return
        queue, features = self.active.queues[0], self.active.features
        for source in (self._connections, fence):
            if source is not None:
                self._replies += source.replies()
        if not self.link or not queue.enabled:
            self._replies.clear()
        for _ in range(min(len(self._replies), REPLIES_A_TURN)):
            if not self._deliver(queue, bytes(HEADER), self._replies[0], bool(features & NetFeature.MRG_RXBUF)):
                queue.want_more()  # queue_notified() goes on
                return
            self._replies.popleft()
        if self._replies:
            self.next_turn(self._reply)

    def _discard(self, queue: Queue, pair: int) -> None:
        """What is sent while the link is down is lost."""
        for chain in queue.pop_batch():
            queue.push(chain, 0)
        queue.notify()
        if queue.ring.enable_notification():
            self.next_turn(self._transmit, pair)  # a driver that sends on must not keep the loop

    # The path for any backend

    async def _send_frames(self, queue: Queue) -> None:
        async for chain in queue:
            header = chain.read(HEADER)
            frame = chain.read(FRAME_MAX, HEADER) if chain.readable_length - HEADER <= FRAME_MAX else b""
            if frame and self.link:
                await self._flows["out"].admit(len(frame))
                self._flows["out"].charge(len(frame))
            queue.complete(chain, 0)
            await self._present.wait()
            if frame and self._connections is not None and self._connections.outgoing(frame):
                self._reply()
            elif frame and self.link:
                send = self.backend.send_offloaded
                self._count("sent", frame)
                self._sending = True
                try:
                    await self._trusted.call(send, outgoing_header(header, len(frame)), frame)
                except (Mistake, OSError) as error:
                    self._trusted.warn(error)  # the frame is lost, as on a wire
                except HostError as error:
                    self._link_lost(error)
                finally:
                    self._sending = False

    def _link_lost(self, error: Exception) -> None:
        if self.link:
            self._trusted.warn(error)
            self.set_link(False)
            self._peer_lost = True

    async def _next_frame(self) -> tuple[bytes, bytes]:
        """virtio_net_hdr and frame from the backend. HostError, OSError: no more will come."""
        receive = self.backend.receive_offloaded
        got = await self._trusted.call(receive)
        if not isinstance(got, tuple) or len(got) != 2:
            raise self._trusted.mistake(receive, f"returned {type(got).__name__}, not a header and a frame")
        header = self._trusted.sized(receive, got[0], HEADER, HEADER)
        return bytes(header), bytes(self._trusted.sized(receive, got[1], 1, FRAME_MAX))

    async def _deliver_frames(self, queue: Queue, features: int) -> None:
        frames = moved = 0
        while True:
            if frames >= TURN or moved >= TURN_BYTES:
                frames = moved = 0
                await asyncio.sleep(0)  # a peer that always has a frame must not keep the loop
            await self._flows["in"].admit(1)
            while queue.paused:  # a frame that is taken now would be lost if the machine moves
                queue.want_more()
                await queue.wait()
            await self._present.wait()
            try:
                raw, frame = await self._next_frame()
            except (HostError, OSError) as error:
                self._link_lost(error)
                return
            frames, moved = frames + 1, moved + len(frame)
            if self._connections is not None:
                self._connections.incoming(frame)
            header = incoming_header(raw, features)
            if header is None or not self.link:
                continue
            if header[1] in (GSO_NONE, GSO_ECN) and len(frame) > self._longest(features):
                continue
            mergeable = bool(features & NetFeature.MRG_RXBUF)
            while not self._deliver(queue, header, frame, mergeable):
                queue.want_more()
                if self._deliver(queue, header, frame, mergeable):
                    break
                await queue.wait()

    def _deliver(self, queue: Queue, header: bytes, frame: bytes, mergeable: bool) -> bool:
        """False: the driver has no room for it now."""
        chains: list[Chain] = []
        room, need = 0, HEADER + len(frame)
        while room < need and len(chains) < (MERGE_MAX if mergeable else 1):
            chain = queue.pop()
            if chain is None:
                for taken in reversed(chains):
                    queue.ring.undo_pop(taken)
                return False
            chains.append(chain)
            room += chain.writable_length
        if room < need:  # it will never fit: lost
            for taken in reversed(chains):
                queue.ring.undo_pop(taken)
            return True
        # 5.1.6.4.1: "the device MUST set num_buffers to indicate the number of buffers the packet (including the
        # header) is spread over", and to 1 if VIRTIO_NET_F_MRG_RXBUF has not been negotiated
        data = memoryview(header[:-2] + len(chains).to_bytes(2, "little") + frame)
        for chain in chains:
            data = data[chain.write(data) :]
        queue.push_batch([(chain, chain.written) for chain in chains])
        queue.notify()
        self._count("received", frame)
        self._flows["in"].charge(len(frame))
        return True

    # Control virtqueue (5.1.6.5)

    async def _control(self, queue: Queue) -> None:
        async for chain in queue:
            # the ack is one byte, the last of the device-writable part
            command = chain.read(4096)
            chain.write(self._command(command) if len(command) >= _control.size else _ERR)
            queue.complete(chain)

    def _command(self, command: bytes) -> bytes:
        kind, number = _control.unpack_from(command)
        data = command[_control.size :]
        if (kind, number) == (_CTRL_MAC, _CTRL_MAC_ADDR_SET) and len(data) == 6:
            self.mac = bytes(data)
            return _OK
        if (kind, number) == (_CTRL_ANNOUNCE, _CTRL_ANNOUNCE_ACK):
            # 5.1.6.5.4.2: "the device MUST clear the VIRTIO_NET_S_ANNOUNCE bit in the status field upon receipt of a
            # command buffer with class VIRTIO_NET_CTRL_ANNOUNCE and command VIRTIO_NET_CTRL_ANNOUNCE_ACK before marking
            # the buffer as used", if VIRTIO_NET_F_GUEST_ANNOUNCE has been negotiated
            if not self.active.features & NetFeature.GUEST_ANNOUNCE:
                return _ERR
            self._announcing = False
            return _OK
        if (kind, number) == (_CTRL_MQ, _CTRL_MQ_PAIRS_SET) and len(data) == 2:
            pairs = int.from_bytes(data, "little")
            # 5.1.6.5.5.2: the value is 1 to max_virtqueue_pairs
            if self.active.features & NetFeature.MQ and 1 <= pairs <= self.pairs_max:
                self._set_pairs(pairs)
                return _OK
        return _ERR
