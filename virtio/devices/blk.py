"""Block device (virtio 1.2, 5.2).

Two request paths with one behaviour: `virtio._ring.BlockEngine` for backends that have a descriptor, and
coroutines over any BlockBackend. tests/conformance/virtio/test_block_engines.py holds them equal. Loop thread only.
"""

from __future__ import annotations

import asyncio
import enum
import select
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from virtio import _ring
from virtio.backends.block import CHUNK, BlockBackend
from virtio.constants import DeviceId
from virtio.device import Activation, Device
from virtio.errors import ConfigError, GuestError, HostError, StateError
from virtio.layouts import BlkConfig, BlkHeader, BlkZeroes, fast, fields
from virtio.limits import DISK, READ, WRITE, Alarm, Buckets, Gate, LimitState
from virtio.protocols import Chain, Ring
from virtio.queue import TURN, Queue
from virtio.state import U64
from virtio.trust import Backend


class BlockFeature(enum.IntFlag):
    """5.2.3"""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
ID_BYTES = 20
ZEROES_SECTORS = 0x200000
"""max_discard_sectors and max_write_zeroes_sectors: 1 GiB."""
ZEROES_SEGMENTS = 32
SEGMENTS_MAX = 1024
REQUESTS_MAX = 64
"""Requests to a BlockBackend that run at a time. Those of a driver that has reset the device since are among them, for
a backend may take its time to end what is cancelled; those that wait for tokens are not."""
TURN_BYTES = 512 << 10
"""Bytes that all requests to a BlockBackend move in one turn of the loop, or little more."""
BLOCK_SIZES = (512, 1024, 2048, 4096)
_MORE, _SIGNAL, _GATED = 1, 2, 4
COUNTERS = ("reads", "bytes_read", "writes", "bytes_written", "flushes", "failures")
_header = fast(BlkHeader)
_zeroes = fast(BlkZeroes)
_WRITEBACK_AT = fields(BlkConfig)["writeback"][0]


@dataclass(frozen=True, slots=True)
class BlockStateV1:
    """A disk that has no limits of its own."""

    kind: ClassVar = "virtio-blk"
    version: ClassVar = 1
    writeback: bool
    capacity: U64


@dataclass(frozen=True, slots=True)
class BlockState:
    """A disk: the cache mode that the driver chose, its size in bytes, and its limits in the order of limits.DISK."""

    kind: ClassVar = "virtio-blk"
    version: ClassVar = 2
    previous: ClassVar = BlockStateV1
    writeback: bool
    capacity: U64
    limits: Annotated[tuple[LimitState, ...], range(len(DISK), len(DISK) + 1)] | None
    """None: those of the configuration."""

    @classmethod
    def upgrade(cls, old: BlockStateV1) -> Self:
        """Limits were not part of it: those of the configuration stand."""
        return cls(old.writeback, old.capacity, None)


class Withdrawn(BlockBackend):
    """What is left of a disk that was pulled: its size."""

    def __init__(self, capacity: int, block_size: int, *, read_only: bool) -> None:
        self.capacity, self.block_size, self.read_only = capacity, block_size, read_only

    async def read(self, offset: int, length: int) -> bytes:
        """HostError, as all of it."""
        raise HostError("the disk was pulled")

    async def write(self, offset: int, data: bytes) -> None:
        """HostError, as all of it."""
        raise HostError("the disk was pulled")

    async def flush(self) -> None:
        """HostError, as all of it."""
        raise HostError("the disk was pulled")

    async def discard(self, offset: int, length: int) -> None:
        """HostError, as all of it."""
        raise HostError("the disk was pulled")


