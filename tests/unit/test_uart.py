"""The 16550A by its data sheet (PC16550D, section numbers in the names), and with drivers' habits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu.contract import Space
from tests.support.pc import FakePort, Pc
from vmm.devices.uart import BURST, COM1, COM1_GSI, FIFO_SIZE, GAP_NS, Uart

THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = (COM1 + offset for offset in range(8))
FCR = IIR
DLAB = 0x80


class Rig:
    def __init__(self) -> None:
        self.machine = Pc(queued=True)
        self.port = FakePort()
        self.uart = Uart(self.machine, COM1, COM1_GSI, self.port, "com1")
        self.out, self.inp, self.drain = self.machine.out, self.machine.inp, self.machine.drain

    def driver(self, ier: int = 0x01, fcr: int = 0x01) -> None:
        """8N1, FIFOs, OUT2: what Linux's 8250 driver sets up."""
        self.out(LCR, 3)
        self.out(FCR, fcr)
        self.out(MCR, 0x0B)
        self.out(IER, ier)

    @property
    def irq(self) -> bool:
        self.drain()
        return self.machine.levels.get(COM1_GSI, False)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_reset_values(rig: Rig) -> None:
    """Table III (modem inputs as a connected terminal drives them)."""
    assert rig.inp(IER) == 0
    assert rig.inp(IIR) == 1
    assert rig.inp(LCR) == 0
    assert rig.inp(MCR) == 0
    assert rig.inp(LSR) == 0x60
    assert rig.inp(MSR) & 0x0F == 0


def test_output_is_posted_and_in_order(rig: Rig) -> None:
    rig.driver()
    before = rig.machine.synchronous
    for character in b"Hello":
        assert rig.inp(LSR) & 0x20
        rig.out(THR, character)
    assert rig.machine.synchronous == before
    rig.drain()
    assert rig.port.written == b"Hello"


def test_8_2_divisor_latch_hides_data_and_ier(rig: Rig) -> None:
    rig.out(IER, 5)
    rig.out(LCR, DLAB | 3)
    rig.out(THR, 0x0C)
    rig.out(IER, 0x01)
    assert rig.inp(THR) == 0x0C
    assert rig.inp(IER) == 0x01
    rig.out(LCR, 3)
    assert rig.inp(IER) == 5
    assert rig.port.written == b""


def test_8_2_divisor_by_word_access(rig: Rig) -> None:
    """A 16-bit access to an 8-bit device is two byte accesses."""
    rig.out(LCR, DLAB)
    rig.out(THR, 0x1234, 2)
    assert rig.inp(THR, 2) == 0x1234


def test_scratch_register(rig: Rig) -> None:
    for value in (0, 0xAA, 0x55, 0xFF):
        rig.out(SCR, value)
        assert rig.inp(SCR) == value


def test_8_4_only_four_ier_bits_exist(rig: Rig) -> None:
    rig.out(IER, 0xFF)
    assert rig.inp(IER) == 0x0F


def test_8_5_fifo_bits_in_iir(rig: Rig) -> None:
    assert rig.inp(IIR) & 0xC0 == 0
    rig.out(FCR, 1)
    assert rig.inp(IIR) & 0xC0 == 0xC0
    rig.out(FCR, 0)
    assert rig.inp(IIR) & 0xC0 == 0


def test_thre_interrupt_comes_with_enabling_and_goes_with_reading_iir(rig: Rig) -> None:
    rig.driver(ier=0)
    assert not rig.irq
    rig.out(IER, 2)
    assert rig.irq
    assert rig.inp(IIR) == 0xC2
    rig.drain()
    assert rig.inp(IIR) == 0xC1
    assert not rig.irq


def test_thre_interrupt_comes_again_after_each_batch(rig: Rig) -> None:
    """What keeps an interrupt-driven transmitter going: an edge for every batch that was written."""
    rig.driver(ier=2)
    sent = b""
    for batch in range(20):
        assert rig.irq
        assert rig.inp(IIR) == 0xC2
        for character in range(16):
            rig.out(THR, batch * 7 + character & 0xFF)
            sent += bytes((batch * 7 + character & 0xFF,))
    assert rig.irq
    assert rig.port.written == sent
    raised = [edge for edge in rig.machine.edges if edge == (COM1_GSI, True)]
    assert len(raised) == 21


