/* Console output at full speed: the command line's number of bytes (default 65536), polled as the 8250 wants it, in
 * lines of 64 characters. */
#include "guest.h"
    .code32
    .globl start
start:
    mov esp, 0x7000
    CMDLINE_NUMBER 65536
    mov ebp, eax
    xor ebx, ebx
1:  test ebp, ebp
    jz 4f
    mov edx, COM1 + 5
2:  in al, dx
    test al, 0x20
    jz 2b
    mov eax, ebx
    and eax, 63
    cmp eax, 63
    je 3f
    add eax, '0'
    jmp 5f
3:  mov eax, 10
5:  mov edx, COM1
    out dx, al
    inc ebx
    dec ebp
    jmp 1b
4:  RESET
PVH_ENTRY start
