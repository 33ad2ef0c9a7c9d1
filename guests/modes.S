# The whole way up by itself: real mode, protected mode, paging, long mode.
#
# Entry: real mode.
# Reports the bytes 16, 32, 64: the width of the mode it has reached. Its page tables are at 0x10000. END 0.

        .include "tiny.inc"
        .equ    PML4, 0x10000
        .equ    PDPT, 0x11000
        .equ    DIRECTORY, 0x12000

        .code16
        say     16
        cli
        lgdt    gdtr
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        ljmp    $CODE32, $protected

        .code32
protected:
        mov     $DATA, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        say     32
        cld
        mov     $PML4, %edi
        xor     %eax, %eax
        mov     $0xc00, %ecx
        rep stosl
        movl    $PDPT + 3, PML4                 # present, writable
        movl    $DIRECTORY + 3, PDPT
        movl    $0x83, DIRECTORY                # the first 2 MiB, as one page
        mov     %cr4, %eax
        or      $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $PML4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     %cr0, %eax
        or      $CR0_PG, %eax
        mov     %eax, %cr0
        ljmp    $CODE64, $long_mode

        .code64
long_mode:
        say     64
        finish

        .balign 8
gdt:    .quad   0
        .equ    CODE32, . - gdt
        .quad   0x00cf9b000000ffff
        .equ    CODE64, . - gdt
        .quad   0x00af9b000000ffff
        .equ    DATA, . - gdt
        .quad   0x00cf93000000ffff
gdtr:   .word   . - gdt - 1
        .long   gdt
