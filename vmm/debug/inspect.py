"""What a vCPU holds and what it did last, as JSON-like values and as text for people. vCPUs must be parked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cpu.contract import Segment, Vcpu
from cpu.debug import PastExit, TraceKind
from cpu.errors import CpuError
from cpu.exits import MmioRead, MmioWrite, PortIn, PortOut
from cpu.state import MP_STATES
from cpu.views import StateKind
from vmm.errors import GuestError
from vmm.machine.memory import GuestMemory

InspectedVcpu = Vcpu
MSRS = {
    "tsc": 0x10, "apic_base": 0x1B, "pat": 0x277, "mtrr_def_type": 0x2FF, "star": 0xC000_0081, "lstar": 0xC000_0082,
    "cstar": 0xC000_0083, "sfmask": 0xC000_0084, "kernel_gs_base": 0xC000_0102, "tsc_aux": 0xC000_0103,
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "misc_enable": 0x1A0,
    "kvm_wall_clock": 0x4B56_4D00, "kvm_system_time": 0x4B56_4D01,
}  # fmt: skip
GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
    "rflags",
)  # fmt: skip
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_FLAGS = (
    "CF", "", "PF", "", "AF", "", "ZF", "SF", "TF", "IF", "DF", "OF", "", "", "NT", "", "RF", "VM", "AC", "VIF", "VIP",
    "ID",
)  # fmt: skip
_BITS = {
    "cr0": {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW", 30: "CD", 31: "PG"},
    "cr4": {
        0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE", 9: "OSFXSR",
        10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE", 20: "SMEP", 21: "SMAP",
    },
    "efer": {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE"},
}  # fmt: skip
_TIMER_MODES = ("one-shot", "periodic", "tsc-deadline", "reserved")


def _mp_state(vcpu: Vcpu) -> str:
    number = int.from_bytes(vcpu.get_blob(StateKind.MP), "little")
    return MP_STATES[number] if number < len(MP_STATES) else str(number)


def mode_of(cr0: int, efer: int, rflags: int, cs: Segment) -> str:
    """The processor's mode, as the manuals name it, with the width of its code."""
    if not cr0 & 1:
        return "real mode"
    if rflags & 1 << 17:
        return "virtual-8086 mode"
    if efer & 1 << 10:
        return "64-bit mode" if cs.l else f"compatibility mode, {32 if cs.db else 16}-bit"
    return f"protected mode, {32 if cs.db else 16}-bit"


def activity(vcpu: Vcpu) -> str:
    """A few words for lists: what it does, in which mode."""
    state = _mp_state(vcpu)
    if state in ("uninitialized", "init-received"):
        return "not started"
    system, general = vcpu.system_registers(), vcpu.registers()
    what = "halted" if state == "halted" else "running"
    mode = mode_of(system.cr0, system.efer, general.rflags, system.cs)
    return f"{what}, CPL {system.ss.dpl if system.cr0 & 1 else 0}, {mode}"


def _lapic(page: bytes) -> dict[str, Any]:
    """The registers that say what a LAPIC waits for (SDM vol. 3, 11.4.1)."""

    def register(at: int) -> int:
        return int.from_bytes(page[at : at + 4], "little")

    def vectors(at: int) -> list[int]:
        return [word * 32 + bit for word in range(8) for bit in range(32) if register(at + word * 16) >> bit & 1]

    timer = register(0x320)
    return {
        "id": register(0x20) >> 24,
        "enabled": bool(register(0xF0) & 0x100),
        "tpr": register(0x80),
        "in_service": vectors(0x100),
        "requested": vectors(0x200),
        "timer": {
            "vector": timer & 0xFF,
            "masked": bool(timer & 1 << 16),
            "mode": _TIMER_MODES[timer >> 17 & 3],
            "initial": register(0x380),
            "current": register(0x390),
        },
    }


