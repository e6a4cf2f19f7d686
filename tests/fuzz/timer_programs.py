"""Random programs about the local APIC's timer: images like tests/conformance/roms, made from a seed.

A step is a row of writes to the timer's registers and looks at what they did, through the APIC's page or in x2APIC
mode. Counts either end soon, and the step waits for it, or last for minutes. A model knows what must be seen (SDM
vol. 3):

- a write to the initial count starts the count, 0 stops it; in TSC-deadline mode it is ignored and the current count
  is 0 (11.5.4, 11.5.4.1);
- changes between one-shot and periodic let a count go on, and start none; those to and from TSC-deadline mode disarm
  the timer, and only in that mode does IA32_TSC_DEADLINE take a value (11.5.4.1);
- a change of the divide configuration leaves the count where it is (11.5.4);
- a masked timer counts and asks for nothing, not even later (11.5.1); an APIC that is switched off by software masks
  it, and it stays so until it is written again (11.4.7.2);
- an interrupt that is pending has the vector of its time, and waits for IF and the processor priority (11.8.3).
"""

from __future__ import annotations

from tests.fuzz.program_maker import ProgramMaker

ONE_SHOT, PERIODIC, DEADLINE = range(3)
DIVISORS = {1: 0xB, 2: 0, 4: 1, 8: 2, 16: 3, 32: 8, 64: 9, 128: 0xA}
SLOW = (32, 64, 128)
"""Divisors with which a long count takes minutes."""
FAR = 1 << 44
"""Cycles of the TSC: hours."""