def test_a_driver_may_write_batch_after_batch_without_waiting_for_the_loop(rig: Rig) -> None:
    """Linux stays in its interrupt handler while IIR says THRE; the loop may be late."""
    rig.driver(ier=2)
    for _ in range(50):
        assert rig.inp(IIR) == 0xC2
        for character in b"0123456789abcdef":
            rig.out(THR, character)
    rig.out(IER, 0)
    assert rig.port.written == b"0123456789abcdef" * 50
    assert rig.inp(IIR) == 0xC1


def test_linux_thre_test_finds_a_working_uart(rig: Rig) -> None:
    """8250_port.c probes whether THRE comes back when it is disabled and enabled again."""
    rig.driver(ier=0)
    rig.out(IER, 2)
    first = rig.inp(IIR)
    rig.out(IER, 0)
    rig.out(IER, 2)
    second = rig.inp(IIR)
    assert first & 0x0F == 2 and second & 0x0F == 2


def test_received_data(rig: Rig) -> None:
    rig.driver()
    rig.port.type(b"ab")
    assert rig.irq
    assert rig.inp(IIR) == 0xC4
    assert rig.inp(LSR) & 1
    assert rig.inp(THR) == ord("a")
    assert rig.inp(THR) == ord("b")
    assert not rig.inp(LSR) & 1
    assert not rig.irq


@pytest.mark.parametrize(("code", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_8_6_trigger_levels_and_character_timeout(rig: Rig, code: int, level: int) -> None:
    """Below the level the data is announced by the character time-out (identification 0xC)."""
    rig.driver(fcr=1 | code << 6)
    rig.port.type(bytes(level))
    assert rig.inp(IIR) == 0xC4
    rig.inp(THR)
    assert rig.inp(IIR) == (0xC1 if level == 1 else 0xCC)


def test_8_6_clearing_the_receive_fifo(rig: Rig) -> None:
    rig.driver()
    rig.port.type(b"wxyz")
    rig.inp(THR)
    rig.out(FCR, 3)
    assert not rig.inp(LSR) & 1
    assert not rig.irq


def test_input_before_the_driver_starts_is_kept(rig: Rig) -> None:
    """`echo commands | vmm run …`: what came before the guest initialised its UART is not cleared away."""
    rig.port.type(b"early")
    rig.driver(fcr=7)
    assert bytes(rig.inp(THR) for _ in range(5)) == b"early"


def test_without_fifo_one_character_at_a_time(rig: Rig) -> None:
    rig.driver(fcr=0)
    rig.port.type(b"abc")
    assert len(rig.port.typed) == 2
    assert bytes(rig.inp(THR) for _ in range(3)) == b"abc"


def test_a_paste_of_many_characters_arrives_whole(rig: Rig) -> None:
    rig.driver(fcr=0xC1)
    text = bytes(range(256)) * 256
    rig.port.type(text)
    received = bytearray()
    read = rig.uart.read
    while len(received) < len(text):
        assert rig.inp(LSR) & 1
        while rig.inp(LSR) & 1:
            received.append(read(0, 1))
        rig.machine.clock.advance(GAP_NS)
    assert bytes(received) == text


def test_a_driver_that_stops_reading_is_called_again(rig: Rig) -> None:
    """The interrupt controllers see edges: the line falls with the FIFO's last character, however fast more come."""
    rig.driver(fcr=0xC1)
    rig.port.type(bytes(1000))
    for _ in range(4):
        edges = len(rig.machine.edges)
        for _ in range(FIFO_SIZE):
            rig.inp(THR)
        assert rig.machine.edges[edges:] == [(COM1_GSI, False), (COM1_GSI, True)]


def test_a_driver_comes_to_the_end_of_its_work(rig: Rig) -> None:
    """Linux' handler gives up, and says so, after 512 rounds without an end of input."""
    rig.driver()
    rig.port.type(bytes(4 * BURST))
    for _ in range(BURST):
        assert rig.inp(LSR) & 1
        rig.inp(THR)
    assert not rig.inp(LSR) & 1
    assert rig.inp(IIR) == 0xC1
    assert not rig.irq
    rig.machine.clock.advance(GAP_NS)
    assert rig.irq
    assert rig.inp(LSR) & 1


def start_linux_driver(rig: Rig) -> None:
    """What Linux' 8250 driver does with a port, from its probe to an opened tty (accesses recorded from Linux 6.1)."""
    for port, value in ((IER, 0), (IER, 15), (IER, 0), (LCR, 0xBF), (FCR, 0), (LCR, 0), (FCR, 1), (LCR, 0x13)):
        rig.out(port, value)
    rig.out(MCR, 0x1A)
    rig.inp(MSR)
    rig.out(MCR, 1)
    for value in (1, 7, 0):
        rig.out(FCR, value)
    rig.inp(THR)
    rig.out(IER, 0)
    for character in b"console":  # boot messages, printed by polling
        assert rig.inp(LSR) & 0x20
        rig.out(THR, character)
    rig.out(IER, 0)
    for value in (1, 7, 0):
        rig.out(FCR, value)
    for port in (LSR, THR, IIR, MSR, LSR, LSR):
        rig.inp(port)
        rig.drain()
    rig.out(IER, 2)
    rig.out(IER, 0)
    rig.out(LCR, 3)
    rig.out(MCR, 9)
    rig.out(IER, 2)
    rig.inp(LSR)
    rig.inp(IIR)
    rig.out(IER, 0)
    for port in (LSR, THR, IIR, MSR):
        rig.inp(port)
    rig.out(IER, 5)
    rig.out(LCR, 0x93)
    rig.out(THR, 0x0C)
    rig.out(IER, 0)
    rig.out(LCR, 0x13)
    rig.out(FCR, 1)
    rig.out(FCR, 0x81)
    rig.out(MCR, 0x0B)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 200])
