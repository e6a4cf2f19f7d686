"""The same as tests/fuzz/system_programs.py for 32-bit protected mode and virtual-8086 mode, without paging.

Hardware task switching is not there (ARCHITECTURE.md): no step leads to a TSS or a task gate.
"""

from __future__ import annotations

from tests.fuzz.program_maker import ProgramMaker

DATA, CODE32, UDATA, UCODE32 = 0x10, 0x08, 0x23, 0x33
SLOTS = (0x58, 0x60, 0x68, 0x70, 0x78, 0x80)
GATE, LDT, LDT_SELECTOR = 0x88, 0x2800, 0xA0
STACK, USTACK, MEMORY, TSS = 0x7000, 0x18000, 0x20000, 0x3000
PRELUDE = """
.include "prot.inc"
.macro SHOW32 register
    mov eax, \\register
    call hex32
    PUTC ' '
.endm
test_prot:
    mov byte ptr [IDT + 0x81 * 8 + 5], 0xEE
    mov byte ptr [IDT + 3 * 8 + 5], 0xEE
    mov byte ptr [IDT + 4 * 8 + 5], 0xEE
    DESCRIPTOR 0xA0, 0x2800003F, 0x00008200
    mov ax, 0xA0
    lldt ax
    /* where VM86 tasks begin: INT 0x80 in low memory */
    mov dword ptr [0x21000], 0x80CD80CD
    jmp steps
    .balign 16
land:                       /* where transfers lead, in whatever mode */
    int 0x81
    .balign 16
steps:
"""