class TimerMaker(ProgramMaker):
    """Programs of 64-bit mode with the local APIC."""

    PRELUDE = '.include "timer.inc"\n'
    """tests/conformance/roms/timer.inc"""
    STEPS = 60

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(seed)
        self.make(steps, [self.timer, self.timer, self.timer_deadline, self.timer_x2apic])
        self.add('SAY "end\\n"', "EXIT 0")

    def begin(self, name: str) -> None:
        self.add(f"/* {self.number}: {name} */")
        self.add(*(f"PUTC64 '{char}'" for char in f"@{self.number} {name} "))
        self.seen = [name]
        self.modes = (ONE_SHOT, PERIODIC) if name == "timer" else (ONE_SHOT, PERIODIC, DEADLINE)

    def timer(self) -> None:
        self.add("call fresh")
        self.play()
        self.finish()

    def timer_deadline(self) -> None:
        """It has all three modes."""
        without = self.new()
        self.differs("QEMU 7.2's emulation has no TSC-deadline mode")
        self.bochs_differs("Bochs' Ryzen has no TSC-deadline mode")
        self.add("call has_deadline", f"jnc {without}", "call fresh")
        self.play()
        self.add(f"{without}:")
        self.finish()

    def timer_x2apic(self) -> None:
        without = self.new()
        self.differs("QEMU 7.2's emulation has no x2APIC")
        self.bochs_differs("Bochs' Ryzen has no x2APIC")
        self.add("call to_x2apic", f"jnc {without}", "call fresh")
        self.play()
        self.add("call from_x2apic", f"{without}:")
        self.finish()

    def finish(self) -> None:
        self.add("PUTC64 10")
        self.expected[self.number] = [" ".join(self.seen) + " "]

    def forget(self) -> None:
        """The model's state is that of a timer after `fresh`."""
        self.mode, self.masked, self.vector, self.divisor = ONE_SHOT, True, 0x50, 1
        self.counts = self.armed = False
        """A long count goes on; a deadline is set."""
        self.initial: int | None = 0
        """None: what it reads is open."""
        self.pending: set[int] = set()

    def play(self) -> None:
        self.forget()
        kinds = [
            self.write_lvt, self.write_lvt, self.divide, self.start_long, self.stop, self.look, self.look, self.run_out,
            self.take, self.take_by_priority, self.switch_off, self.ticks,
        ]  # fmt: skip
        if DEADLINE in self.modes:
            kinds += [self.set_deadline, self.disarm]
        for _ in range(self.chance.randrange(4, 10)):
            self.chance.choice(kinds)()
        self.look()
        self.take()

    def says(self, token: str) -> None:
        self.seen.append(token)

    def lvt(self) -> int:
        return self.mode << 17 | self.masked << 16 | self.vector

    # What the program does.

    def write_lvt(self) -> None:
        before = self.mode
        self.mode = self.chance.choice(self.modes)
        self.masked, self.vector = self.often(30), self.chance.choice((0x50, 0x60))
        self.add(f"AW 0x320, {self.lvt():#x}")
        if before != self.mode and not self.counts:
            self.differs("a change of mode starts no count (SDM vol. 3, 11.5.4)")
        if (before == DEADLINE) != (self.mode == DEADLINE):
            self.counts = self.armed = False
            self.initial = None

    def divide(self) -> None:
        self.divisor = self.chance.choice(SLOW if self.counts else tuple(DIVISORS))
        if not self.counts:
            self.add(f"AW 0x3E0, {DIVISORS[self.divisor]:#x}")
            return
        why = "a change of the divide configuration leaves the count where it is (SDM vol. 3, 11.5.4)"
        self.differs(why)
        self.bochs_differs(why)
        self.add("AR 0x390", "mov ebx, eax", f"AW 0x3E0, {DIVISORS[self.divisor]:#x}", "AR 0x390")
        # It is at most what it was, and above the half of it.
        self.add("inc ebx", "cmp eax, ebx", "call say_yes", "AR 0x390", "shr ebx", "cmp ebx, eax", "call say_yes")
        self.says("y y")

    def start_long(self) -> None:
        if self.divisor not in SLOW:
            self.divisor = self.chance.choice(SLOW)
            if not self.counts:
                self.add(f"AW 0x3E0, {DIVISORS[self.divisor]:#x}")
        value = self.chance.randrange(1 << 31, 0xFFFF_FFFF)
        self.add(f"AW 0x380, {value:#x}")
        if self.mode != DEADLINE:
            self.counts, self.initial = True, value

    def stop(self) -> None:
        self.add("AW 0x380, 0")
        if self.mode != DEADLINE:
            self.counts, self.initial = False, 0

    def look(self) -> None:
        """At the registers."""
        self.add("AR 0x390", "ZERO", "AR 0x320", "and eax, 0x710FF", "call hex32_64", "PUTC64 ' '")
        self.says("n" if self.counts else "z")
        self.says(f"{self.lvt():08x}")
        if self.initial is not None and self.mode != DEADLINE:
            self.add("AR 0x380", "call hex32_64", "PUTC64 ' '")
            self.says(f"{self.initial:08x}")
        if self.counts:
            self.add("AR 0x380", "mov ebx, eax", "inc rbx", "AR 0x390", "cmp rax, rbx", "call say_yes")
            self.says("y")
        if DEADLINE in self.modes and self.often(50):
            self.add("mov ecx, DEADLINE", "rdmsr", "or eax, edx", "ZERO")
            self.says("n" if self.armed else "z")

    def ask(self) -> None:
        """The timer has come to its end."""
        if not self.masked:
            self.pending.add(self.vector)
            self.add(f"mov r8d, {0x200 + (self.vector >> 5) * 16:#x}", "call requested")
        else:
            self.kvm_differs("a masked timer asks for nothing later, and its deadline ends (SDM vol. 3, 11.5.1)")

    def run_out(self) -> None:
        """A short count, or a deadline that passes."""
        if self.mode == DEADLINE:
            if self.often(50):
                self.add("mov eax, 1", "xor edx, edx", "mov ecx, DEADLINE", "wrmsr")
            else:
                self.add(f"mov eax, {self.chance.randrange(100, 20000)}", "call deadline")
            self.add("call passed")
            self.armed = False
            self.ask()
        elif self.mode == ONE_SHOT:
            value = self.chance.randrange(1, 2000)
            self.add(f"AW 0x380, {value}", "call ended")
            self.counts, self.initial = False, value
            self.ask()

    def ticks(self) -> None:
        """A period that ends three times."""
        if self.mode != PERIODIC or self.masked:
            return
        wait, counter = self.new(), "COUNT" if self.vector == 0x50 else "COUNT60"
        self.take()
        self.add(f"AW 0x380, {self.chance.randrange(2000, 20000)}")
        self.add(f"{wait}: call take", "AR 0x390", f"cmp dword ptr [{counter}], 3", f"jb {wait}", "AW 0x380, 0")
        self.add("call take", "mov dword ptr [COUNT], 0", "mov dword ptr [COUNT60], 0")
        self.counts, self.initial = False, 0

    def set_deadline(self) -> None:
        """Hours away."""
        self.add(f"mov rax, {FAR:#x}", "call deadline")
        self.armed = self.armed or self.mode == DEADLINE

    def disarm(self) -> None:
        self.add("xor eax, eax", "xor edx, edx", "mov ecx, DEADLINE", "wrmsr")
        self.armed = False

    def take(self) -> None:
        """What is pending."""
        self.add("call take", "call say_counts")
        self.says("".join("1" if vector in self.pending else "0" for vector in (0x50, 0x60)))
        self.pending.clear()

    def take_by_priority(self) -> None:
        """What is pending and above the task priority; the rest waits. The priority is written by the APIC's register,
        and not by CR8: QEMU 7.2 is ended by an assertion of its own (tcg_handle_interrupt: qemu_mutex_iothread_locked)
        when a guest of the KVM that it emulates writes CR8 while that KVM waits for an interrupt window."""
        level = self.chance.choice((5, 6))
        self.add(f"AW 0x80, {level << 4:#x}", "call take", "AW 0x80, 0", "call say_counts")
        taken = {vector for vector in self.pending if vector >> 4 > level}
        self.says("".join("1" if vector in taken else "0" for vector in (0x50, 0x60)))
        self.pending -= taken

    def switch_off(self) -> None:
        """By software, with a write to the entry meanwhile, and on again."""
        self.differs("the mask stays when the APIC is switched on again (SDM vol. 3, 11.4.7.2)")
        self.add("AW 0xF0, 0xFF")
        self.masked = True
        if self.often(50):
            self.add(f"AW 0x320, {self.lvt() & ~0x10000:#x}")
        self.add("AR 0x320", "and eax, 0x710FF", "call hex32_64", "PUTC64 ' '", "AW 0xF0, 0x1FF")
        self.says(f"{self.lvt():08x}")
