"""16550A UART, as in National Semiconductor's PC16550D data sheet (section numbers below are its own).

The line is infinitely fast: the transmitter is always empty, the character time-out is over at once. Data writes are
posted; LSR, IIR, MSR and the plain registers are read from shadows, with read-to-clear values where the data sheet
has them. Interrupts reach the PC's interrupt line only while OUT2 is set, as on the PC/AT's adapter.

Received characters come from a CharacterPort, 16 at a time, as fast as the guest reads them. The interrupt line falls
each time that the guest has emptied the FIFO, as it does on hardware: the interrupt controllers see edges, and a driver
that leaves its handler while characters still come is called again by the next one. After BURST characters the line is
quiet for GAP_NS, so that a driver's handler ends and what waits for the processor gets it.

Characters wait in the port until a driver listens: it has enabled the receive interrupt, or it polls the line status.
A driver that starts clears FIFOs and reads the data register blindly; nothing that was typed before is lost to that.
Knows nothing of consoles or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Annotated, ClassVar

from cpu.contract import Space
from cpu.values import U8, U16, U64, dataclass
from vmm.machine.bus import Register, RegisterMap
from vmm.machine.interfaces import Assembly, Board, CharacterPort, TimerHandle

COM1, COM1_GSI = 0x3F8, 4
COM2, COM2_GSI = 0x2F8, 3
FIFO_SIZE = 16
BURST, GAP_NS = 256, 200_000
"""Linux' handler takes 256 characters at a time, and reports too much work after 512 times without a pause."""
POLLS = 4
"""This many reads of LSR, with no other access between them, are a driver that polls. Linux' start-up reads LSR twice
at most between other accesses, among which are blind reads of the data register."""

# 8.4 Interrupt enable register
IER_RDA, IER_THRE, IER_RLS, IER_MSI = 1, 2, 4, 8
# 8.5 Interrupt identification register, table IV: by priority
IIR_NONE, IIR_RLS, IIR_RDA, IIR_CTI, IIR_THRE, IIR_MSI = 0x01, 0x06, 0x04, 0x0C, 0x02, 0x00
IIR_FIFOS = 0xC0
# 8.6 FIFO control register
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1, 2, 4
TRIGGER = (1, 4, 8, 14)
# 8.1 Line control register
LCR_BREAK, LCR_DLAB = 0x40, 0x80
# 8.3 Line status register
LSR_DR, LSR_OE, LSR_PE, LSR_FE, LSR_BI, LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = (
    1,
    2,
    4,
    8,
    0x10,
    0x20,
    0x40,
    0x80,
)
LSR_ERRORS = LSR_OE | LSR_PE | LSR_FE | LSR_BI
LSR_IDLE = LSR_THRE | LSR_TEMT
# 8.7 Modem control register
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 0x10
# 8.8 Modem status register
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
MSR_CONNECTED = MSR_CTS | MSR_DSR | MSR_DCD


@dataclass(frozen=True, slots=True)
class UartState:
    """Registers, receive FIFO and pending conditions of a UART."""

    kind: ClassVar = "uart"
    version: ClassVar = 1
    ier: Annotated[int, range(0x10)]
    lcr: U8
    mcr: Annotated[int, range(0x20)]
    scratch: U8
    divisor: U16
    fifos: bool
    trigger: Annotated[int, range(1, FIFO_SIZE)]
    received: Annotated[tuple[tuple[U8, Annotated[int, range(0x1F)]], ...], range(FIFO_SIZE + 1)]
    """Characters, each with the LSR bits of its errors."""
    last: U8
    overrun: bool
    thre_pending: bool
    kept: Annotated[bytes, range(FIFO_SIZE + 1)]
    """Characters that were cleared away while no driver listened."""
    polled: bool
    touched: bool
    polls: Annotated[int, range(1 << 16)]
    """Looks at the line status since input waits."""
    burst: U16
    """Characters taken since the last pause in the input."""
    gap_ns: U64 | None
    """When that pause is over, of the machine's clock."""
    msr_delta: Annotated[int, range(0x10)]
    inputs: U8
    throttled: bool