class LegacyMaker(ProgramMaker):
    """Programs of 32-bit protected mode and virtual-8086 mode."""

    PRELUDE = PRELUDE

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(seed)
        kinds = [
            self.segment,
            self.verify,
            self.far,
            self.back,
            self.gate,
            self.flags,
            self.vm86,
        ]
        self.make(steps, kinds)
        self.add('SAY32 "end\\n"', "mov al, 0", "out 0xF4, al", "hlt")

    def begin(self, name: str) -> None:
        self.add(f"/* {self.number}: {name} */")
        self.add(*(f"PUTC '{char}'" for char in f"@{self.number} {name} "))

    def put(self, address: int, value: int) -> None:
        self.add(f"mov dword ptr [{address:#x}], {value & 0xFFFFFFFF:#x}")
        self.add(f"mov dword ptr [{address + 4:#x}], {value >> 32:#x}")

    def descriptor(self, *, code: bool) -> int:
        """A descriptor of a segment with base 0 and a limit of 4 GiB, mostly one that could be used; no system segment
        that leads to a task switch."""
        kind = self.chance.choice((0x8, 0xA, 0xC, 0xE, 0x9, 0xB)) if code else self.chance.randrange(16)
        system = 0x10 if self.often(90) or code else 0
        if not system:
            kind = self.chance.choice((0, 2, 8, 10, 13))
        access = kind | system | self.chance.choice((0, 0, 3, 3, 1, 2)) << 5 | (0x80 if self.often(85) else 0)
        size = 0x40 if not kind & 4 or kind & 8 else 0x40 * self.often(50)
        return 0xFFFF | access << 40 | (size | 0x8F) << 48

    def selector(self, *, code: bool = False) -> int:
        rpl = self.chance.randrange(4)
        if not self.often(65):
            return self.chance.choice((0, 1, 3, DATA, UDATA, CODE32, UCODE32, 0x3FF8, 0x44, 0xA0))
        if self.often(20):
            index = self.chance.randrange(7)
            self.put(LDT + index * 8, self.descriptor(code=code))
            return index << 3 | 4 | rpl
        slot = self.chance.choice(SLOTS)
        self.put(0x2000 + slot, self.descriptor(code=code))
        return slot | rpl

    def run(self, user: bool, *code: str, flags: int = 2, show: tuple[str, ...] = ()) -> None:
        """Do `code` at CPL 0 or CPL 3; afterwards show registers that it left."""
        after, begin = self.new(), self.new()
        self.add(f"mov dword ptr [RESUME_SP], {STACK:#x}", f"mov esp, {STACK:#x}")
        self.add(f"mov dword ptr [RESUME], offset {after}", *(f"xor {register}, {register}" for register in show))
        if user:
            self.add(f"mov eax, {UDATA:#x}", "mov ds, eax", f"push {UDATA:#x}", f"push {USTACK:#x}", f"push {flags:#x}")
            self.add(f"push {UCODE32:#x}", f"push offset {begin}", "iretd", f"{begin}:")
        elif flags != 2:
            self.add(f"push {flags:#x}", "popfd")
        self.add(*code, "int 0x80", f"{after}:")
        if show:
            self.add(*(f"SHOW32 {register}" for register in show), "PUTC 10")

    # Steps.

    def segment(self) -> None:
        register, value = self.one("ds", "es", "fs", "gs", "ss"), self.selector()
        if register == "ss" or self.often(70):
            code = [f"mov ebx, {value:#x}", f"mov {register}, ebx"]
        elif register in ("fs", "gs"):
            self.put(MEMORY, 0x1234_5678 | value << 32)
            code = [f"l{register} ebx, [{MEMORY:#x}]"]
        else:
            code = [f"push {value:#x}", f"pop {register}"]
        self.run(self.often(50), *code, f"mov edi, {register}", show=("edi",))
        if value & ~7 in SLOTS and not value & 4:
            self.add(f"SHOW32 [{0x2000 + (value & ~7) + 4:#x}]", "PUTC 10")

    def verify(self) -> None:
        instruction = self.one("lar edi, bx", "lsl edi, bx", "verr bx", "verw bx")
        if instruction.startswith("lar"):
            self.differs("bits 19:16 of what LAR loads are undefined, and AMD's have the limit's (SDM vol. 2, LAR)")
        code = [f"mov ebx, {self.selector():#x}", "mov edi, 0x55555555", instruction, "setz cl", "movzx esi, cl"]
        self.run(self.often(50), *code, show=("edi", "esi"))

    def far(self) -> None:
        if self.often(50):
            target = self.selector(code=True)
            kind = self.chance.choice((0xC, 0xC, 0xC, 0xE, 0xF, 0x2))
            access = kind | self.chance.choice((0, 3, 3)) << 5 | (0x80 if self.often(85) else 0)
            parameters = self.chance.choice((0, 0, 1, 31))
            self.add("mov eax, offset land", "mov ebx, eax", "and eax, 0xFFFF", "and ebx, 0xFFFF0000")
            self.add(f"or eax, {target << 16:#x}", f"or ebx, {access << 8 | parameters:#x}")
            self.add(f"mov [{0x2000 + GATE:#x}], eax", f"mov [{0x2000 + GATE + 4:#x}], ebx")
            value = GATE | self.chance.randrange(4)
            self.differs("through a gate to conforming code, too, CS gets CPL as its RPL (SDM vol. 2, CALL)")
        else:
            value = self.selector(code=True)
        self.add(f"mov dword ptr [{MEMORY:#x}], offset land", f"mov word ptr [{MEMORY + 4:#x}], {value:#x}")
        self.run(self.often(60), f"{self.one('jmp', 'call')} fword ptr [{MEMORY:#x}]")

    def back(self) -> None:
        cs, ss = self.selector(code=True), self.selector()
        if self.often(40):
            cs, ss = self.chance.choice(((CODE32, DATA), (UCODE32, UDATA)))
        user = self.often(50)
        flags = 2 | self.chance.choice((0, 0, 0x3000, 0x200, 0x40000, 0x200000, 0x20000))
        if user and flags & 0x20000:
            self.differs("only at CPL 0 does IRET look at VM (SDM vol. 2, IRET)")
        kind = self.one("iretd", "retf")
        push = [f"push {self.selector():#x}" for _ in range(4)] if flags & 0x20000 else []
        push += [f"push {ss:#x}", f"push {USTACK:#x}"] + ([f"push {flags:#x}"] if kind == "iretd" else [])
        target = "0x1000" if flags & 0x20000 and kind == "iretd" and not user else "offset land"
        if target == "0x1000":
            cs = 0x2000  # in VM86: 0x21000
        self.run(user, *push, f"push {cs:#x}", f"push {target}", kind)

    def gate(self) -> None:
        user = self.often(60)
        vector, cause = self.chance.choice(
            ((0x90, "int 0x90"), (0x90, "int 0x90"), (6, "ud2"), (3, "int3"), (0, "div"))
        )
        kind = self.chance.choice((0xE, 0xE, 0xE, 0xF, 0x4, 0xC, 0x2))
        access = kind | self.chance.choice((0, 3, 3)) << 5 | (0x80 if self.often(90) else 0)
        target = CODE32
        if self.often(40):
            slot = self.chance.choice(SLOTS)
            access_code = self.chance.choice((0x9B, 0x99, 0x9A, 0x1B, 0x93, 0xFB))
            self.put(0x2000 + slot, 0xFFFF | access_code << 40 | 0xCF << 48)
            target = slot | self.chance.randrange(4)
            if access_code == 0xFB and user:
                access_code, target = 0, 0  # its handler would be at CPL 3, where it cannot print
        at = 0x1000 + vector * 8
        if user and self.often(40):  # to CPL 1 on a stack of its own; the stack of CPL 0 must be good, for what faults
            slot = self.chance.choice(SLOTS)
            stack = self.selector()
            self.put(0x2000 + slot, 0xFFFF | 0xBB << 40 | 0xCF << 48)
            self.add(f"mov dword ptr [{TSS + 16:#x}], {stack:#x}")
            target = slot | self.chance.randrange(4)
        self.add(f"mov ebp, [{at:#x}]", f"mov esi, [{at + 4:#x}]")
        self.add(f"mov word ptr [{at + 2:#x}], {target:#x}", f"mov byte ptr [{at + 5:#x}], {access:#x}")
        code = ["xor ecx, ecx", "div ecx"] if cause == "div" else [cause]
        self.run(user, *code, flags=2 | self.chance.choice((0, 0x200, 0x3000, 0x40000)))
        self.add(f"mov [{at:#x}], ebp", f"mov [{at + 4:#x}], esi")

    def flags(self) -> None:
        iopl = self.chance.choice((0, 3)) << 12
        value = self.chance.randrange(1 << 22) & ~0x20100 | 2
        code = self.chance.choice(
            (
                [f"push {value:#x}", "popfd"],
                [f"mov ax, {value & 0xFFFF:#x}", "push ax", "popfw"],
                ["cli"],
                ["sti", "nop"],
            )
        )
        self.run(self.often(60), *code, "pushfd", "pop edi", flags=2 | iopl, show=("edi",))

    def vm86(self) -> None:
        """One instruction in virtual-8086 mode at 0x21000, with an IOPL."""
        body = self.chance.choice(
            (
                (0xCD, 0x90),
                (0xCC,),
                (0x9C,),
                (0x9D,),
                (0xFA,),
                (0xFB,),
                (0xCF,),
                (0xF4,),
                (0xE4, 0x61),
                (0xE6, 0x80),
                (0x0F, 0x20, 0xC0),
                (0x0F, 0x00, 0xD0),
                (0x0F, 0x02, 0xC0),
                (0x0F, 0x01, 0xE0),
                (0x8E, 0xD8),
                (0x66, 0x9C),
                (0x66, 0x9D),
                (0x0F, 0x0B),
                (0xF1,),
                (0x0F, 0x06),
                (0x0F, 0x30),
                (0x0F, 0xA2),
                (0x63, 0xC0),
                (0x1F,),
                (0xCE,),
            )
        )
        iopl = self.chance.choice((0, 3)) << 12
        if body == (0xF1,):
            self.differs("ICEBP is an instruction (SDM vol. 2, INT1)")
        for at, byte in enumerate((*body, 0xCD, 0x80)):
            self.add(f"mov byte ptr [{MEMORY + 0x1000 + at:#x}], {byte:#x}")
        after = self.new()
        self.add(
            f"mov dword ptr [RESUME_SP], {STACK:#x}", f"mov esp, {STACK:#x}", f"mov dword ptr [RESUME], offset {after}"
        )
        self.add("push 0", "push 0", "push 0x1234", "push 0x2100", "push 0x2200", "push 0x100")
        self.add(
            f"push {0x20002 | iopl | self.chance.choice((0, 0x200, 0x4000, 0x8D5)):#x}", "push 0x2000", "push 0x1000"
        )
        frame = [self.chance.getrandbits(16) & 0x3ED7, self.chance.getrandbits(16) & 0x3ED7]
        if body == (0xCF,):
            frame[0] = 0x2000_1001  # CS and IP of the INT behind it
        self.add(*(f"mov dword ptr [{0x22100 + 4 * at:#x}], {value:#x}" for at, value in enumerate(frame)))
        self.add("iretd", f"{after}:")