def test_typing_ahead_of_linux_loses_nothing(rig: Rig, size: int) -> None:
    text = bytes(range(size))
    rig.port.type(text)
    start_linux_driver(rig)
    assert rig.irq
    assert bytes(rig.inp(THR) for _ in range(size)) == text


def test_typing_while_a_port_is_closed_and_opened_again(rig: Rig) -> None:
    """Linux clears the FIFOs at each close and open of a tty."""
    start_linux_driver(rig)
    rig.port.type(b"first")
    assert bytes(rig.inp(THR) for _ in range(5)) == b"first"
    rig.out(IER, 0)
    rig.out(MCR, 1)
    rig.out(FCR, 7)
    rig.out(FCR, 0)
    rig.inp(THR)
    rig.port.type(b"second")
    start_linux_driver(rig)
    assert bytes(rig.inp(THR) for _ in range(6)) == b"second"


def test_a_driver_that_polls_finds_input(rig: Rig) -> None:
    """Firmware and boot loaders read LSR in a loop and never enable interrupts; so does one that clears first."""
    rig.out(FCR, 7)
    rig.port.type(b"ab")
    received = bytearray()
    for _ in range(10):
        if rig.inp(LSR) & 1:
            received.append(rig.inp(THR))
        rig.drain()
    assert received == b"ab"
    rig.port.type(b"unwanted")
    assert rig.inp(LSR) & 1
    rig.inp(THR)
    rig.out(FCR, 3)
    for _ in range(10):
        rig.inp(LSR)
        rig.drain()
    assert not rig.inp(LSR) & 1


def test_rts_low_holds_the_other_side_back(rig: Rig) -> None:
    """Hardware flow control: a throttled Linux tty drops RTS and keeps DTR."""
    rig.driver()
    rig.out(MCR, 0x09)
    rig.port.type(b"wait")
    assert not rig.inp(LSR) & 1
    rig.out(MCR, 0x0B)
    assert bytes(rig.inp(THR) for _ in range(4)) == b"wait"


def test_a_guest_that_never_sets_rts_receives(rig: Rig) -> None:
    rig.out(MCR, 0x09)
    rig.out(IER, 1)
    rig.port.type(b"x")
    assert rig.inp(LSR) & 1


def test_interrupt_line_is_gated_by_out2(rig: Rig) -> None:
    rig.driver()
    rig.out(MCR, 3)
    rig.port.type(b"a")
    assert not rig.irq
    assert rig.inp(IIR) == 0xC4
    rig.out(MCR, 0x0B)
    assert rig.irq


def test_8_7_loopback_modem_bits(rig: Rig) -> None:
    """RTS, DTR, OUT1, OUT2 lead to CTS, DSR, RI, DCD; Linux's probe expects 0x90 for 0x1A."""
    rig.out(MCR, 0x1A)
    assert rig.inp(MSR) & 0xF0 == 0x90
    rig.out(MCR, 0x15)
    assert rig.inp(MSR) & 0xF0 == 0x60


def test_8_7_loopback_data(rig: Rig) -> None:
    rig.driver()
    rig.out(MCR, 0x1B)
    rig.out(THR, 0x5A)
    rig.drain()
    assert rig.inp(LSR) & 1
    assert rig.inp(THR) == 0x5A
    assert rig.port.written == b""
    rig.port.type(b"outside")
    assert not rig.inp(LSR) & 1


