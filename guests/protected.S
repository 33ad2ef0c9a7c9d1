# What the CPU is like at the entry in protected mode.
#
# Entry: protected mode.
# Reports dwords: bytes that a push takes (4), CS, DS, CR0, CR4, and a dword that it wrote at 0x200000 and read back,
# which shows segments without limit. END 0.

        .include "tiny.inc"
        .code32

        mov     $0x7000, %esp
        push    %eax
        mov     $0x7000, %eax
        sub     %esp, %eax
        out     %eax, $REPORT
        xor     %eax, %eax
        mov     %cs, %ax
        out     %eax, $REPORT
        mov     %ds, %ax
        out     %eax, $REPORT
        mov     %cr0, %eax
        out     %eax, $REPORT
        mov     %cr4, %eax
        out     %eax, $REPORT
        movl    $0xcafef00d, 0x200000
        mov     0x200000, %eax
        out     %eax, $REPORT
        finish