class BlockDevice(Device):
    """A disk. `serial` (at most 20 bytes) is what GET_ID returns."""

    device_id = DeviceId.BLOCK
    state_type = BlockState

    def __init__(self, backend: BlockBackend, *, serial: str = "", queues: int = 1, queue_size: int = 256) -> None:
        super().__init__()
        self.backend = backend
        self._trusted = Backend(backend, "block backend")
        self.capacity = self._checked_capacity()
        self.serial = serial.encode()[:ID_BYTES]
        self.queue_sizes = (queue_size,) * queues
        self.device_features = (
            BlockFeature.SEG_MAX
            | BlockFeature.BLK_SIZE
            | BlockFeature.FLUSH
            | BlockFeature.TOPOLOGY
            | BlockFeature.CONFIG_WCE
        )
        if queues > 1:
            self.device_features |= BlockFeature.MQ
        if backend.read_only:
            self.device_features |= BlockFeature.RO
        else:
            self.device_features |= BlockFeature.DISCARD | BlockFeature.WRITE_ZEROES
        self._writeback_default = getattr(backend, "cache", "writeback") != "writethrough"
        self.writeback = self._writeback_default
        make: Callable[[bytes], _ring.BlockEngine] | None = getattr(backend, "engine", None)
        self._engine = make(self.serial) if make else None
        self.limits = Buckets(DISK)
        self._gate = Gate(self.limits, lambda: self.clock)
        """Of coroutines; the engine has one of its own."""
        self._alarm = Alarm(lambda: self.clock, self._tokens_due)
        if self._engine is not None:
            self._engine.limit(self.limits.native)
        self._reader: asyncio.AbstractEventLoop | None = None
        self._held = False
        """The backend is being changed; requests wait in their queues."""
        self._crowded = False
        self._moved = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        """Requests that wait for a turn, with the bytes that they will move."""
        self._counted = dict.fromkeys(COUNTERS, 0)
        self._tracked: tuple[bytearray, int] | None = None

    def set_limits(self, values: Mapping[str, int]) -> None:
        """Change what it may do a second, at any time: limits.Buckets.set. ConfigError."""
        self.limits.set(values)
        self._lend()
        self._gate.run()
        self._tokens_due()

    def _checked_capacity(self) -> int:
        """The backend's, in bytes, and its block size is one. ConfigError."""
        backend = self.backend
        if not isinstance(backend.capacity, int) or not 0 <= backend.capacity < 1 << 63:
            raise ConfigError(f"{self._trusted.name}: capacity {backend.capacity!r} is no number of bytes")
        if backend.block_size not in BLOCK_SIZES:
            raise ConfigError(f"{self._trusted.name}: block_size {backend.block_size!r} is not one of {BLOCK_SIZES}")
        return backend.capacity

    @property
    def counters(self) -> dict[str, int]:
        """Requests answered and bytes moved so far, by COUNTERS' names."""
        if self._engine is not None:
            return dict(zip(COUNTERS, self._engine.counters, strict=True))
        return dict(self._counted)

    @property
    def engine(self) -> str:
        """What carries out requests: "io_uring", "threads" or "coroutines"."""
        return "coroutines" if self._engine is None else self._engine.engine

    def config(self) -> bytes:
        segments = max(min(self.queue_sizes[0], SEGMENTS_MAX) - 2, 1)
        result: bytes = BlkConfig.build(
            {
                "capacity": self.capacity // SECTOR,
                "size_max": 0,
                "seg_max": segments,
                "cylinders": 0,
                "heads": 0,
                "sectors": 0,
                "blk_size": self.backend.block_size,
                "physical_block_exp": (4096 // self.backend.block_size).bit_length() - 1,
                "alignment_offset": 0,
                "min_io_size": 4096 // self.backend.block_size,
                "opt_io_size": 0,
                "writeback": self.writeback,
                "unused0": 0,
                "num_queues": len(self.queue_sizes),
                "max_discard_sectors": ZEROES_SECTORS,
                "max_discard_seg": ZEROES_SEGMENTS,
                "discard_sector_alignment": self.backend.block_size // SECTOR,
                "max_write_zeroes_sectors": ZEROES_SECTORS,
                "max_write_zeroes_seg": ZEROES_SEGMENTS,
                "write_zeroes_may_unmap": 1,
                "unused1": [0, 0, 0],
            }
        )
        return result

    def negotiated(self, features: int) -> None:
        # 5.2.5.2: "If VIRTIO_BLK_F_CONFIG_WCE is negotiated but VIRTIO_BLK_F_FLUSH is not, the device MUST initialize
        # writeback to 0."
        unflushed = features & BlockFeature.CONFIG_WCE and not features & BlockFeature.FLUSH
        self.writeback = self._writeback_default and not unflushed

    def config_written(self, offset: int, data: bytes) -> None:
        # 5.2.4: writeback is the one field a driver may write, if CONFIG_WCE was negotiated
        if offset == _WRITEBACK_AT and self.is_active and self.active.features & BlockFeature.CONFIG_WCE:
            self.writeback = bool(data[0])
            self._configure()

    @property
    def effective_writeback(self) -> bool:
        # 5.2.6.2: a driver that did not negotiate FLUSH cannot make writes durable: they are so when they
        # complete
        """Writes complete before they are durable."""
        return self.writeback and bool(self.active.features & BlockFeature.FLUSH)

    def _configure(self) -> None:
        if self._engine is not None:
            self._engine.configure(
                sectors=self.capacity // SECTOR,
                writeback=self.effective_writeback,
                discard=bool(self.active.features & BlockFeature.DISCARD),
                write_zeroes=bool(self.active.features & BlockFeature.WRITE_ZEROES),
            )

    def resized(self) -> None:
        """The backend's capacity changed: tell the driver (5.2.5). ConfigError if it is none."""
        self.capacity = self._checked_capacity()
        if self.is_active:
            self._configure()
        self.config_changed()

    # Life

    def started(self, active: Activation) -> None:
        self._configure()
        if self._engine is not None:
            self._reader = asyncio.get_running_loop()
            for descriptor in self._engine.descriptors():
                self._reader.add_reader(descriptor, self.guarded, self._reap)
        self._lend()
        for queue in active.queues:
            if queue.enabled:
                self.guarded(self.queue_notified, queue.index)

    def answerer(self, index: int) -> object:
        """Device.answerer"""
        return None if self._engine is None else self._engine.answerer(index)

    def queue_message(self, index: int, message: tuple[int, int] | None) -> None:
        """Device.queue_message"""
        if self._engine is not None:
            self._engine.message(index, message)

    def _lend(self) -> None:
        """vCPUs' threads may carry out what is in the queues, if nothing else is to be done to requests now; else no
        longer, and what they leave is seen to."""
        engine = self._engine
        if engine is None:
            return
        held = self.paused or self._held or self.synchronous or self.limits.active or self._tracked is not None
        queues = () if held or self._active is None else self._active.queues
        rings = {queue.index: queue.ring for queue in queues if queue.enabled}
        for index in range(len(self.queue_sizes)):
            ring = rings.get(index)
            engine.lend(index, ring if isinstance(ring, _ring.Ring) else None)
        if not rings:
            self.guarded(self._reap)

    def pause(self) -> None:
        """Device.pause"""
        super().pause()
        self._lend()

    def resume(self) -> None:
        """Device.resume"""
        super().resume()
        self._lend()

    def needs_reset(self) -> None:
        """Device.needs_reset"""
        super().needs_reset()
        self._lend()

    def stopped(self) -> bool:
        self._lend()
        self.writeback = self._writeback_default
        self._alarm.cancel()
        self._gate.close()
        if self._engine is None:
            return True
        if self._reader is not None:
            for descriptor in self._engine.descriptors():
                self._reader.remove_reader(descriptor)
            self._reader = None
        return self._engine.cancel()

    def idle(self) -> bool:
        """Device.idle"""
        return self._engine is None or self._engine.cancel()

    async def settle(self) -> None:
        while True:
            if self.is_active or self.idle():
                return
            await asyncio.sleep(0.001)

    async def aclose(self) -> None:
        await super().aclose()
        engine, self._engine = self._engine, None
        if engine is not None:
            if not engine.cancel():
                await asyncio.to_thread(engine.close)  # waits for the system calls that run
            engine.close()
        await self.backend.aclose()

    def track(self, bits: bytearray | None, shift: int = 0) -> None:
        """Set bit n of `bits`, lowest first, when a request that may have written byte n << shift is over; None: no
        more."""
        self._tracked = None if bits is None else (bits, shift)
        self._lend()
        if self._engine is not None:
            self._engine.track(bits, shift)

    def _mark(self, offset: int, length: int) -> None:
        if self._tracked is not None and length:
            bits, shift = self._tracked
            for at in range(offset >> shift, min((offset + length - 1 >> shift) + 1, len(bits) * 8)):
                bits[at // 8] |= 1 << at % 8

    def save_device(self) -> BlockState:
        return BlockState(self.writeback, self.capacity, self.limits.save())

    def restore_device(self, state: BlockState) -> None:
        if state.capacity != self.capacity:
            raise StateError(f"the disk has {self.capacity} bytes, the state expects {state.capacity}")
        self.writeback = state.writeback
        if state.limits is not None:
            self.limits.restore(state.limits)
        self._lend()

    async def quiesce(self) -> None:
        """Device.quiesce. What waits for tokens does not wait any more: they are owed."""
        self.pause()
        self._gate.open = True
        try:
            self._open_gates()
            await super().quiesce()
        finally:
            self._gate.open = False

    def _open_gates(self) -> None:
        self._gate.run()
        self._tokens_due()

    async def exchange(self, change: Callable[[], Awaitable[None]]) -> None:
        """Hold the driver's requests, let `change` do to the backend what it likes, and go on with what it is then.

        The driver notices a delay, and another size. Nothing is held up but this disk. Errors of `change` are the
        caller's; the disk goes on then too. One at a time: StateError.
        """
        if self._held:
            raise StateError("another change of this disk is under way")
        self._held = self._gate.open = True
        try:
            self._lend()
            self._open_gates()
            while self._active is not None and any(queue.in_flight for queue in self._active.queues):
                for queue in self._active.queues:
                    queue.on_push = self._progress.set
                self._progress.clear()
                await self._progress.wait()
            await self.settle()
            image: Callable[[], _ring.Image] | None = getattr(self.backend, "image", None)
            before = image() if image is not None else None
            try:
                await change()
            finally:
                if self._engine is not None and image is not None and (now := image()) is not before:
                    self._engine.set_image(now, self.backend.capacity // SECTOR)
                if self.backend.capacity != self.capacity:
                    self.resized()
        finally:
            self._held = self._gate.open = False
            self._lend()
            for queue in self._active.queues if self._active is not None else ():
                queue.on_push = None
                if queue.enabled and not self.paused:
                    self.guarded(self.queue_notified, queue.index)

    async def withdraw(self) -> None:
        """Close the backend, which nobody uses any more; every request that is still to come fails. Requests that the
        backend has begun are waited for. Raises what closing raises."""

        async def change() -> None:
            backend, engine = self.backend, self._engine
            if engine is not None:
                self._forget_engine()
                engine.close()
            self.backend = Withdrawn(backend.capacity, backend.block_size, read_only=backend.read_only)
            self._trusted = Backend(self.backend, "block backend")
            await backend.aclose()

        await self.exchange(change)

    def _forget_engine(self) -> None:
        if self._reader is not None and self._engine is not None:
            for descriptor in self._engine.descriptors():
                self._reader.remove_reader(descriptor)
        self._reader = self._engine = None

    # Requests

    def queue_notified(self, index: int) -> None:
        if self._held or self.paused or self.is_due(self.queue_notified, index):
            return
        queue = self.active.queues[index]
        if not queue.enabled:
            return
        ring = queue.ring
        if self._engine is None or not isinstance(ring, _ring.Ring):
            self._drain(queue, ring)
            return
        flags = self._engine.drain(ring)
        while self.synchronous and flags & _MORE:
            self._finish()
            flags = self._engine.drain(ring) | flags & _SIGNAL
        if flags & _SIGNAL:
            self.active.interrupts.signal_queue(index)
        if flags & _MORE:
            self.next_turn(self.queue_notified, index)
        if flags & _GATED:
            self._pass_gate()
        elif self.synchronous:
            self._finish()

    def _finish(self) -> None:
        """Wait, here and now, until every request is answered that does not wait for tokens."""
        assert self._engine is not None
        while self._engine.in_flight > self._engine.waiting:
            select.select(self._engine.descriptors(), (), ())
            self._reap()

    def _tokens_due(self) -> None:
        if self.is_active and self._engine is not None:
            self.guarded(self._pass_gate)

    def _pass_gate(self) -> None:
        """Go on with requests that waited for tokens, as far as there are some, and see to the others when it is time.
        While the device is to become quiet none waits."""
        assert self._engine is not None
        if self.is_due(self._pass_gate):
            return
        rings, wait = self._engine.release(self.clock.now_ns(), self.paused or self._held)
        if self.synchronous:
            self._finish()
        self._signal(rings)
        self.progressed()
        if wait > 0:
            self._alarm.arm(wait)
            return
        self._alarm.cancel()
        if not wait:
            self.next_turn(self._pass_gate)

    def _reap(self) -> None:
        if self._engine is None:
            return
        self._signal(self._engine.reap())
        self.progressed()

    def _signal(self, rings: list[Any]) -> None:
        """Tell the driver of the queues whose rings these are."""
        for queue in self.active.queues if rings else ():
            if any(map(queue.uses, rings)):
                self.active.interrupts.signal_queue(queue.index)

    def _drain(self, queue: Queue, ring: Ring) -> None:
        ring.disable_notification()
        room = min(REQUESTS_MAX - len(self._tasks) + self._gate.waiting, TURN)
        if room <= 0:
            self._crowded = True
            return
        chains = queue.pop_batch(room)
        for chain in chains:
            # 2.7.4.2 lets a driver lay the parts out as it likes; header and status byte must be there
            if chain.readable_length < _header.size or not chain.writable_length:
                raise GuestError("block request without header or status")
            self.spawn(self._request(queue, chain), "request").add_done_callback(self._request_ended)
        if len(chains) == room or ring.enable_notification():
            self.next_turn(self.queue_notified, queue.index)

    def _request_ended(self, _: asyncio.Task[None]) -> None:
        if self._crowded and self.is_active:
            self._crowded = False
            for queue in self.active.queues:
                self.next_turn(self.queue_notified, queue.index)

    async def _request(self, queue: Queue, chain: Chain) -> None:
        try:
            status = await self._answer(queue.index, chain)
        except (OSError, HostError) as error:
            self._trusted.warn(error)
            status = IOERR
        self._count(chain, status)
        length = chain.writable_length
        chain.write(bytes((status,)), length - 1)
        queue.complete(chain, length)

    async def _turn(self, length: int) -> None:
        """Called before `length` bytes are moved: wait while this turn of the loop has moved enough, for a backend may
        answer at once, and requests may be many and up to 4 GiB long."""
        if self._moved >= TURN_BYTES:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, length))
            await turn
            return
        if not self._moved:
            asyncio.get_running_loop().call_soon(self._turn_over)
        self._moved += length

    def _turn_over(self) -> None:
        self._moved = 0
        while self._waiting and self._moved < TURN_BYTES:
            turn, length = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._moved += length
        if self._moved:
            asyncio.get_running_loop().call_soon(self._turn_over)

    def _count(self, chain: Chain, status: int) -> None:
        kind = _header.unpack(chain.read(_header.size))[0]
        counted = self._counted
        if status != OK:
            counted["failures"] += 1
        elif kind == IN:
            counted["reads"] += 1
            counted["bytes_read"] += chain.writable_length - 1
        elif kind == OUT:
            counted["writes"] += 1
            counted["bytes_written"] += chain.readable_length - _header.size
        elif kind == FLUSH:
            counted["flushes"] += 1

    async def _answer(self, queue: int, chain: Chain) -> int:
        kind, _, sector = _header.unpack(chain.read(_header.size))
        space, payload = chain.writable_length - 1, chain.readable_length - _header.size
        sectors = self.capacity // SECTOR
        if kind in (IN, OUT):
            length = space if kind == IN else payload
            # 5.2.6.2: "A device MUST set the status byte to VIRTIO_BLK_S_IOERR for a write request if the
            # VIRTIO_BLK_F_RO feature if offered, and MUST NOT write any data."
            if kind == OUT and self.backend.read_only:
                return IOERR
            if not length or length % SECTOR or sector + length // SECTOR > sectors:
                return IOERR
            await self._gate.admit(queue, READ if kind == IN else WRITE, length)
            for at in range(0, length, CHUNK):
                part = min(CHUNK, length - at)
                await self._turn(part)
                if kind == IN:
                    data = await self._trusted.call(self.backend.read, sector * SECTOR + at, part)
                    chain.write(self._trusted.sized(self.backend.read, data, part, part), at)
                else:
                    data = chain.read(part, _header.size + at)
                    try:
                        await self._trusted.call(self.backend.write, sector * SECTOR + at, data)
                    finally:
                        self._mark(sector * SECTOR + at, part)
            if kind == OUT and not self.effective_writeback:
                await self._trusted.call(self.backend.flush)
            return OK
        if kind == FLUSH:
            await self._gate.admit(queue, WRITE, 0)
            await self._trusted.call(self.backend.flush)
            return OK
        if kind == GET_ID:
            if space < ID_BYTES:
                return IOERR
            chain.write(self.serial.ljust(ID_BYTES, b"\0"), 0)
            return OK
        if kind in (DISCARD, WRITE_ZEROES):
            return await self._zeroes(queue, kind, chain, payload, sectors)
        return UNSUPP  # 5.2.6: "UNSUPP for a request unsupported by device"

    async def _zeroes(self, queue: int, kind: int, chain: Chain, payload: int, sectors: int) -> int:
        feature = BlockFeature.DISCARD if kind == DISCARD else BlockFeature.WRITE_ZEROES
        if not self.active.features & feature:
            return UNSUPP
        if self.backend.read_only or not payload or payload % _zeroes.size:
            return IOERR
        if payload // _zeroes.size > ZEROES_SEGMENTS:
            return IOERR
        entries = list(_zeroes.iter_unpack(chain.read(payload, _header.size)))
        for sector, count, flags in entries:
            # 5.2.6.2: "the device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard, secure erase
            # and write zeroes commands if any unknown flag is set. Furthermore, the device MUST set the
            # status byte to VIRTIO_BLK_S_UNSUPP for discard commands if the unmap flag is set."
            if flags & ~1 or (kind == DISCARD and flags):
                return UNSUPP
            if count > ZEROES_SECTORS or sector + count > sectors:
                return IOERR
        await self._gate.admit(queue, WRITE, 0)
        for sector, count, flags in entries:
            end = (sector + count) * SECTOR
            for at in range(sector * SECTOR, end, CHUNK):
                part = min(CHUNK, end - at)
                await self._turn(part)
                try:
                    if kind == DISCARD:
                        await self._trusted.call(self.backend.discard, at, part)
                    else:
                        await self._trusted.call(self.backend.write_zeroes, at, part, bool(flags & 1))
                finally:
                    self._mark(at, part)
        if kind == WRITE_ZEROES and not self.effective_writeback:
            await self._trusted.call(self.backend.flush)
        return OK
