# What the CPU is like at the entry in long mode.
#
# Entry: long mode.
# Reports dwords: bytes that a push takes (8), CS, DS, CR0, CR4, EFER, CR3, and the upper half of the sum of 2^63 and
# 2^62, which shows 64-bit operands. END 0.

        .include "tiny.inc"
        .code64

        mov     $0x7000, %esp
        push    %rax
        mov     $0x7000, %eax
        sub     %esp, %eax
        out     %eax, $REPORT
        xor     %eax, %eax
        mov     %cs, %ax
        out     %eax, $REPORT
        mov     %ds, %ax
        out     %eax, $REPORT
        mov     %cr0, %rax
        out     %eax, $REPORT
        mov     %cr4, %rax
        out     %eax, $REPORT
        mov     $MSR_EFER, %ecx
        rdmsr
        out     %eax, $REPORT
        mov     %cr3, %rax
        out     %eax, $REPORT
        movabs  $1 << 63, %rax
        movabs  $1 << 62, %rbx
        add     %rbx, %rax
        shr     $32, %rax
        out     %eax, $REPORT
        finish
