# Memory-mapped I/O of every size and shape.
#
# Entry: long mode.
#   write 8, 4, 2, 1 bytes of 0x1122334455667788 at MMIO + 8, 4, 2, 0
#   read  1, 2, 4, 8 bytes at MMIO + 0x10, 0x12, 0x14, 0x18; each goes to REPORT (8 bytes: low half, high half)
#   write, then read 8 bytes at MMIO + 0xffc, over a page boundary; what was read goes to REPORT in two halves
#   add 1 to the dword at MMIO + 0x20: a read and a write
#   rep stosl of 3 dwords 0x55667788 at MMIO + 0x40
#   rep movsl of 3 dwords from MMIO + 0x50 to RAM, from there each to REPORT; END 0.

        .include "tiny.inc"
        .code64

        mov     $MMIO, %ebx
        movabs  $0x1122334455667788, %rax
        mov     %rax, 8(%rbx)
        mov     %eax, 4(%rbx)
        mov     %ax, 2(%rbx)
        mov     %al, (%rbx)

        mov     0x10(%rbx), %al
        out     %al, $REPORT
        mov     0x12(%rbx), %ax
        out     %ax, $REPORT
        mov     0x14(%rbx), %eax
        out     %eax, $REPORT
        mov     0x18(%rbx), %rax
        out     %eax, $REPORT
        shr     $32, %rax
        out     %eax, $REPORT

        movabs  $0x1122334455667788, %rax
        mov     %rax, 0xffc(%rbx)
        mov     0xffc(%rbx), %rax
        out     %eax, $REPORT
        shr     $32, %rax
        out     %eax, $REPORT

        addl    $1, 0x20(%rbx)

        cld
        mov     $0x55667788, %eax
        lea     0x40(%rbx), %rdi
        mov     $3, %ecx
        rep stosl

        lea     0x50(%rbx), %rsi
        mov     $0x6000, %edi
        mov     $3, %ecx
        rep movsl
        mov     0x6000, %eax
        out     %eax, $REPORT
        mov     0x6004, %eax
        out     %eax, $REPORT
        mov     0x6008, %eax
        out     %eax, $REPORT
        finish
