"""One client of GDB's remote protocol ("Debugging with GDB", appendix E) on one debugger.

Threads are vCPUs: thread n is vCPU n - 1. All-stop. What the client sends is hostile until parsed: whatever is wrong
gets an error packet, and what is not the protocol at all ends the connection. Loop thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cpu.debug import MAX_LENGTH, Point, PointKind
from vmm.debug import target
from vmm.debug.debugger import Action, Debugger, Stop, Why
from vmm.debug.monitor import Monitor
from vmm.debug.packets import MAX_PACKET, Packet, Parser, ProtocolError, Signal, encode
from vmm.errors import ConfigError, VmmError
from vmm.lifecycle import Outcome, Reason

CHUNK = 1 << 16
SIGINT, SIGTRAP, SIGKILL = 2, 5, 9
E_INVALID, E_FAULT, E_FULL = b"E16", b"E0e", b"E1c"
_KINDS = {
    "0": PointKind.EXECUTE, "1": PointKind.EXECUTE, "2": PointKind.WRITE, "3": PointKind.READ, "4": PointKind.ACCESS,
}  # fmt: skip
_WATCH = {PointKind.WRITE: "watch", PointKind.READ: "rwatch", PointKind.ACCESS: "awatch"}
_FEATURES = (
    f"PacketSize={MAX_PACKET:x};qXfer:features:read+;qXfer:threads:read+;QStartNoAckMode+;vContSupported+;"
    "swbreak+;hwbreak+;multiprocess-;no-resumed-"
)


class DebuggerDetached(Exception):
    """The client said goodbye; the machine runs on."""


class Malformed(Exception):
    """A packet whose fields are not what they should be."""


def hexadecimal(text: str, limit: int = 1 << 64) -> int:
    """A number below `limit`. Raises Malformed."""
    if not text or len(text) > 16 or not all(char in "0123456789abcdefABCDEF" for char in text):
        raise Malformed(text)
    value = int(text, 16)
    if value >= limit:
        raise Malformed(text)
    return value


def unhex(text: str) -> bytes:
    """Raises Malformed."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Malformed(text) from None