def test_8_3_overrun_in_loopback(rig: Rig) -> None:
    """A full FIFO keeps what it has and reports OE once; the line status interrupt has the highest priority."""
    rig.driver(ier=0x0F)
    rig.out(MCR, 0x1B)
    for character in range(20):
        rig.out(THR, character)
    rig.drain()
    assert rig.inp(IIR) == 0xC6
    assert rig.inp(LSR) & 2
    rig.drain()
    assert not rig.inp(LSR) & 2
    assert bytes(rig.inp(THR) for _ in range(16)) == bytes(range(16))


def test_break_from_the_other_side(rig: Rig) -> None:
    """8.3: a zero character with BI, and with the FIFO the error flag; both go as the data sheet says."""
    rig.driver(ier=5)
    rig.uart.send_break()
    assert rig.irq
    assert rig.inp(IIR) == 0xC6
    assert rig.inp(LSR) & 0x91 == 0x91
    rig.drain()
    assert rig.inp(LSR) & 0x91 == 0x01
    assert rig.inp(THR) == 0
    assert not rig.irq


def test_break_to_the_other_side(rig: Rig) -> None:
    rig.out(LCR, 0x43)
    rig.out(LCR, 0x43)
    rig.out(LCR, 0x03)
    assert rig.port.events == ["break"]


def test_8_8_modem_deltas_and_trailing_edge_of_ring(rig: Rig) -> None:
    rig.driver(ier=8)
    rig.uart.set_modem_inputs(0x40)
    assert rig.irq
    assert rig.inp(IIR) == 0xC0
    assert rig.inp(MSR) == 0x40 | 0x0B
    rig.drain()
    assert rig.inp(MSR) == 0x40
    assert not rig.irq
    rig.uart.set_modem_inputs(0)
    assert rig.inp(MSR) == 0x04


def test_8_5_priorities(rig: Rig) -> None:
    rig.driver(ier=0x0F)
    rig.uart.set_modem_inputs(0)
    rig.uart.send_break()
    rig.port.type(b"a")
    order = []
    for clear in (LSR, THR, None, MSR):
        order.append(rig.inp(IIR) & 0x0F)
        if clear is not None:
            rig.inp(clear)
        if clear is THR:
            rig.inp(THR)
        rig.drain()
    assert order == [0x06, 0x04, 0x02, 0x00]


def test_state_moves_between_uarts(rig: Rig) -> None:
    rig.driver(ier=5, fcr=0xC1)
    rig.out(SCR, 0x77)
    rig.port.type(b"abc")
    rig.inp(THR)
    other = Rig()
    other.uart.restore(rig.uart.save())
    assert [other.inp(port) for port in (IER, IIR, LCR, MCR, LSR, MSR, SCR)] == [
        rig.inp(port) for port in (IER, IIR, LCR, MCR, LSR, MSR, SCR)
    ]
    assert other.irq == rig.irq
    assert bytes((other.inp(THR), other.inp(THR))) == b"bc"


ACCESS = st.one_of(
    st.tuples(st.just("out"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("in"), st.integers(0, 7), st.just(0)),
    st.tuples(st.just("type"), st.just(0), st.integers(0, 40)),
    st.tuples(st.just("break"), st.just(0), st.just(0)),
)


@given(st.lists(ACCESS, max_size=60))
def test_no_access_sequence_breaks_it(steps: list[tuple[str, int, int]]) -> None:
    """Shadows and registers agree, the interrupt line says what IIR says, nothing is raised."""
    rig = Rig()
    for kind, offset, value in steps:
        if kind == "out":
            rig.out(COM1 + offset, value)
        elif kind == "in":
            assert 0 <= rig.inp(COM1 + offset) <= 255
        elif kind == "type":
            rig.port.type(bytes(range(value)))
        else:
            rig.uart.send_break()
        rig.drain()
        saved = rig.uart.save()
        other = Rig()
        other.uart.restore(saved)
        for register in range(1, 8):
            shadow = rig.machine.shadows[Space.PORT, COM1 + register, 1]
            assert shadow.value == other.uart.read(register, 1)
            other.uart.restore(saved)
        pending = not other.uart.read(2, 1) & 1
        assert rig.irq == (pending and bool(saved.mcr & 8))
        assert len(saved.received) <= 16