def registers(vcpu: Vcpu) -> dict[str, Any]:
    """Everything of a vCPU that debugging asks for. MSRs that the core does not have are left out."""
    general, system = vcpu.registers(), vcpu.system_registers()
    get = vcpu.get_blob
    debug = get(StateKind.DEBUGREGS)
    words = [int.from_bytes(debug[at : at + 8], "little") for at in range(0, 48, 8)]
    msrs: dict[str, int] = {}
    for name, index in MSRS.items():
        try:
            msrs[name] = vcpu.msr(index)
        except CpuError:
            continue
    return {
        "cpu": vcpu.index,
        "activity": _mp_state(vcpu),
        "mode": mode_of(system.cr0, system.efer, general.rflags, system.cs),
        "cpl": system.ss.dpl if system.cr0 & 1 else 0,
        "pc": pc(vcpu),
        "general": {name: getattr(general, name) for name in GENERAL},
        "segments": {name: _segment(getattr(system, name)) for name in SEGMENTS},
        "tables": {"gdt": _table(system.gdt), "idt": _table(system.idt)},
        "control": {name: getattr(system, name) for name in CONTROL},
        "debug": {**{f"dr{n}": words[n] for n in range(4)}, "dr6": words[4], "dr7": words[5]},
        "msrs": msrs,
        "lapic": _lapic(get(StateKind.LAPIC)),
    }


def _segment(segment: Segment) -> dict[str, int]:
    return {name: getattr(segment, name) for name in segment.__match_args__}


def _table(table: tuple[int, int]) -> dict[str, int]:
    return {"base": table[0], "limit": table[1]}


def _bits(name: str, value: int) -> str:
    names = " ".join(text for bit, text in _BITS[name].items() if value >> bit & 1)
    return f"[{names}]" if names else ""


def text(found: Mapping[str, Any]) -> str:
    """registers() for people."""
    general, control = found["general"], found["control"]
    flags = " ".join(name for bit, name in enumerate(_FLAGS) if name and general["rflags"] >> bit & 1)
    lines = [f"vCPU {found['cpu']}: {found['activity']}, CPL {found['cpl']}, {found['mode']}"]
    for at in range(0, 16, 4):
        lines.append("  " + "  ".join(f"{name:>3} {general[name]:016x}" for name in GENERAL[at : at + 4]))
    lines.append(f"  rip {general['rip']:016x}  rflags {general['rflags']:08x} [{flags}]")
    for name, segment in found["segments"].items():
        if segment["unusable"] or not segment["present"]:
            lines.append(f"  {name:<3} {segment['selector']:04x} base {segment['base']:016x}  unusable")
            continue
        lines.append(
            f"  {name:<3} {segment['selector']:04x} base {segment['base']:016x} limit {segment['limit']:08x} "
            f"type {segment['type']:x} dpl {segment['dpl']}"
            f"{' L' if segment['l'] else ''}{' D' if segment['db'] else ''}"
        )
    for name, table in found["tables"].items():
        lines.append(f"  {name}      base {table['base']:016x} limit {table['limit']:08x}")
    for name in ("cr0", "cr4", "efer"):
        lines.append(f"  {name:<4} {control[name]:016x} {_bits(name, control[name])}".rstrip())
    lines.append(f"  cr2  {control['cr2']:016x}  cr3 {control['cr3']:016x}  cr8 {control['cr8']:x}")
    debug = found["debug"]
    lines.append("  " + "  ".join(f"{name} {value:x}" for name, value in debug.items()))
    names = list(found["msrs"])
    for at in range(0, len(names), 3):
        lines.append("  " + "  ".join(f"{name} {found['msrs'][name]:x}" for name in names[at : at + 3]))
    lapic = found["lapic"]
    timer = lapic["timer"]
    lines.append(
        f"  lapic id {lapic['id']} {'enabled' if lapic['enabled'] else 'disabled'}, tpr {lapic['tpr']:#x}, "
        f"in service {_vectors(lapic['in_service'])}, requested {_vectors(lapic['requested'])}"
    )
    lines.append(
        f"  lapic timer vector {timer['vector']:#x}{' masked' if timer['masked'] else ''}, {timer['mode']}, "
        f"{timer['current']} of {timer['initial']}"
    )
    return "\n".join(lines) + "\n"


def _vectors(numbers: list[int]) -> str:
    return ", ".join(f"{number:#x}" for number in numbers) or "none"


