"""cpu/views.py equals what cpu/layouts.py declares, and both the sizes of the kernel's structures."""

import pytest

from cpu import _core, layouts, views

SIZES = {
    "Regs": 144, "Sregs": 312, "Xsave": 4096, "Xcrs": 392, "Lapic": 1024, "VcpuEvents": 64, "DebugRegs": 128,
    "MpState": 4, "PitState2": 112, "ClockData": 48, "CpuidEntry2": 40, "MsrEntry": 16, "Segment": 24, "DTable": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("view", "declaration"),
    [
        (views.REGS, layouts.Regs),
        (views.SEGMENT, layouts.Segment),
        (views.DTABLE, layouts.DTable),
        (views.SREGS_CONTROL, layouts.SregsControl),
        (views.CPUID_ENTRY, layouts.CpuidEntry2),
        (views.MSRS_HEAD, layouts.MsrsHead),
        (views.MSR_ENTRY, layouts.MsrEntry),
        (views.EXIT, layouts.NativeExit),
    ],
)
def test_a_view_equals_its_declaration(view, declaration):
    derived = layouts.view(declaration)
    blob = bytes(at * 7 % 251 for at in range(view.size))
    assert derived.size == view.size == declaration.sizeof()
    assert derived.unpack(blob) == view.unpack(blob)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_kernels(name):
    assert getattr(layouts, name).sizeof() == SIZES[name]


@pytest.mark.parametrize("chip", [layouts.PIC_MASTER, layouts.PIC_SLAVE, layouts.IOAPIC])
def test_irqchip_round_trips(chip):
    blob = chip.to_bytes(4, "little") + bytes(layouts.IRQCHIP_SIZE - 4)
    assert layouts.Irqchip.build(layouts.Irqchip.parse(blob)) == blob


def test_the_native_exit_has_the_native_size():
    assert views.EXIT.size == _core.EXIT_SIZE


def test_a_declaration_without_fixed_size_has_no_view():
    with pytest.raises((TypeError, AttributeError, ValueError)):
        layouts.view(layouts.Msrs)
