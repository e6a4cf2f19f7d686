"""Random system-level programs for processors: images like tests/conformance/roms, made from a seed.

A program is a row of steps. Each prepares descriptors, gates, page tables or flags, does one thing that may fault, trap
or change the privilege level, at CPL 0, at CPL 3 or in compatibility mode, and prints what can be observed. Every
exception prints its frame and goes on with the next step. Steps depend on the seed alone, not on each other.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.fuzz.program_maker import ProgramMaker

ROMS = Path(__file__).parent.parent / "conformance" / "roms"
SLOTS = (0x58, 0x60, 0x68, 0x70, 0x78, 0x80)
"""The GDT's descriptors that steps fill; a 16-byte one takes two."""
LDT, LDT_SELECTOR = 0x2800, 0xA0
ALIAS = 0x80_0000
"""Added to an address: the same memory as CPL 3 may see it."""
CANONICAL = (
    "addresses that are not canonical are refused before anything changes (SDM vol. 1, 3.3.7.1; APM vol. 2, 5.3.1)"
)
COMPATIBLE = "all 64 bits of an address are held against the limit of a segment of 32 bits (APM vol. 3, RET (Far))"
DATA, CODE32, CODE64, UDATA, UCODE64, UCODE32 = 0x10, 0x08, 0x18, 0x23, 0x2B, 0x33
NON_CANONICAL = 0x8000_0000_0000
STACK, USTACK, MEMORY = 0x7000, 0x18000, 0x20000