def exits(vcpu: Vcpu) -> dict[str, Any]:
    """The last exits of a vCPU, the oldest first."""
    return {"cpu": vcpu.index, "exits": [_exit(each) for each in vcpu.past_exits()]}


def _exit(each: PastExit) -> dict[str, Any]:
    name = {PortIn: "port-in", PortOut: "port-out", MmioRead: "mmio-read", MmioWrite: "mmio-write"}.get(each.kind)
    values: dict[str, Any] = {"kind": name or each.kind.__name__.lower(), "address": each.address}
    if name:
        values |= {"size": each.size, "value": each.value, "by": "core" if each.core else "loop"}
    values |= {"times": each.repeats, "ago_ns": each.age_ns}
    if each.waits:
        values["waits"] = True
    return values


def exits_text(found: Mapping[str, Any]) -> str:
    """exits() for people."""
    lines = [f"vCPU {found['cpu']}: the last exits"]
    for each in found["exits"]:
        what = f"{each['kind']:<10} {each['address']:#x}"
        if "size" in each:
            what += f" {'=' if 'read' in each['kind'] or 'in' in each['kind'].split('-') else '<-'} "
            what += "?" if each.get("waits") else f"{each['value']:#0{2 * each['size'] + 2}x}"
            what += " (core)" if each["by"] == "core" else ""
        if each["times"] > 1:
            what += f", {each['times']} times"
        waits = "  waits for its answer" if each.get("waits") else ""
        lines.append(f"  {each['ago_ns'] / 1e6:12.3f} ms ago  {what}{waits}")
    if not found["exits"]:
        lines.append("  none")
    return "\n".join(lines) + "\n"


def trace(vcpu: Vcpu) -> dict[str, Any]:
    """What a vCPU executed while a trace was kept, the oldest first."""
    entries = [
        {"kind": each.kind.name.lower(), "address": each.address, "instructions": each.instructions}
        | ({"vector": each.count} if each.kind is TraceKind.EVENT else {"times": each.count})
        for each in vcpu.trace()
    ]
    return {"cpu": vcpu.index, "trace": entries}


def pc(vcpu: Vcpu) -> int:
    """The linear address of a vCPU's next instruction."""
    general, system = vcpu.registers(), vcpu.system_registers()
    if system.efer & 1 << 10 and system.cs.l:
        return general.rip
    return system.cs.base + general.rip & 0xFFFF_FFFF


def handlers(vcpu: Vcpu, memory: GuestMemory) -> dict[str, int]:
    """Where the IDT of a vCPU in long mode leads, by vector, of those vectors that every kernel handles: #DE, #UD, #GP,
    #PF (APM vol. 2, 4.8.4). Tells where a kernel runs."""
    system, found = vcpu.system_registers(), dict[str, int]()
    if not system.efer & 1 << 10:
        return found
    base, limit = system.idt
    for vector in (0, 6, 13, 14):
        linear = base + 16 * vector
        gpa = vcpu.translate(linear) if 16 * vector + 15 <= limit and linear < 1 << 64 else None
        if gpa is None or linear % 4096 > 4080:
            continue
        try:
            gate = memory.read(gpa, 16)
        except GuestError:
            continue
        low, middle, high = (int.from_bytes(gate[a:b], "little") for a, b in ((0, 2), (6, 8), (8, 12)))
        if gate[5] & 0x80:
            found[str(vector)] = low | middle << 16 | high << 32
    return found


def trace_text(found: Mapping[str, Any], name: Callable[[int], str]) -> str:
    """What trace() or samples found, for people; `name` gives an address its symbol."""
    lines = [f"vCPU {found['cpu']}: {found['does']}, at {found['pc']:#x} {name(found['pc'])}".rstrip()]
    for each in found.get("samples", ()):
        lines.append(f"  {each['times']:6} times at {each['address']:#018x} {name(each['address'])}".rstrip())
    for each in found.get("trace", ()):
        what = f"{each['instructions']:14}  {each['address']:#018x} {name(each['address'])}".rstrip()
        if each["kind"] == "event":
            what += f"  <- vector {each['vector']:#x}"
        elif each["times"] > 1:
            what += f"  {each['times']} times"
        lines.append(f"  {what}")
    return "\n".join(lines) + "\n"
