"""Random programs about when NMIs, interrupts and traps are taken: images like tests/conformance/roms, from a seed.

A step is a row of instructions that send NMIs and interrupts to the processor itself, block and unblock them, fault,
trap and halt, at CPL 0 and CPL 3, in the main program and in handlers, nested. While a step is made a model executes it
by the manuals' rules, so what every entry of a handler must print is known:

- NMIs are blocked from the delivery of one until the next IRET, also one that faults ("An execution of the IRET
  instruction unblocks NMIs even if the instruction causes a fault", SDM vol. 3, 6.7.1), of any CPL, in any handler; not
  by INT 2 (SDM vol. 3, 6.7), nor until a return without IRET. Meanwhile one more is pending (SDM vol. 3, 6.7.1).
- Between two instructions: traps of the one before, then NMIs, then interrupts (SDM vol. 3, table 6-2; APM vol. 2,
  8.5).
- STI, where it sets IF, holds interrupts for one instruction more (SDM vol. 2, STI), MOV SS also single steps (SDM
  vol. 3, 6.8.3).
- HLT is ended by an NMI and by an interrupt that is not masked, whose frames lead behind it (SDM vol. 2, HLT).
- A single step trap is taken after the instruction that began with TF set, IRET included (SDM vol. 3, 18.3.1.4), but
  not after INT or an instruction that faulted.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.program_maker import ProgramMaker
from tests.fuzz.system_programs import CANONICAL, UCODE64, UDATA

ALIAS = 0x80_0000
USTACK = 0x18000
UNMAPPED = 0x4000_0000
MAIN, DEEPEST, MOST_ENTRIES = 12, 4, 14
NMI, DB, UD, GP, PF, IRQ, SOFTWARE = 2, 1, 6, 13, 14, 0x50, 0x90
LATE = "STI puts off no single step, and MOV SS by one instruction alone (SDM vol. 3, 6.8.3)"
GATES = (NMI, DB, UD, GP, PF, IRQ, SOFTWARE)
NMI_SENT = ((0, 0x4400), (0, 0x4400), (0x0100_0000, 0x4C00))
"""(ICR's upper half, its lower one): an NMI to the APIC whose ID is 0, and to its logical name."""
IRQ_SENT = ((0, 0x4050), (0, 0x44050), (0x0100_0000, 0x4850))
SLED = ("{0}: jmp 1f", "{1}: 1: jmp 1f", "{2}: 1: nop", "{3}: nop")
"""Behind what sends to the processor itself: it arrives within a few instructions. Each place counts as the end."""

Instruction = Callable[[list[str], str, int], None]
"""Appends its code to (the program's or a body's lines), whose end is (a place), in a handler of (this depth, or 0)."""


class NmiMaker(ProgramMaker):
    """Programs of 64-bit mode with the local APIC, IOAPIC and PIT."""

    PRELUDE = '.include "windows.inc"\n'
    """tests/conformance/roms/windows.inc"""
    STEPS = 20

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(seed)
        # The model's state.
        self.cpl = 0
        self.interrupts = self.stepping = False
        """IF and TF."""
        self.blocked = self.nmi = self.irq = False
        """NMIs are blocked; one is pending; an interrupt is pending."""
        self.traps = False
        """There may be single steps."""
        self.trap_gates: set[int] = set()
        # What has been made of this step.
        self.entries = 0
        self.places = 0
        self.labels: list[tuple[str, int]] = []
        self.bodies: list[list[str]] = []
        self.lines: list[str]
        self.make(steps, [self.windows])
        self.add('SAY "end\\n"', "EXIT 0")

    def begin(self, name: str) -> None:
        self.add(f"/* {self.number}: {name} */")
        self.add(f"lea rdx, [rip + labels{self.number}]", f"lea rdi, [rip + bodies{self.number}]", "call fresh")
        self.add(*(f"PUTC64 '{char}'" for char in f"@{self.number} {name}"), "PUTC64 10")

    # The program: places, and code at the end of the main program or of the body that is being made.

    def place(self) -> str:
        """The next place of the step: a label of its own, and what a handler prints of it."""
        self.places += 1
        number = self.places
        label = f"p{self.number}_{number}"
        self.labels.append((label, number))
        return label

    def also(self, place: str) -> str:
        """One more label of the same place."""
        label = self.new()
        self.labels.append((label, self.number_of(place)))
        return label

    def number_of(self, place: str) -> int:
        return next(number for label, number in self.labels if label == place)

    def windows(self) -> None:
        self.cpl, self.interrupts, self.stepping = 0, False, False
        self.blocked = self.nmi = self.irq = False
        self.labels, self.bodies, self.places, self.entries = [], [], 0, 0
        self.here = ""
        self.expected[self.number] = ["windows"]
        self.traps = self.often(40)
        self.trap_gates = {vector for vector in GATES if self.often(25)}
        for vector in GATES:
            dpl = 0x60 if vector == SOFTWARE else 0
            kind = 0x8F if vector in self.trap_gates else 0x8E
            self.add(f"mov byte ptr [IDT + {vector} * 16 + 5], {dpl | kind:#x}")
        self.play(self.lines, self.place(), self.chance.randrange(4, MAIN), 0)
        self.add(".pushsection .rodata", ".balign 8", f"labels{self.number}:")
        self.add(*(f".quad {label}, {number}" for label, number in self.labels), ".quad 0")
        self.add(f"bodies{self.number}:", *(f".quad b{self.number}_{at}" for at in range(len(self.bodies))))
        self.add(*[".quad body_end"] * (31 - len(self.bodies)), ".popsection")
        after = self.new()
        self.add(f"jmp {after}")
        for at, body in enumerate(self.bodies):
            self.add(f"b{self.number}_{at}:", *body)
        self.add(f"{after}:")

    # The model.

    def play(self, out: list[str], here: str, count: int, depth: int) -> None:
        """Make and execute `count` instructions, and more as long as something must follow."""
        out.append(f"{here}:")
        while count > 0 or self.stepping or (depth == 0 and (self.cpl or self.nmi or self.irq or self.blocked)):
            there = self.place()
            choices = self.choices(depth)
            if count <= 0 and not self.stepping and depth == 0:  # the step ends as it began
                choices = [self.to_kernel] if self.cpl else [self.iret]
            self.here = here
            self.chance.choice(choices)(out, there, depth)
            out.append(f"{there}:")
            self.between(there, depth)
            here = there
            count -= 1

    def choices(self, depth: int) -> list[Instruction]:
        """What may come next."""
        few = self.entries < MOST_ENTRIES and depth < DEEPEST
        if self.stepping:
            single: list[Instruction] = [self.nop, self.move_ss]
            if few:
                single += [self.software, self.undefined]
            if not self.cpl:
                single += [self.cli] if self.irq else [self.cli, self.sti]
            return single
        found: list[Instruction] = [self.nop, self.iret, self.move_ss]
        if few:
            found += [self.send_nmi, self.send_nmi, self.send_irq, self.software, self.undefined, self.bad_iret]
            found += [self.step, self.step_iret] if self.traps else []
        if self.cpl:
            return [*found, self.to_kernel]
        found += [self.cli, self.sti, self.set_if]
        if few:
            found += [self.int_2, self.halt]
            if not self.interrupts and not self.blocked and self.often(10):
                found += [self.halt_for_nmi]
        if depth == 0:
            found += [self.to_user]
        return found

    def between(self, place: str, depth: int, *, name: str = "") -> None:
        """Between two instructions, with `place` the next one: what is pending is taken."""
        name = name or f"{self.number_of(place):02x}"
        while True:
            if self.nmi and not self.blocked:
                self.enter(NMI, name, depth)
            elif self.irq and self.interrupts:
                self.enter(IRQ, name, depth)
            else:
                return

    def enter(self, vector: int, name: str, depth: int, *, software: bool = False) -> None:
        """A handler is entered, does something, and comes back."""
        line = f"{vector:02x} {name} {self.cpl} {self.interrupts << 1 | self.stepping}"
        self.entries += 1
        before = self.cpl, self.interrupts, self.stepping and vector != DB
        self.cpl, self.stepping = 0, False
        self.interrupts = self.interrupts and vector in self.trap_gates
        if vector == NMI and not software:
            self.blocked, self.nmi = True, False
        elif vector == IRQ:
            self.irq = False
        self.between("", depth + 1, name=f"h{vector:02x}")
        self.expected[self.number].append(line)
        body: list[str] = []
        self.bodies.append(body)
        self.play(body, self.place(), self.chance.choice((0, 0, 1, 2, 3)), depth + 1)
        if not before[0] and not before[2] and self.often(15):
            body.append("jmp body_leave")
            self.cpl, self.interrupts, self.stepping = before[0], False, before[2]
        else:
            body.append("jmp body_end")
            self.cpl, self.interrupts, self.stepping = before
            self.blocked = False

    def trap(self, stepped: bool, place: str, depth: int) -> None:
        """The instruction before `place` is done; TF was set when it began."""
        if stepped:
            self.enter(DB, f"{self.number_of(place):02x}", depth)

    # Instructions: each adds its code and does in the model what it does.

    def nop(self, out: list[str], there: str, depth: int) -> None:
        out.append("nop")
        self.trap(self.stepping, there, depth)

    def move_ss(self, out: list[str], there: str, depth: int) -> None:
        out += [f"mov ss, {'r11d' if self.cpl else 'r10d'}", "nop"]
        if self.stepping:
            self.differs(LATE)
        self.trap(self.stepping, there, depth)

    def cli(self, out: list[str], there: str, depth: int) -> None:
        out.append("cli")
        self.interrupts = False
        self.trap(self.stepping, there, depth)

    def sti(self, out: list[str], there: str, depth: int) -> None:
        out.append("sti")
        if self.stepping and not self.interrupts:
            self.differs(LATE)
        if not self.interrupts and not self.stepping:
            out.append("nop")  # is in its shadow
        self.interrupts = True
        self.trap(self.stepping, there, depth)

    def set_if(self, out: list[str], there: str, depth: int) -> None:
        out.append("OR_FLAGS 0x200")
        self.interrupts = True

    def step(self, out: list[str], there: str, depth: int) -> None:
        out.append("OR_FLAGS 0x100")
        self.set_stepping()

    def set_stepping(self) -> None:
        self.stepping = True
        if self.interrupts:
            self.differs(LATE)

    def send(self, out: list[str], there: str, sent: tuple[int, int]) -> None:
        labels = [self.also(there) for _ in SLED]
        out += [f"LW 0x310, {sent[0]:#x}", f"LW 0x300, {sent[1]:#x}", *(line.format(*labels) for line in SLED)]

    def send_nmi(self, out: list[str], there: str, depth: int) -> None:
        self.send(out, there, self.chance.choice(NMI_SENT))
        self.nmi = True

    def send_irq(self, out: list[str], there: str, depth: int) -> None:
        self.send(out, there, self.chance.choice(IRQ_SENT))
        self.irq = True

    def software(self, out: list[str], there: str, depth: int) -> None:
        out.append(f"int {SOFTWARE:#x}")
        self.enter(SOFTWARE, f"{self.number_of(there):02x}", depth, software=True)

    def int_2(self, out: list[str], there: str, depth: int) -> None:
        out.append("int 2")
        self.enter(NMI, f"{self.number_of(there):02x}", depth, software=True)

    def undefined(self, out: list[str], there: str, depth: int) -> None:
        out.append("ud2")
        self.enter(UD, f"{self.number_of(self.here):02x}", depth)

    def frame(self, flags: int, there: str, *, cs: str = "") -> list[str]:
        """Code that pushes what IRET takes to `there`, at the present CPL."""
        return [
            "mov rax, rsp", "mov ecx, ss", "push rcx", "push rax", f"push {flags:#x}",
            *([f"push {cs}"] if cs else ["mov ecx, cs", "push rcx"]), f"lea rax, [rip + {there}]", "push rax",
        ]  # fmt: skip

    def iret(self, out: list[str], there: str, depth: int) -> None:
        """To the next instruction."""
        flags = 2 | (0x200 if self.often(50) or self.irq else 0) | (0x100 if self.traps and self.often(15) else 0)
        if self.entries >= MOST_ENTRIES:
            flags &= ~0x100
        out += [*self.frame(flags, there), "iretq"]
        if not self.cpl:
            self.interrupts = bool(flags & 0x200)
        self.blocked = False
        if flags & 0x100:
            self.set_stepping()

    def step_iret(self, out: list[str], there: str, depth: int) -> None:
        """IRET with TF set is an instruction that is stepped over."""
        out += [*self.frame(2, there), "OR_FLAGS 0x100", "iretq"]
        if self.interrupts:
            self.differs(LATE)
        self.interrupts = self.interrupts and self.cpl == 3
        self.blocked = False
        self.trap(True, there, depth)

    def bad_iret(self, out: list[str], there: str, depth: int) -> None:
        """It faults, and the handler goes on behind it."""
        here, ways = self.place(), ["null", "nested", "null", "nested", "canonical", *["unmapped"] * (self.cpl == 3)]
        what = self.one(*ways)
        out += [f"lea r8, [rip + {there}]", "mov r9, rsp"]
        if what == "null":
            out += self.frame(2, there, cs="0")
        else:
            out += self.frame(2, there)
        if what == "canonical":
            out += ["mov rax, 0x800000000000", "mov [rsp], rax"]
            self.differs(CANONICAL)
        elif what == "nested":
            out += ["OR_FLAGS 0x4000"]
        elif what == "unmapped":
            out += [f"mov esp, {UNMAPPED:#x}"]
        out.append(f"{here}: iretq")
        if self.blocked:
            self.differs("IRET unblocks NMIs also where it faults (SDM vol. 3, 6.7.1)")
        self.blocked = False
        self.enter(PF if what == "unmapped" else GP, f"{self.number_of(here):02x}", depth)

    def halt(self, out: list[str], there: str, depth: int) -> None:
        """Until an interrupt, which is pending already or is the timer's."""
        if self.nmi and self.blocked:
            self.differs("an NMI that is blocked does not end HLT (SDM vol. 3, 6.7.1)")
        out.append("cli")
        if not self.irq:
            out.append("LW 0x380, 5000")
        out += ["sti", "hlt"]
        self.irq = self.interrupts = True

    def halt_for_nmi(self, out: list[str], there: str, depth: int) -> None:
        """Until the PIT's NMI, with interrupts off."""
        out += ["PIT_ONCE", "hlt"]
        self.nmi = True

    def to_user(self, out: list[str], there: str, depth: int) -> None:
        flags = 2 | (0x200 if self.often(70) else 0)
        out += [f"push {UDATA:#x}", f"push {USTACK:#x}", f"push {flags:#x}", f"push {UCODE64:#x}"]
        out += [f"lea rax, [rip + {there} + {ALIAS:#x}]", "push rax", "iretq"]
        self.cpl, self.interrupts, self.blocked = 3, bool(flags & 0x200), False

    def to_kernel(self, out: list[str], there: str, depth: int) -> None:
        out.append("int 0x91")
        self.cpl, self.interrupts = 0, False