class Maker(ProgramMaker):
    """Programs of 64-bit mode, with CPL 3 and compatibility mode."""

    PRELUDE = '.include "system.inc"\n'
    """tests/conformance/roms/system.inc"""

    def __init__(self, seed: int, steps: int) -> None:
        super().__init__(seed)
        self.filled: dict[int, int] = {}  # what stands in the tables, by selector without RPL
        kinds = [
            self.segment,
            self.verify,
            self.far,
            self.back,
            self.gate,
            self.flags,
            self.single_step,
            self.paging,
            self.breakpoint,
            self.control,
            self.system_segment,
        ]
        self.make(steps, kinds)
        self.add('SAY "end\\n"', "EXIT 0")

    def begin(self, name: str) -> None:
        self.add(f"/* {self.number}: {name} */", "call fresh")
        self.add(*(f"PUTC64 '{char}'" for char in f"@{self.number} {name} "))

    # Pieces.

    def put(self, address: int, value: int) -> None:
        self.add(f"mov rax, {value & (1 << 64) - 1:#x}", f"mov [{address:#x}], rax")

    def descriptor(self, *, code: bool = False, wide: bool = False) -> int:
        """Eight random bytes, mostly of a segment that could be used, `wide` with 32-bit addresses; bases are 0."""
        chance = self.chance
        kind = chance.choice((0x8, 0xA, 0xC, 0xE, 0x9, 0xB)) if code else chance.randrange(16)
        system = 0x10 if self.often(90) or code else 0
        present = 0x80 if self.often(85) else 0
        access = kind | system | chance.choice((0, 0, 3, 3, 1, 2)) << 5 | present
        long = 0x20 if self.often(60) else 0
        size = 0x40 if wide or (not long and self.often(70)) else 0
        high = long | size | 0x8F
        return 0xFFFF | access << 40 | high << 48

    def fill(self, *, code: bool = False, wide: bool = False) -> int:
        """A random descriptor in GDT or LDT; its selector with a random RPL."""
        rpl = self.chance.randrange(4)
        if self.often(20):
            index = self.chance.randrange(7)
            self.filled[index << 3 | 4] = self.descriptor(code=code, wide=wide)
            self.put(LDT + index * 8, self.filled[index << 3 | 4])
            return index << 3 | 4 | rpl
        slot = self.chance.choice(SLOTS)
        self.filled[slot] = self.descriptor(code=code, wide=wide)
        self.put(0x2000 + slot, self.filled[slot])
        self.put(0x2008 + slot, 0)
        return slot | rpl

    def selector(self, *, code: bool = False, wide: bool = False) -> int:
        """A random selector: of a random descriptor, the usual ones, null, or beyond the table."""
        if self.often(65):
            return self.fill(code=code, wide=wide)
        return self.chance.choice((0, 1, 3, DATA, UDATA, CODE32, CODE64, UCODE64, UCODE32, 0x3FF8, 0x44, 0x48, 0xA0))

    def where(self) -> str:
        return self.one("kernel", "user64", "user32")

    def run(self, where: str, *code: str, flags: int = 2, show: tuple[str, ...] = ()) -> None:
        """Do `code` at CPL 0, CPL 3 or in compatibility mode; afterwards show registers that it left."""
        after, begin = self.new(), self.new()
        self.add(f"HERE {after}", *(f"xor {register}, {register}" for register in show))
        if where == "kernel":
            if flags != 2:
                self.add(f"push {flags:#x}", "popfq")
            self.add(*code, "int 0x80")
        else:
            self.add(
                f"push {UDATA:#x}",
                f"push {USTACK:#x}",
                f"push {flags:#x}",
                f"push {(UCODE64 if where == 'user64' else UCODE32):#x}",
                f"lea rax, [rip + {begin} + {ALIAS:#x}]",
                "push rax",
                "iretq",
            )
            if where == "user32":
                self.add(".code32")
            self.add(f"{begin}:", *code, "int 0x80", ".code64")
        self.add(f"{after}:")
        if show:
            self.add(*(f"SHOW {register}" for register in show), "PUTC64 10")

    # Steps.

    def segment(self) -> None:
        """A load of a segment register, by MOV or POP or with a pointer."""
        where, register, value = self.where(), self.one("ds", "es", "fs", "gs", "ss"), self.selector()
        if register == "ss" and not value & ~3:
            self.differs("SS may be null only with CPL as its RPL (SDM vol. 2, MOV)")
        code = [f"mov ebx, {value:#x}", f"mov {register}, ebx", f"mov edi, {register}"]
        if where != "kernel" and self.often(30) and register in ("fs", "gs"):
            pointer = "rax" if where == "user64" else "eax"
            code = [f"mov {pointer}, {MEMORY:#x}", f"l{register} ebx, [{pointer}]", f"mov edi, {register}"]
            self.put(MEMORY, 0x1234_5678 | value << 32)
            if where == "user32":
                code.insert(0, f"mov ax, {UDATA:#x}")
                code.insert(1, "mov ds, ax")
        self.add("xor edi, edi")
        self.run(where, *code, show=("rdi",))
        if value & ~7 in SLOTS and not value & 4:
            self.add(f"SHOW [{0x2000 + (value & ~7):#x}]", "PUTC64 10")

    def verify(self) -> None:
        """LAR, LSL, VERR, VERW."""
        instruction = self.one("lar edi, bx", "lsl edi, bx", "verr bx", "verw bx", "lar rdi, rbx", "lsl rdi, rbx")
        where = self.where()
        if where == "user32" and "rdi" in instruction:
            where = "user64"
        self.differs("LAR and LSL refuse the system types that long mode has not (SDM vol. 2, LAR, table 3-53)")
        self.run(
            where,
            f"mov ebx, {self.selector():#x}",
            "mov edi, 0x55555555",
            instruction,
            "setz cl",
            "movzx esi, cl",
            show=("rdi", "rsi"),
        )

    def gate_descriptor(self) -> None:
        """A call gate of 64-bit mode in two slots of the GDT (the first of SLOTS) to some code segment."""
        target = self.selector(code=True)
        kind = self.chance.choice((0xC, 0xC, 0xC, 0xC, 0xC, 0x4, 0x5, 0xE, 0x9, 0x2))
        access = kind | self.chance.choice((0, 3, 3)) << 5 | (0x80 if self.often(85) else 0)
        self.add("lea rax, [rip + land + 0x800000]", "movzx ebx, ax", "shr rax, 16", "shl rax, 48", "or rbx, rax")
        self.add(f"mov rax, {target << 16 | access << 40:#x}", "or rax, rbx", f"mov [{0x2000 + 0x88:#x}], rax")
        high = 0 if self.often(80) else self.chance.choice((NON_CANONICAL >> 32, 0x1F00 << 32, 0x0100 << 32))
        self.put(0x2000 + 0x90, high)
        if high == NON_CANONICAL >> 32:
            self.differs(CANONICAL)

    def far(self) -> None:
        """JMP or CALL to a code segment or through a gate."""
        where = self.where()
        if self.often(40):
            self.gate_descriptor()
            self.differs("through a gate to conforming code, too, CS gets CPL as its RPL (SDM vol. 2, CALL)")
            value = 0x88 | self.chance.randrange(4)
        else:
            value = self.selector(code=True)
        self.add("lea rax, [rip + land + 0x800000]")
        if self.often(10):
            self.add("mov rbx, 0x800000000000", "or rax, rbx")
            self.differs(CANONICAL)
            self.bochs_differs(COMPATIBLE)
        instruction = self.one("jmp", "call")
        if where == "user32":
            self.add(f"mov [{MEMORY:#x}], eax", f"mov word ptr [{MEMORY + 4:#x}], {value:#x}")
            self.run(
                where, f"mov ax, {UDATA:#x}", "mov ds, ax", f"mov eax, {MEMORY:#x}", f"{instruction} fword ptr [eax]"
            )
        elif self.often(60):
            self.add(f"mov [{MEMORY:#x}], eax", f"mov word ptr [{MEMORY + 4:#x}], {value:#x}")
            self.run(where, f"{instruction} fword ptr [{MEMORY:#x}]")
        else:
            self.add(f"mov [{MEMORY:#x}], rax", f"mov word ptr [{MEMORY + 8:#x}], {value:#x}")
            # GNU as knows no 80-bit pointer in this syntax: REX.W FF /5 or /3 with a displacement of 32 bits
            reg = 0x2C if instruction == "jmp" else 0x1C
            self.run(where, f".byte 0x48, 0xFF, {reg:#x}, 0x25", f".long {MEMORY:#x}")

    def back(self) -> None:
        """IRET or RETF with a random frame."""
        where = self.where()
        cs, ss = self.selector(code=True), self.selector(wide=True)
        if self.often(40):
            cs, ss = self.chance.choice(((CODE64, DATA), (UCODE64, UDATA), (UCODE32, UDATA), (CODE64, 0), (UCODE64, 3)))
        if self.filled.get(cs & ~3, 0) >> 53 & 3 == 3:  # the one that was made for SS is in its place
            self.differs("a code segment with both L and D is #GP, also where it is not present (SDM vol. 2, RET)")
        flags = 2 | self.chance.choice((0, 0, 0x3000, 0x4000, 0x200, 0x40000, 0x20000, 0x200000, 0x180000))
        rsp = USTACK if self.often(85) else NON_CANONICAL
        target = ["lea rbx, [rip + land + 0x800000]"]
        if self.often(10):
            target += ["mov rax, 0x800000000000", "or rbx, rax"]
            self.differs(CANONICAL)
            self.bochs_differs(COMPATIBLE)
        if flags & 0x180000:
            self.differs("IRET at CPL 0 loads VIF and VIP (SDM vol. 2, IRET)")
        if flags & 0x20000:
            self.differs("long mode has no virtual-8086 mode, so IRET ignores VM (SDM vol. 2, IRET: Operation)")
        self.add(*target)
        if where == "user32":
            kind = self.one("iret", "lret")
            push = [f"push {ss:#x}", f"push {USTACK:#x}"] + ([f"push {flags:#x}"] if kind == "iret" else [])
            if kind == "lret":
                self.run(where, *push, f"push {cs:#x}", "push ebx", "retf")
            else:
                self.run(where, *push, f"push {cs:#x}", "push ebx", "iretd")
            return
        kind = self.one("iretq", "retfq", "iretd", "retfd")
        code = [f"mov rax, {rsp:#x}"]
        if kind.endswith("q"):
            words = [f"push {ss:#x}", "push rax"] + ([f"push {flags:#x}"] if kind == "iretq" else [])
            words += [f"push {cs:#x}", "push rbx"]
            code += [*words, "iretq" if kind == "iretq" else ".byte 0x48, 0xCB"]
        else:
            count = 5 if kind == "iretd" else 4
            values = [("ebx", 0), (f"{cs:#x}", 4)]
            values += (
                [(f"{flags:#x}", 8), ("eax", 12), (f"{ss:#x}", 16)] if count == 5 else [("eax", 8), (f"{ss:#x}", 12)]
            )
            code.append(f"sub rsp, {count * 4}")
            code += [f"mov dword ptr [rsp + {at}], {value}" for value, at in values]
            code.append("iretd" if kind == "iretd" else ".byte 0xCB")
            if kind == "iretd":
                self.bochs_differs("in 64-bit mode IRET loads SS and RSP, whatever its operand size (SDM vol. 2, IRET)")
        self.run(where, *code)

    def gate(self) -> None:
        """An exception or INT through a random gate."""
        where = self.where()
        vector, cause = self.chance.choice(
            ((0x90, "int 0x90"), (0x90, "int 0x90"), (6, "ud2"), (0, "xor ecx, ecx; div ecx"), (3, "int3"), (13, "hlt"))
        )
        if vector == 13 and where == "kernel":
            vector, cause = 6, "ud2"
        kind = self.chance.choice((0xE, 0xE, 0xE, 0xF, 0xF, 0x6, 0x7, 0x5, 0xC, 0x9))
        access = kind | self.chance.choice((0, 3, 3)) << 5 | (0x80 if self.often(90) else 0)
        target = CODE64 if self.often(50) else self.selector(code=True)
        ist = self.chance.choice((0, 0, 0, 1, 2))
        at = 0x1000 + vector * 16
        self.add(f"mov rbp, [{at:#x}]", f"mov r12, [{at + 8:#x}]")
        self.add(f"mov word ptr [{at + 2:#x}], {target:#x}", f"mov word ptr [{at + 4:#x}], {access << 8 | ist:#x}")
        if self.often(5):
            self.put(at + 8, NON_CANONICAL >> 32)
            self.differs(CANONICAL)
        if vector == 0:
            self.kvm_differs(
                "QEMU's SVM does not tell in EXITINTINFO that the fault came in the delivery of #DE, so that KVM does"
                " not know that it is a double one (APM vol. 2, 15.7.2)"
            )
        if target != CODE64:
            self.differs(
                "a handler of CPL 3 pushes as CPL 3, and a segment that is neither present nor of 64 bits is #GP"
            )
        if self.filled.get(target & ~3, 0) >> 40 & 0x1C == 0x1C:
            self.bochs_differs("a handler in conforming code has the CPL of what was interrupted (SDM vol. 3, 6.12.1)")
        flags = self.chance.choice((2, 2, 0x202, 0x4002, 0x40002))
        if where != "kernel":
            flags = flags & ~0x4000 | 0x3000  # a handler of CPL 1 to 3 is to print
        self.run(where, *cause.split("; "), flags=flags)
        self.add(f"mov [{at:#x}], rbp", f"mov [{at + 8:#x}], r12")

    def flags(self) -> None:
        """POPF, CLI, STI, IRET-free changes of flags, with an IOPL."""
        where = self.where()
        iopl = self.chance.choice((0, 3)) << 12
        value = self.chance.randrange(1 << 22) & ~0x100 | 2
        size = self.one("", "w")
        register = "edi" if where == "user32" else "rdi"
        native = "d" if where == "user32" else "q"
        instruction = self.one("popf", "popf", "cli", "sti")
        if instruction == "popf" and not size:
            code = [f"push {value:#x}", f"popf{native}"]
        elif instruction == "popf":
            code = [f"mov ax, {value & 0xFFFF:#x}", "push ax", "popfw"]
        else:
            code = [instruction, "nop"]
        self.run(where, *code, f"pushf{native}", f"pop {register}", flags=2 | iopl, show=("rdi",))

    def single_step(self) -> None:
        """One instruction, and the next, with TF."""
        where = self.one("kernel", "user64", "user32")
        choices = [
            "nop",
            "int 0x81",
            "int3",
            ".byte 0xF1",
            "pushf{n}; pop {a}",
            "mov eax, 5",
            "ud2",
            "xor ecx, ecx; div ecx",
            "mov ecx, 3; lea {di}, [{memory}]; xor eax, eax; rep stosb",
            "cpuid",
            "push {f}; popf{n}",
            "call 1f; 1: pop {a}",
            "mov eax, ds; mov ds, eax",
            "mov ebx, {ss}; mov ss, ebx; nop",
            "mov ebx, {far}; mov al, [{b}]",
        ]
        if where == "kernel":
            choices += [
                "sti; nop; cli",
                "mov rax, cr0; mov cr0, rax",
                "mov rax, dr7",
                "mov ecx, 0xC0000080; rdmsr; wrmsr",
                "in al, 0x61",
                "mov eax, cs; push {ss}; push {sp}; push 0x102; push rax; lea rax, [rip + 1f]; push rax; iretq; 1: nop",
                "lidt [rip + idt_pointer]",
                "push {f}; popf{n}; nop",
                "clts",
                "swapgs; swapgs",
            ]
        else:
            choices += ["cli", "hlt", "clts"]
        values = {
            "n": "d" if where == "user32" else "q",
            "a": "eax" if where == "user32" else "rax",
            "di": "edi" if where == "user32" else "rdi",
            "b": "ebx" if where == "user32" else "rbx",
            "memory": hex(MEMORY),
            "ss": hex(DATA if where == "kernel" else UDATA),
            "far": "0x40000000",
            "f": "2",
            "sp": hex(STACK - 0x400),
        }
        body = self.chance.choice(choices).format(**values)
        if body.startswith((".byte 0xF1", "sti")):
            self.differs("ICEBP is an instruction, and STI delays no trap (SDM vol. 2, INT1; vol. 3, 6.8.3)")
        label = self.new()
        body = body.replace("1f", label).replace("1:", f"{label}:")
        prefix = [f"mov ax, {UDATA:#x}", "mov ds, ax", "mov es, ax"] if where == "user32" else []
        self.run(where, *prefix, "push 0x102", f"popf{values['n']}", *body.split("; "), "nop")

    def breakpoint(self) -> None:
        """An access beside and on what DR0 to DR3 watch, and instruction breakpoints. What must hit is computed here:
        SDM vol. 3, 18.2.5 (ranges are aligned to their length; every byte of an access counts)."""
        where = self.one("kernel", "user64")
        # instruction, and (offset, size, written) of what it touches from MEMORY + place on; DI: 8 further
        access, touched = self.chance.choice(
            (
                ("mov al, [rbx]", ((0, 1, False),)),
                ("mov [rbx], al", ((0, 1, True),)),
                ("mov [rbx], eax", ((0, 4, True),)),
                ("mov rax, [rbx]", ((0, 8, False),)),
                ("mov [rbx], rax", ((0, 8, True),)),
                ("inc dword ptr [rbx]", ((0, 4, True),)),
                ("xchg [rbx], ax", ((0, 2, True),)),
                ("movsb", ((0, 1, False), (8, 1, True))),
                ("movsq", ((0, 8, False), (8, 8, True))),
                ("stosw", ((8, 2, True),)),
                ("push [rbx]", ((0, 8, False),)),
                ("cmpxchg [rbx], ecx", ((0, 4, True),)),
                ("bts dword ptr [rbx], 3", ((0, 4, True),)),
                ("movups [rbx], xmm0", ((0, 16, True),)),
                ("movups xmm0, [rbx]", ((0, 16, False),)),
                ("cmpxchg16b [rbx]", ((0, 16, True),)),
                ("lock xadd [rbx], rax", ((0, 8, True),)),
                ("fninit; fld qword ptr [rbx]", ((0, 8, False),)),
            )
        )
        place = self.chance.randrange(0x20)
        if access == "cmpxchg16b [rbx]":
            place &= ~15
        control, executed, data = 0x400, 0, 0
        label = self.new()
        for register in range(4):
            kind = self.chance.choice((0, 1, 1, 3))
            size = 1 if kind == 0 else self.chance.choice((1, 2, 4, 8))
            at = self.chance.randrange(0x30) & ~(size - 1)
            self.add(
                f"lea rax, [rip + {label} + {ALIAS if where == 'user64' else 0:#x}]"
                if kind == 0
                else f"mov eax, {MEMORY + at:#x}"
            )
            self.add(f"mov dr{register}, rax")
            enabled = self.chance.choice((0, 1, 2, 3))
            control |= enabled << 2 * register | ({1: 0, 2: 1, 8: 2, 4: 3}[size] << 2 | kind) << 16 + 4 * register
            if enabled and kind == 0:
                executed |= 1 << register
            elif enabled:
                for offset, length, written in touched:
                    start = place + offset
                    if (written or kind == 3) and start < at + size and at < start + length:
                        data |= 1 << register
        self.hits[self.number] = [hits for hits in (executed, data) if hits]
        self.add(f"mov eax, {control:#x}", "mov dr7, rax")
        *before, last = access.split("; ")
        self.run(
            where,
            *before,
            f"mov ebx, {MEMORY + place:#x}",
            f"mov esi, {MEMORY + place:#x}",
            f"mov edi, {MEMORY + place + 8:#x}",
            f"{label}:",
            last,
            "nop",
        )

    def paging(self) -> None:
        """An access through tables with random bits."""
        where = self.one("kernel", "user64")
        bits = 0
        for bit, percent in (
            (0, 85),
            (1, 60),
            (2, 60),
            (3, 20),
            (4, 20),
            (5, 50),
            (6, 50),
            (63, 30),
            (50, 4),
            (9, 30),
            (8, 20),
        ):
            if self.often(percent):
                bits |= 1 << bit
        upper = 7 & ~(self.chance.choice((0, 0, 0, 2, 4, 1))) | (1 << 63 if self.often(15) else 0)
        large = self.often(30)
        # The third entry of the first page directory (4 to 6 MiB), with a table of its own at 0x16000.
        entry = 0xA000 + 2 * 8
        for place in (0x21000, 0x400000):
            self.put(place, 0xC3C3C3C3C3C3C3C3)  # RET, for CALL
        if large:
            frame = 0x400000 | (1 << 13 if self.often(10) else 0)
            self.put(entry, frame | 0x80 | bits)
        else:
            self.put(entry, 0x16000 | upper | (1 << 51 if self.often(3) else 0))
            self.put(0x16000, 0x21000 | bits)
        cr4, cr0 = 0, 0
        if self.often(30):
            cr4 |= 1 << 20
        if self.often(30):
            cr4 |= 1 << 21
        flags = 2 | (0x40000 if self.often(40) else 0)
        if self.often(40):
            cr0 = 1 << 16
        self.add(
            "mov rax, cr4", f"or rax, {cr4:#x}", "mov cr4, rax", "mov rax, cr0", f"and eax, {~cr0 & 0xFFFFFFFF:#x}"
        )
        self.add("mov cr0, rax", "mov rax, cr3", "mov cr3, rax", "mov ebx, 0x400000")
        access = self.one("mov eax, [rbx]", "mov [rbx], eax", "call rbx", "movups xmm0, [rbx]", "verr [rbx]")
        self.run(where, *access.split("; "), flags=flags)
        self.add(
            "mov rax, cr4", "and eax, 0xFFCFFFFF", "mov cr4, rax", "mov rax, cr0", "or rax, 0x10000", "mov cr0, rax"
        )
        # Above a page that faults the accessed bit may be set or not.
        self.add(f"mov rax, [{entry:#x}]", *([] if large else ["and eax, ~0x20"]), "call hex64", "PUTC64 ' '")
        self.add("SHOW [0x16000]", "PUTC64 10")
        self.put(entry, 0x400087)
        self.add("mov rax, cr3", "mov cr3, rax")

    def control(self) -> None:
        """System instructions with random operands, and at CPL 3."""
        where = self.one("kernel", "kernel", "user64")
        value = self.chance.choice(
            (0, 1, 0x20, 1 << 32, NON_CANONICAL, 0xFFFF_8000_0000_0000, self.chance.getrandbits(64))
        )
        choices = [
            "mov cr8, rbx; mov rdi, cr8; xor ebx, ebx; mov cr8, rbx",
            "mov cr2, rbx; mov rdi, cr2",
            "mov ecx, 0xC0000101; mov eax, ebx; mov rdx, rbx; shr rdx, 32; wrmsr; rdmsr; mov edi, eax",
            "mov ecx, 0xC0000102; mov eax, ebx; mov rdx, rbx; shr rdx, 32; wrmsr; rdmsr; mov edi, edx",
            "mov ecx, 0x277; mov eax, ebx; mov rdx, rbx; shr rdx, 32; wrmsr; rdmsr; mov edi, eax; "
            "mov eax, 0x70406; mov edx, eax; wrmsr",
            "invlpg [rbx]",
            "clts",
            "smsw edi",
            "str edi",
            "sldt edi",
            "mov rdi, cr0",
            "mov rdi, dr6",
            "mov rdi, dr4",
            "mov dr0, rbx; mov rdi, dr0",
            "mov dr6, rbx; mov rdi, dr6",
            "mov cr3, r9",
            "swapgs; swapgs",
            "wbinvd",
            "rdpmc",
            "xgetbv",
            "sysretq",
            "sysexitd",
            "mov cr1, rbx",
            "mov cr5, rbx",
            "rsm",
            "mov rbx, [rbx]",
            "jmp rbx",
            "call rbx",
            "push rbx; ret",
            "mov rsp, rbx; push rax",
            "mov rbp, rbx; mov al, [rbp]",
            "lgdt [rbx]",
        ]
        body = self.chance.choice(choices)
        if "cr8" in body or "0x277" in body or "rdpmc" in body or "dr0" in body:
            self.differs(
                "reserved bits are refused, and there is RDPMC (SDM vol. 2, MOV CRn; vol. 4, PAT; vol. 2, RDPMC)"
            )
        elif "cr1" in body or "cr5" in body:
            self.differs("a control register that is not there is #UD at every CPL (APM vol. 3, MOV CRn)")
        elif "0xC000010" in body or "rsp" in body or "rbp" in body or "jmp" in body or "call" in body or "ret" in body:
            self.differs(CANONICAL)
        if body in ("jmp rbx", "call rbx", "push rbx; ret", "mov rsp, rbx; push rax", "lgdt [rbx]"):
            value = self.chance.choice((NON_CANONICAL, 0xFFFF_8000_0000_0000, 0x1234_5678_9ABC_DEF0))
        if body == "sysexitd":
            self.bochs_differs("AMD's processors have no SYSEXIT in long mode (APM vol. 3, SYSEXIT)")
            self.kvm_differs("KVM emulates SYSEXIT as Intel's processors have it (APM vol. 3, SYSEXIT: #UD)")
        elif body == "lgdt [rbx]":
            self.bochs_differs("which of an operand's bytes faults is open (SDM vol. 2, LGDT)")
        self.add("mov r9, cr3", "xor edi, edi")
        if body.startswith("sysretq") and where == "kernel":
            self.add(
                "lea rcx, [rip + land + 0x800000]", "mov r11d, 2", "mov r8, rcx", "mov ecx, 0xC0000081", "xor eax, eax"
            )
            self.add("mov edx, 0x001B0018", "wrmsr", "mov rcx, r8")
        self.run(where, f"mov rbx, {value:#x}", *body.split("; "), show=("rdi",))

    def system_segment(self) -> None:
        """LTR and LLDT of random descriptors."""
        self.differs(
            "LTR and LLDT check type and base before presence, and refuse types of 286 (SDM vol. 2, LTR, LLDT)"
        )
        access = self.chance.choice((0x9, 0x9, 0xB, 0x2, 0x2, 0x1, 0xC, 0x12)) | (0x80 if self.often(85) else 0)
        slot = 0x88
        self.put(0x2000 + slot, 0x67 | 0x3000 << 16 | access << 40)
        self.put(
            0x2008 + slot, 0 if self.often(70) else self.chance.choice((NON_CANONICAL >> 32, 0x100 << 32, 0x1F00 << 32))
        )
        value = slot | self.chance.randrange(4) if self.often(80) else self.selector()
        where = self.one("kernel", "kernel", "kernel", "user64")
        instruction = self.one("ltr", "lldt")
        self.run(where, f"mov ebx, {value:#x}", f"{instruction} bx", "str edi", "sldt esi", show=("rdi", "rsi"))
        self.add(f"SHOW [{0x2000 + slot:#x}]", "PUTC64 10")
        self.put(0x2000 + 0x48, 0x0000_8900_3000_0067)
        self.add("mov ax, 0x48", "ltr ax", f"mov ax, {LDT_SELECTOR:#x}", "lldt ax")


def build(maker: ProgramMaker, seed: int, folder: Path) -> Path:
    """The image of a program: 64 KiB for the top of the first MiB. Raises CalledProcessError if `as` refuses it."""
    source, unlinked, linked = (folder / f"system-{seed}.{end}" for end in ("S", "o", "elf"))
    image = folder / f"system-{seed}.bin"
    source.write_text(maker.text)
    subprocess.run(["as", "--64", "-mx86-used-note=no", "-I", ROMS, "-o", unlinked, source], check=True)
    subprocess.run(["ld", "-T", ROMS / "rom.ld", "-o", linked, unlinked], check=True)
    subprocess.run(["objcopy", "-O", "binary", "--gap-fill", "0", "--pad-to", "0x100000", linked, image], check=True)
    return image