class GdbSession:
    """From the first byte to the end of the connection."""

    def __init__(
        self,
        debugger: Debugger,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        architecture: str,
        outcome: Callable[[], Outcome | None],
        kill: Callable[[], None],
        reset: Callable[[], None],
    ) -> None:
        """`debugger`: attached. `kill` and `reset` are the machine's."""
        self._debugger, self._reader, self._writer = debugger, reader, writer
        self._architecture = architecture
        self._outcome, self._kill = outcome, kill
        self._parser = Parser()
        self._acknowledges = True
        self._last = b""
        self._thread = 0
        """vCPU of g, m and Z (packet Hg)."""
        self._resuming: int | None = None
        """vCPU of s and c (packet Hc); None: all."""
        self._physical = False
        self._running = False
        self._hardware = set[Point]()
        self._monitor = Monitor(debugger, reset)
        self.spoke = False
        """The client sent at least one packet."""

    async def serve(self) -> None:
        """Until the client detaches or goes away, or the machine has ended. The caller detaches the debugger."""
        reading: asyncio.Task[bytes] | None = None
        stopping: asyncio.Task[Stop] | None = None
        try:
            while True:
                reading = reading or asyncio.create_task(self._reader.read(CHUNK), name="gdb client")
                if self._running and stopping is None:
                    stopping = asyncio.create_task(self._debugger.wait(), name="gdb stop")
                tasks = {reading} if stopping is None else {reading, stopping}
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if stopping is not None and stopping.done():
                    stop, stopping = stopping.result(), None
                    self._running = False
                    self._thread, self._resuming = stop.vcpu, None
                    self._notice()
                    self._send(self._stop_reply(stop))
                    await self._writer.drain()
                    if stop.why is Why.ENDED:
                        return
                if reading.done():
                    data, reading = reading.result(), None
                    if not data:
                        return
                    for item in self._parser.feed(data):
                        await self._receive(item)
                    await self._writer.drain()
        except DebuggerDetached:
            await self._writer.drain()
        except (OSError, ProtocolError):
            pass
        finally:
            left = [task for task in (reading, stopping) if task is not None]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _receive(self, item: Packet | Signal) -> None:
        if item is Signal.INTERRUPT:
            if self._running:
                self._debugger.interrupt()
        elif item is Signal.NAK:
            self._writer.write(self._last)
        elif item is Signal.BAD:
            if self._acknowledges:
                self._writer.write(b"-")
        elif isinstance(item, Packet):
            self.spoke = True
            if self._acknowledges:
                self._writer.write(b"+")
            if self._running:
                return  # all-stop: nothing but an interrupt is expected now
            if self._debugger.stopped is None:
                await self._debugger.wait()  # it is started again just now
            answer = await self._answer(item.data)
            if answer is not None:
                self._send(answer)

    def _send(self, data: bytes) -> None:
        self._last = encode(data)
        self._writer.write(self._last)

    def _notice(self) -> None:
        while self._debugger.notices:
            self._send(b"O" + f"{self._debugger.notices.pop(0)}\n".encode().hex().encode())

    async def _answer(self, data: bytes) -> bytes | None:
        """None: the answer is the next stop. b"": the packet is not known."""
        try:
            if data[:1] == b"X":
                return self._write_binary(data)
            text = data.decode("ascii")
            handler = _HANDLERS.get(text[:1])
            result = handler(self, text[1:]) if handler is not None else b""
            return await result if isinstance(result, Awaitable) else result
        except (Malformed, UnicodeDecodeError):
            return E_INVALID
        except ConfigError:
            return E_FULL
        except VmmError:
            stop = self._debugger.stopped
            if stop is not None and stop.why is Why.ENDED and data[:1] in (b"c", b"C", b"s", b"S", b"v"):
                return self._stop_reply(stop)  # it ended before it was asked to run on
            return E_INVALID

    # Stops.

    def _stop_reply(self, stop: Stop) -> bytes:
        if stop.why is Why.ENDED:
            outcome = self._outcome()
            if outcome is None or outcome.reason in (Reason.KILLED, Reason.SIGNAL):
                return b"X%02x" % SIGKILL
            return b"W%02x" % outcome.status
        signal = SIGINT if stop.why is Why.INTERRUPTED else SIGTRAP
        parts = [f"T{signal:02x}thread:{stop.vcpu + 1:x};"]
        if stop.why is Why.WATCH and stop.point is not None:
            parts.append(f"{_WATCH[stop.point.kind]}:{stop.address:x};")
        elif stop.why is Why.BREAKPOINT and stop.point is not None:
            parts.append("hwbreak:;" if stop.point in self._hardware else "swbreak:;")
        state = self._debugger.state(stop.vcpu)
        for number, register in enumerate(self._registers):  # what GDB looks at first
            if register.name[1:] in ("ip", "sp", "bp") and register.name[0] in "re":
                parts.append(f"{number:x}:{target.read(register, state).hex()};")
        return "".join(parts).encode()

    def _why(self, _rest: str) -> bytes:
        return self._stop_reply(self._debugger.stopped or Stop(Why.INTERRUPTED, self._thread))

    # Registers.

    @property
    def _registers(self) -> tuple[target.GdbRegister, ...]:
        return target.registers(self._architecture, self._debugger.avx)

    def _read_registers(self, _rest: str) -> bytes:
        return target.pack(self._registers, self._debugger.state(self._thread)).hex().encode()

    def _write_registers(self, rest: str) -> bytes:
        state = target.unpack(self._registers, self._debugger.state(self._thread), unhex(rest))
        self._debugger.set_state(self._thread, state)
        return b"OK"

    def _register(self, text: str) -> target.GdbRegister:
        registers = self._registers
        return registers[hexadecimal(text, len(registers))]

    def _read_register(self, rest: str) -> bytes:
        return target.read(self._register(rest), self._debugger.state(self._thread)).hex().encode()

    def _write_register(self, rest: str) -> bytes:
        number, _, value = rest.partition("=")
        register, data = self._register(number), unhex(value)
        if len(data) != register.bits // 8:
            raise Malformed(rest)
        state = register.set(self._debugger.state(self._thread), int.from_bytes(data, "little"))
        self._debugger.set_state(self._thread, state)
        return b"OK"

    # Memory.

    def _read_memory(self, rest: str) -> bytes:
        address, _, length = rest.partition(",")
        size = min(hexadecimal(length), MAX_PACKET // 2)
        data = self._debugger.read(self._thread, hexadecimal(address), size, physical=self._physical)
        return data.hex().encode() if data or not size else E_FAULT

    def _write(self, where: str, data: bytes) -> bytes:
        address, _, length = where.partition(",")
        if hexadecimal(length) != len(data):
            raise Malformed(where)
        try:
            self._debugger.write(self._thread, hexadecimal(address), data, physical=self._physical)
        except ConfigError:
            return E_FAULT
        return b"OK"

    def _write_memory(self, rest: str) -> bytes:
        where, _, data = rest.partition(":")
        return self._write(where, unhex(data))

    def _write_binary(self, data: bytes) -> bytes:
        where, colon, content = data[1:].partition(b":")
        if not colon:
            raise Malformed("X")
        return self._write(where.decode("ascii"), content)

    # Threads.

    def _index(self, text: str) -> int | None:
        """The vCPU of a thread id; None: all, or any."""
        if text in ("-1", "0"):
            return None
        return hexadecimal(text, self._debugger.count + 1) - 1

    def _choose_thread(self, rest: str) -> bytes:
        index = self._index(rest[1:])
        if rest[:1] == "g":
            self._thread = self._thread if index is None else index
        elif rest[:1] == "c":
            self._resuming = index
        else:
            raise Malformed(rest)
        return b"OK"

    def _alive(self, rest: str) -> bytes:
        self._index(rest)
        return b"OK"

    # Running.

    def _resume(self, actions: dict[int, Action]) -> bytes | None:
        self._debugger.resume(actions)
        self._running = True
        return None

    def _continue(self, rest: str) -> bytes | None:
        return self._legacy_resume(rest, Action.RUN)

    def _step(self, rest: str) -> bytes | None:
        return self._legacy_resume(rest, Action.STEP)

    def _legacy_resume(self, rest: str, action: Action) -> bytes | None:
        if rest:
            state = self._debugger.state(self._thread)
            pc = next(each for each in self._registers if each.name in ("rip", "eip"))
            self._debugger.set_state(self._thread, pc.set(state, hexadecimal(rest)))
        if action is Action.STEP:
            return self._resume({self._thread if self._resuming is None else self._resuming: Action.STEP})
        chosen = range(self._debugger.count) if self._resuming is None else (self._resuming,)
        return self._resume(dict.fromkeys(chosen, Action.RUN))

    def _continue_signal(self, rest: str) -> bytes | None:
        return self._continue(rest.partition(";")[2])  # a machine takes no signals

    def _step_signal(self, rest: str) -> bytes | None:
        return self._step(rest.partition(";")[2])

    def _v(self, rest: str) -> bytes | None:
        if rest == "Cont?":
            return b"vCont;c;C;s;S;t"
        if rest.startswith("Cont;"):
            return self._v_cont(rest.removeprefix("Cont;"))
        if rest.startswith("Kill"):
            self._kill()
            return b"OK"
        return b""

    def _v_cont(self, rest: str) -> bytes | None:
        """The leftmost action that matches a thread is its own; threads without one stay as they are."""
        actions: dict[int, Action | None] = {}
        for item in rest.split(";"):
            what, colon, thread = item.partition(":")
            action = {"c": Action.RUN, "C": Action.RUN, "s": Action.STEP, "S": Action.STEP, "t": None}.get(
                what[:1], Action.RUN
            )
            if what[:1] not in ("c", "C", "s", "S", "t"):
                raise Malformed(item)
            index = self._index(thread) if colon else None
            for each in range(self._debugger.count) if index is None else (index,):
                actions.setdefault(each, action)
        return self._resume({index: action for index, action in actions.items() if action is not None})

    def _kill_packet(self, _rest: str) -> bytes:
        self._kill()
        raise DebuggerDetached

    def _detach(self, _rest: str) -> bytes:
        self._send(b"OK")
        raise DebuggerDetached

    # Breakpoints.

    def _point(self, rest: str) -> tuple[str, Point]:
        kind, address, length = (*rest.partition(";")[0].split(","), "", "")[:3]
        if kind not in _KINDS:
            raise Malformed(rest)
        size = 1 if kind in "01" else hexadecimal(length, MAX_LENGTH + 1)
        at = hexadecimal(address)
        if not size or at + size > 1 << 64:
            raise Malformed(rest)
        return kind, Point(_KINDS[kind], at, size)

    def _insert(self, rest: str) -> bytes:
        if rest[:1] not in _KINDS:
            return b""
        kind, point = self._point(rest)
        self._debugger.insert(point, memory=kind == "0", vcpu=self._thread)
        if kind == "1":
            self._hardware.add(point)
        return b"OK"

    def _remove(self, rest: str) -> bytes:
        if rest[:1] not in _KINDS:
            return b""
        _, point = self._point(rest)
        self._debugger.remove(point)
        self._hardware.discard(point)
        return b"OK"

    # Questions.

    async def _query(self, rest: str) -> bytes:
        name, _, arguments = rest.partition(":")
        if name == "Supported":
            return _FEATURES.encode()
        if name == "Attached":
            return b"1"
        if name == "C":
            return f"QC{self._thread + 1:x}".encode()
        if name == "fThreadInfo":
            return ("m" + ",".join(f"{index + 1:x}" for index in range(self._debugger.count))).encode()
        if name == "sThreadInfo":
            return b"l"
        if name.startswith("ThreadExtraInfo,"):
            index = self._index(name.partition(",")[2])
            return self._monitor.describe(index or 0).encode().hex().encode()
        if name == "Xfer":
            return self._transfer(arguments)
        if name.startswith("Rcmd,"):
            text = await self._monitor.execute(unhex(name.partition(",")[2]).decode("utf-8", "replace"))
            return self._output(text)
        if name == "Symbol":
            return b"OK"
        if name == "qemu.PhyMemMode":
            return b"%d" % self._physical
        return b""

    def _output(self, text: str) -> bytes:
        """As console output, piece by piece."""
        data = text.encode()
        size = MAX_PACKET // 2 - 8
        for at in range(0, len(data), size):
            self._send(b"O" + data[at : at + size].hex().encode())
        return b"OK"

    def _transfer(self, arguments: str) -> bytes:
        kind, operation, annex, where = (*arguments.split(":"), "", "", "", "")[:4]
        if operation != "read":
            return b""
        if kind == "features" and annex == "target.xml":
            content = target.description(self._architecture, self._debugger.avx)
        elif kind == "threads":
            content = self._threads()
        else:
            return b"E00"
        offset, _, length = where.partition(",")
        at, size = hexadecimal(offset), min(hexadecimal(length), MAX_PACKET - 1)
        part = content[at : at + size]
        return (b"m" if at + size < len(content) else b"l") + part

    def _threads(self) -> bytes:
        threads = "".join(
            f'<thread id="{index + 1:x}" core="{index}" name="vCPU {index}">{self._monitor.describe(index)}</thread>'
            for index in range(self._debugger.count)
        )
        return f'<?xml version="1.0"?><threads>{threads}</threads>'.encode()

    def _set(self, rest: str) -> bytes:
        if rest == "StartNoAckMode":
            self._acknowledges = False
            return b"OK"
        if rest in ("qemu.PhyMemMode:0", "qemu.PhyMemMode:1"):
            self._physical = rest.endswith("1")
            return b"OK"
        return b""


_HANDLERS: dict[str, Callable[[GdbSession, str], bytes | None | Awaitable[bytes]]] = {
    "?": GdbSession._why,
    "g": GdbSession._read_registers,
    "G": GdbSession._write_registers,
    "p": GdbSession._read_register,
    "P": GdbSession._write_register,
    "m": GdbSession._read_memory,
    "M": GdbSession._write_memory,
    "H": GdbSession._choose_thread,
    "T": GdbSession._alive,
    "c": GdbSession._continue,
    "s": GdbSession._step,
    "C": GdbSession._continue_signal,
    "S": GdbSession._step_signal,
    "v": GdbSession._v,
    "k": GdbSession._kill_packet,
    "D": GdbSession._detach,
    "Z": GdbSession._insert,
    "z": GdbSession._remove,
    "q": GdbSession._query,
    "Q": GdbSession._set,
}
