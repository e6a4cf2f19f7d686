"""Devices of the embedder's own at ports and in memory: what a guest's program sees, and what mistakes in them say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

import vmm
from cpu import select
from tests.support.assemble import assemble
from tests.support.pc import Pc
from vmm.machine.peripheral import Seat
from vmm.state.payload import decode, encode

PORT = 0x700
END = "out 0xF4, al\nhlt\n"


@pytest.fixture(params=["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def core(request: pytest.FixtureRequest) -> Any:
    found = select.probe(request.param)
    if not found.available:
        pytest.skip(f"{request.param}: {found.reason}")
    return request.param


@dataclass(frozen=True, slots=True)
class AdderState:
    kind: ClassVar = "adder"
    version: ClassVar = 1
    total: Annotated[int, range(1 << 32)]


class Adder(vmm.Peripheral):
    """ADD (+0) takes a byte without waiting, TOTAL (+4) is read with waiting, LAST (+1) without, and clears."""

    address = PORT
    size = 8
    gsi = 5
    posted = ((0, 1),)
    shadowed = ((1, 1),)
    state_type = AdderState

    def __init__(self) -> None:
        self.total = 0
        self.log: list[object] = []

    def registers(self) -> Iterable[vmm.Register]:
        return [
            vmm.Register("ADD", 0, write=self.add),
            vmm.Register("LAST", 1),
            vmm.Register("TOTAL", 4, 4, read=lambda: self.total, write=self.set_total),
        ]

    def attached(self) -> None:
        self.log.append("attached")
        self.show(1, 1, 0)

    def reset(self) -> None:
        self.log.append("reset")
        self.total = 0

    async def aclose(self) -> None:
        self.log.append("closed")

    def add(self, value: int) -> None:
        self.total += value
        self.show(1, 1, value, after=0)

    def set_total(self, value: int) -> None:
        self.total = value

    def seen(self, offset: int, size: int) -> None:
        self.log.append(("seen", offset, size))

    def save(self) -> AdderState:
        return AdderState(self.total)

    def restore(self, state: AdderState) -> None:
        self.total = state.total


def flat(folder: Path, source: str) -> str:
    path = folder / "code"
    path.write_bytes(assemble(source + END, 0x7C00, 16))
    return str(path)


async def run(folder: Path, core: Any, source: str, make: Callable[[], Any], **options: Any) -> vmm.Outcome:
    options = {"platform": "bare", "memory": "2M", "timeout": 60, **options}
    async with vmm.VirtualMachine(
        core=core, flat=flat(folder, source), devices={"own": make}, **options
    ) as machine:
        return await machine.run()


async def test_three_kinds_of_access(tmp_path: Path, core: Any) -> None:
    """Posted writes arrive in order and before an access that waits; a shadow is read and clears."""
    source = """
        mov dx, 0x700
        mov al, 3
        out dx, al
        mov al, 4
        out dx, al
        mov dx, 0x704
        in eax, dx          # 7, and waits
        mov ecx, eax
        mov dx, 0x701
        in al, dx           # 4, and clears
        mov bl, al
        in al, dx
        shl al, 4
        add al, bl
        add al, cl
        mov dx, 0x705
        add al, 0x40
        mov ah, al
        in al, dx           # a byte of TOTAL: 0
        add al, ah
    """
    adder = Adder()
    outcome = await run(tmp_path, core, source, lambda: adder)
    assert outcome.code == 7 + 4 + 0x40
    assert adder.total == 7
    assert adder.log == ["attached", ("seen", 1, 1), "closed"]


class Memory(vmm.Peripheral):
    """Plain accesses of every width, in memory."""

    space = "mmio"
    address = 0x20_0000
    size = 16

    def __init__(self) -> None:
        self.accesses: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(bytes(range(offset, offset + size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


async def test_plain_accesses_in_memory(tmp_path: Path, core: Any) -> None:
    source = "mov eax, [0x200004]\nmov [0x20000A], ax\nmov byte ptr [0x20000F], 0x99\nmov eax, 1\n"
    path = tmp_path / "code"
    path.write_bytes(assemble(source + END, 0x10_0000, 32))
    memory = Memory()
    async with vmm.VirtualMachine(
        core=core, platform="bare", memory="2M", timeout=60, devices={"memory": lambda: memory},
        flat={"path": path, "load": 0x10_0000, "mode": "protected"},
    ) as machine:  # fmt: skip
        assert machine.device("memory") is memory
        assert (await machine.run()).code == 1
    assert memory.accesses == [("read", 4, 4), ("write", 10, 2, 0x0504), ("write", 15, 1, 0x99)]


class Bell(vmm.Peripheral):
    """A write raises or lowers the line, or makes an edge."""

    address, size, gsi = PORT, 1, 5

    def write(self, offset: int, size: int, value: int) -> None:
        if value == 2:
            self.pulse()
        else:
            self.interrupt(bool(value))


async def test_interrupts_reach_the_guest(tmp_path: Path, core: Any) -> None:
    """Three edges by the PIC: one of a level, two of pulses."""
    initialize = "".join(
        f"mov al, {value}\nout {port}, al\n"
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xDF))
    )
    wait = "sti\nhlt\ncli\n"
    steps = ((1, wait), (1, ""), (0, ""), (2, wait), (2, wait))
    ring = "".join(f"mov dx, 0x700\nmov al, {value}\nout dx, al\n{then}" for value, then in steps)
    source = f"""
        cli
        xor ax, ax
        mov ds, ax
        mov word ptr [0x25 * 4], offset handler
        mov word ptr [0x25 * 4 + 2], 0
        xor bl, bl
        {initialize}
        {ring}
        mov al, bl
        out 0xF4, al
        hlt
    handler:
        inc bl
        push ax
        mov al, 0x20
        out 0x20, al
        pop ax
        iret
    """
    assert (await run(tmp_path, core, source, Bell)).code == 3


class Raises(vmm.Peripheral):
    address, size = PORT, 4

    def read(self, offset: int, size: int) -> int:
        return {}["missing"]  # type: ignore[no-any-return]


class ReturnsText(vmm.Peripheral):
    address, size = PORT, 4

    def read(self, offset: int, size: int) -> int:
        return "21"  # type: ignore[return-value]


class ReturnsTooMuch(vmm.Peripheral):
    address, size = PORT, 4

    def registers(self) -> Iterable[vmm.Register]:
        return [vmm.Register("R", 0, read=lambda: 256)]


class ReturnsNothing(vmm.Peripheral):
    address, size = PORT, 4

    def registers(self) -> Iterable[vmm.Register]:
        return [vmm.Register("R", 0, 4, read=lambda: None)]  # type: ignore[arg-type, return-value]


class OnlyWrites(vmm.Peripheral):
    address, size = PORT, 4


class FailsInPosted(vmm.Peripheral):
    address, size, posted = PORT, 4, ((0, 1),)

    def write(self, offset: int, size: int, value: int) -> None:
        raise OSError(5, "Input/output error")


class BlamesTheGuest(vmm.Peripheral):
    address, size = PORT, 4

    def read(self, offset: int, size: int) -> int:
        raise vmm.GuestError("the guest may not ask that")


@pytest.mark.parametrize(
    ("kind", "reason", "detail"),
    [
        (Raises, "host error", "device 'own' (Raises): KeyError: 'missing' (test_peripheral.py:"),
        (ReturnsText, "host error", "device 'own' (ReturnsText): a read of 1 bytes at offset 0x0 returned '21', not a"),
        (ReturnsTooMuch, "host error", "(ReturnsTooMuch): a read of 1 bytes at offset 0x0 returned 256, not a number"),
        (ReturnsNothing, "host error", "device 'own' (ReturnsNothing): TypeError"),
        (OnlyWrites, "host error", "device 'own' (OnlyWrites): NotImplementedError (peripheral.py:"),
        (FailsInPosted, "host error", "device 'own' (FailsInPosted): OSError: [Errno 5] Input/output error ("),
        (BlamesTheGuest, "guest error", "the guest may not ask that"),
    ],
)
async def test_a_mistake_names_the_device_its_class_and_the_line(
    tmp_path: Path, kind: type[vmm.Peripheral], reason: str, detail: str
) -> None:
    source = "mov dx, 0x700\nmov al, 1\nout dx, al\nin al, dx\n"
    if kind is not FailsInPosted:
        source = source.replace("out dx, al\n", "")
    outcome = await run(tmp_path, "soft", source, kind)
    assert outcome.reason.value.replace("-", " ").replace("_", " ") == reason
    assert detail in outcome.detail


def make(**values: Any) -> type[vmm.Peripheral]:
    return type("Wrong", (vmm.Peripheral,), values)


def broken() -> vmm.Peripheral:
    raise ValueError("no such sensor")


@pytest.mark.parametrize(
    ("device", "error"),
    [
        (make(size=4), r"device 'own' \(Wrong\): has no address"),
        (make(address=0x3F8, size=4), r"own \(Wrong\): port range 0x3f8\+0x4 overlaps com1"),
        (make(address=PORT, size=4, space="disk"), "space 'disk' is neither 'port' nor 'mmio'"),
        (make(address=PORT, size=4, gsi=24), "GSI 24 is outside 0 to 23"),
        (make(address=PORT, size=4, posted=((2, 4),)), r"4 bytes at offset 0x2 are not one register"),
        (lambda: 7, "devices: 'own': made 7, which is neither a virtio Device nor a vmm.Peripheral"),
        (7, "devices: 'own': 7 is no function that makes a device"),
        (broken, r"device 'own': ValueError: no such sensor \(test_peripheral.py:"),
    ],
)
async def test_what_cannot_be_put_onto_a_machine(tmp_path: Path, device: Any, error: str) -> None:
    with pytest.raises(vmm.VmmError, match=error):
        await run(tmp_path, "soft", "", device)


async def test_it_outlives_reboots_which_reset_it(tmp_path: Path) -> None:
    """The first boot writes 9 and resets, the second finds 0."""
    source = """
        mov dx, 0x704
        in eax, dx
        mov bl, al
        mov eax, 9
        out dx, eax
    """
    adder = Adder()
    resets: list[int] = []

    class Switch(vmm.Peripheral):
        """The second read of it ends the machine instead of resetting it."""

        address, size = PORT + 0x10, 1

        def read(self, offset: int, size: int) -> int:
            resets.append(adder.total)
            return 0 if len(resets) < 2 else 1

    source += "mov dx, 0x710\nin al, dx\ncmp al, 1\nje last\nmov al, 0xFE\nout 0x64, al\nhlt\nlast: mov al, bl\n"
    async with vmm.VirtualMachine(
        core="soft", memory="2M", timeout=60, reboot=True, platform="bare", flat=flat(tmp_path, source),
        devices={"adder": lambda: adder, "switch": Switch},
    ) as machine:  # fmt: skip
        assert (await machine.run()).code == 0
    assert resets == [9, 9]
    assert adder.log == ["attached", "reset", "attached", "closed"]


def test_its_state_is_saved_checked_and_restored() -> None:
    first = Seat(Pc(), "own", Adder())
    first.device.total = 41  # type: ignore[attr-defined]
    saved = encode(first.save())
    second = Seat(Pc(), "own", Adder())
    second.restore(decode(second, "own", saved))
    assert second.device.total == 41  # type: ignore[attr-defined]
    saved["fields"]["total"] = -1
    with pytest.raises(vmm.StateError, match="total"):
        decode(second, "own", saved)


def test_without_a_declared_state_a_machine_is_not_saved() -> None:
    with pytest.raises(vmm.StateError, match=r"device 'own' \(Bell\): declares no state_type"):
        Seat(Pc(), "own", Bell()).save()


def test_a_state_of_another_kind_is_told() -> None:
    class Wrong(Adder):
        def save(self) -> AdderState:
            return 41  # type: ignore[return-value]

    with pytest.raises(vmm.HostError, match=r"\(Wrong\): save\(\) returned 41, not a AdderState"):
        Seat(Pc(), "own", Wrong()).save()