class Uart:
    """One UART at I/O port `base`, interrupting through `gsi`, its line connected to `port`. Loop thread."""

    state_type = UartState

    def __init__(self, board: Board, base: int, gsi: int, port: CharacterPort | None, name: str) -> None:
        self._port = port
        self._clock = board.clock
        self._irq = board.irq_line(gsi)
        self._ier = self._lcr = self._mcr = self._scratch = 0
        self._divisor = 12
        self._fifos = False
        self._trigger = 1
        self._received: deque[tuple[int, int]] = deque()
        """(character, its LSR_PE, LSR_FE, LSR_BI)"""
        self._last = 0
        self._kept = b""
        """Characters of the FIFO that were cleared away while no driver listened: they come first when one does."""
        self._polls = 0
        self._polled = self._touched = False
        """A driver polls; it has read a character."""
        self._waiting = False
        """The port has input, as far as we know."""
        self._burst = 0
        self._gap: TimerHandle | None = None
        self._gap_ns = 0
        self._overrun = 0
        self._thre_pending = False
        self._msr_delta = 0
        self._inputs = MSR_CONNECTED
        self._throttled = False
        registers = RegisterMap(
            8,
            [
                Register("RBR/THR/DLL", 0, read=self._read_data, write=self._write_data),
                Register("IER/DLM", 1, read=self._read_ier, write=self._write_ier),
                Register("IIR/FCR", 2, read=self._read_iir, write=self._write_fcr),
                Register("LCR", 3, read=lambda: self._lcr, write=self._write_lcr),
                Register("MCR", 4, read=lambda: self._mcr, write=self._write_mcr),
                Register("LSR", 5, read=self._read_lsr),
                Register("MSR", 6, read=self._read_msr),
                Register("SCR", 7, read=lambda: self._scratch, write=self._write_scratch),
            ],
        )
        self.read = registers.read
        self.write = registers.write
        board.map(Space.PORT, base, 8, self, name)
        board.post(Space.PORT, base, 1, self, 0)

        def shadow(offset: int, notice: Callable[[], None] | None = None) -> Callable[[int, int | None], None]:
            return board.shadow(Space.PORT, base + offset, 1, notice).set

        self._shadow_ier = shadow(1)
        self._shadow_iir = shadow(2, self._thre_seen)
        self._shadow_lcr = shadow(3)
        self._shadow_mcr = shadow(4)
        self._shadow_lsr = shadow(5, self._status_seen)
        self._shadow_msr = shadow(6, self._deltas_seen)
        self._shadow_scratch = shadow(7)
        self._shown: dict[str, tuple[int, int | None]] = {}
        self._update()
        if port is not None:
            port.set_receiver(self._arrived)

    # What arrives from the guest.

    def posted(self, offset: int, size: int, data: bytes) -> None:
        """Writes to the data register, merged."""
        self._polls = 0
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF00 | data[-1]
        elif self._mcr & MCR_LOOP:
            for character in data:
                self._receive(character, 0)
            self._thre_pending = True
            self._update()
        else:
            if self._port is not None:
                self._port.write(data)
            if not self._thre_pending:
                self._thre_pending = True
                if self._ier & IER_THRE:
                    self._update()

    def _write_data(self, value: int) -> None:
        self.posted(0, 1, bytes((value,)))

    def _read_data(self) -> int:
        if self._lcr & LCR_DLAB:
            return self._divisor & 0xFF
        self._polls = 0
        if self._received:
            self._last = self._received.popleft()[0]
            self._touched = True
            self._update()  # the line falls with the last character, so that the next one makes an edge
            if not self._received:
                self._fill()
        return self._last

    def _read_ier(self) -> int:
        return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
        else:
            # The holding register is empty all the time: enabling its interrupt raises it at once.
            if value & IER_THRE and not self._ier & IER_THRE:
                self._thre_pending = True
            self._ier = value & 0x0F
        self._polls = 0
        self._fill()
        self._update()

    def _read_iir(self) -> int:
        value = self._identification()
        if value & 0x0F == IIR_THRE:
            self._thre_seen()
        return value

    def _write_fcr(self, value: int) -> None:
        self._polls = 0
        if bool(value & FCR_ENABLE) != self._fifos:
            self._fifos = bool(value & FCR_ENABLE)
            self._keep_received()  # the switch clears the FIFO; Linux makes it with its receive interrupt on already
        if self._fifos:
            self._trigger = TRIGGER[value >> 6 & 3]
            if value & FCR_CLEAR_RX:
                self._clear_received()
        else:
            self._trigger = 1
        self._fill()
        self._update()

    def _write_lcr(self, value: int) -> None:
        began = value & LCR_BREAK and not self._lcr & LCR_BREAK
        self._lcr = value
        self._polls = 0
        if began:
            if self._mcr & MCR_LOOP:
                self._receive(0, LSR_BI)
            elif self._port is not None:
                self._port.event("break")
        self._update()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_inputs()
        # A driver that drops RTS while it keeps DTR asks the other side to wait (hardware flow control).
        self._throttled = value & (MCR_DTR | MCR_RTS | MCR_LOOP) == MCR_DTR and bool(
            self._throttled or self._mcr & MCR_RTS
        )
        if value & MCR_LOOP and not self._mcr & MCR_LOOP:
            self._keep_received()  # the line is cut off; what came over it is not mixed with the loop's own
        self._mcr = value & 0x1F
        self._polls = 0
        self._modem_changed(before)
        self._fill()
        self._update()

    def _read_lsr(self) -> int:
        value = self._line_status()
        if value & LSR_ERRORS or self._hides_input():
            self._status_seen()
        return value

    def _read_msr(self) -> int:
        value = self._modem_inputs() | self._msr_delta
        if self._msr_delta:
            self._deltas_seen()
        return value

    def _write_scratch(self, value: int) -> None:
        self._scratch = value
        self._update()

    # Read-to-clear: called by the read itself, or when a shadow was read.

    def _thre_seen(self) -> None:
        self._thre_pending = False
        self._update()

    def _status_seen(self) -> None:
        self._overrun = 0
        if self._received and self._received[0][1]:
            self._received[0] = (self._received[0][0], 0)
        if self._hides_input():
            self._polls += 1
            if self._polls >= POLLS:
                self._polled, self._touched = True, False
                self._fill()
        self._update()

    def _deltas_seen(self) -> None:
        self._msr_delta = 0
        self._update()

    # What arrives on the line.

    def send_break(self) -> None:
        """The other side holds a break: a zero character with BI (8.3)."""
        if not self._mcr & MCR_LOOP:
            self._receive(0, LSR_BI)
            self._update()

    def set_modem_inputs(self, inputs: int) -> None:
        """Drive CTS, DSR, RI and DCD (bits as in MSR)."""
        before = self._modem_inputs()
        self._inputs = inputs & 0xF0
        self._modem_changed(before)
        self._update()

    def _arrived(self) -> None:
        """The port has input where it had none."""
        self._waiting = True
        if self._gap is None:
            self._fill()
        self._update()

    def _listens(self) -> bool:
        """A driver takes what is received."""
        return self._polled or bool(self._ier & IER_RDA)

    def _hides_input(self) -> bool:
        """There is input, and nobody has asked for it yet."""
        return not (self._received or self._listens()) and (self._waiting or bool(self._kept))

    def _fill(self) -> None:
        """Take input while there is room and somebody listens, so that nothing is ever lost to an overrun."""
        if self._port is None or self._throttled or self._mcr & MCR_LOOP or not self._listens():
            return
        if self._burst >= BURST:
            self._pause()
            return
        room = (FIFO_SIZE if self._fifos else 1) - len(self._received)
        if room > 0:
            data, self._kept = self._kept[:room], self._kept[room:]
            wanted = room - len(data)
            data += self._port.read(wanted)
            self._waiting = len(data) == room
            if data:
                self._burst += len(data)
                self._received.extend((character, 0) for character in data)
                self._update()
            else:
                self._burst = 0

    def _pause(self) -> None:
        if self._gap is None:
            self._pause_until(self._clock.now_ns() + GAP_NS)

    def _pause_until(self, deadline_ns: int) -> None:
        self._gap_ns = deadline_ns
        self._gap = self._clock.call_at(deadline_ns, self._gap_over)

    def _gap_over(self) -> None:
        self._gap = None
        self._burst = 0
        self._fill()

    def _keep_received(self) -> None:
        self._kept = bytes(character for character, errors in self._received if not errors) + self._kept
        self._received.clear()

    def _clear_received(self) -> None:
        if not self._mcr & MCR_LOOP and not (self._touched if self._polled else self._ier & IER_RDA):
            self._keep_received()
        self._received.clear()
        self._polled = False

    def _receive(self, character: int, errors: int) -> None:
        """A character that cannot wait: 8.3, a full FIFO keeps what it has, a single register is overwritten."""
        if len(self._received) < (FIFO_SIZE if self._fifos else 1):
            self._received.append((character, errors))
        else:
            self._overrun = LSR_OE
            if not self._fifos:
                self._received[0] = (character, errors)

    # What the guest can see.

    def _modem_inputs(self) -> int:
        if not self._mcr & MCR_LOOP:
            return self._inputs
        # 8.7: in the loop RTS, DTR, OUT1 and OUT2 lead to CTS, DSR, RI and DCD.
        mcr = self._mcr
        return (
            (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _modem_changed(self, before: int) -> None:
        after = self._modem_inputs()
        changed = before ^ after
        delta = changed >> 4 & 0x0B
        if before & MSR_RI and not after & MSR_RI:  # TERI: the trailing edge only
            delta |= 0x04
        self._msr_delta |= delta

    def _line_status(self) -> int:
        value = LSR_IDLE | self._overrun
        if self._received:
            value |= LSR_DR | self._received[0][1]
            if self._fifos and any(errors for _, errors in self._received):
                value |= LSR_FIFO_ERROR
        return value

    def _identification(self) -> int:
        ier = self._ier
        if ier & IER_RLS and (self._overrun or (self._received and self._received[0][1])):
            value = IIR_RLS
        elif ier & IER_RDA and self._received:
            value = IIR_RDA if len(self._received) >= self._trigger else IIR_CTI
        elif ier & IER_THRE and self._thre_pending:
            value = IIR_THRE
        elif ier & IER_MSI and self._msr_delta:
            value = IIR_MSI
        else:
            value = IIR_NONE
        return value | (IIR_FIFOS if self._fifos else 0)

    def _update(self) -> None:
        """Bring the shadows and the interrupt line up to date."""
        iir = self._identification()
        lsr = self._line_status()
        modem = self._modem_inputs()
        self._show("ier", self._shadow_ier, self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier)
        # Reading THRE takes that interrupt away (8.5), but only once the loop hears of it: until then more reads say
        # the same. So a driver that writes the next batch at once, as Linux does, goes on without waiting for us.
        self._show("iir", self._shadow_iir, iir, iir if iir & 0x0F == IIR_THRE else None)
        self._show("lcr", self._shadow_lcr, self._lcr)
        self._show("mcr", self._shadow_mcr, self._mcr)
        told = lsr & LSR_ERRORS or self._hides_input()
        self._show("lsr", self._shadow_lsr, lsr, lsr & ~LSR_ERRORS if told else None)
        self._show("msr", self._shadow_msr, modem | self._msr_delta, modem if self._msr_delta else None)
        self._show("scr", self._shadow_scratch, self._scratch)
        self._irq.set(not iir & IIR_NONE and bool(self._mcr & MCR_OUT2))

    def _show(self, name: str, show: Callable[[int, int | None], None], value: int, after: int | None = None) -> None:
        # A read-to-clear value is set again each time: the guest may have consumed it just now.
        if after is not None or self._shown.get(name) != (value, None):
            self._shown[name] = (value, after)
            show(value, after)

    def save(self) -> UartState:
        """All registers, the receive FIFO and the pending conditions."""
        return UartState(
            ier=self._ier, lcr=self._lcr, mcr=self._mcr, scratch=self._scratch, divisor=self._divisor,
            fifos=self._fifos, trigger=self._trigger, received=tuple(self._received), last=self._last,
            overrun=bool(self._overrun), thre_pending=self._thre_pending, kept=self._kept,
            polled=self._polled, touched=self._touched, polls=min(self._polls, POLLS), burst=min(self._burst, BURST),
            gap_ns=None if self._gap is None else self._gap_ns, msr_delta=self._msr_delta, inputs=self._inputs,
            throttled=self._throttled,
        )  # fmt: skip

    def restore(self, state: UartState) -> None:
        self._ier, self._lcr, self._mcr, self._scratch = state.ier, state.lcr, state.mcr, state.scratch
        self._divisor, self._fifos, self._trigger = state.divisor, state.fifos, state.trigger
        self._received = deque(state.received)
        self._last, self._overrun = state.last, LSR_OE if state.overrun else 0
        self._thre_pending, self._msr_delta = state.thre_pending, state.msr_delta
        self._kept, self._polled, self._touched = state.kept, state.polled, state.touched
        self._polls, self._burst = state.polls, state.burst
        self._inputs, self._throttled = state.inputs & 0xF0, state.throttled
        self._shown.clear()
        self._update()
        if state.gap_ns is not None:
            self._pause_until(state.gap_ns)
        elif self._waiting and not self._received:
            self._fill()  # what the console's other end sent before this machine was there


def attach(assembly: Assembly) -> None:
    """COM1, connected to the console."""
    assembly.add("com1", Uart(assembly.board, COM1, COM1_GSI, assembly.console, "com1"))
