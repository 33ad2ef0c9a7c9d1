# User mode: a loop at CPL 3, which every KVM host runs natively.
#
# Entry: long mode.
# Opens its first 2 MiB to user mode and goes there with IOPL 3. Reports CS (dword) from there, reads ASK (byte):
# while the answer is 0 it asks again; with any other it counts RBX up, for ever, without an exit.

        .include "tiny.inc"
        .equ    PRESENT_WRITABLE_USER, 7
        .equ    RFLAGS, 0x3202                  # IOPL 3, interrupts on

        .code64
        mov     $0x7000, %esp
        mov     %cr3, %rdi
        orl     $PRESENT_WRITABLE_USER, (%rdi)          # first entry of the PML4,
        mov     (%rdi), %rdi
        and     $~0xfff, %rdi
        orl     $PRESENT_WRITABLE_USER, (%rdi)          # of the page directory pointers,
        mov     (%rdi), %rdi
        and     $~0xfff, %rdi
        orl     $PRESENT_WRITABLE_USER, (%rdi)          # and of the first directory
        mov     %cr3, %rdi
        mov     %rdi, %cr3

        lgdt    gdtr
        push    $USER_DATA | 3
        push    $0x6000
        push    $RFLAGS
        push    $USER_CODE | 3
        push    $user
        iretq

user:   xor     %ebx, %ebx
        mov     %cs, %eax
        out     %eax, $REPORT
ask:    in      $ASK, %al
        test    %al, %al
        jz      ask
spin:   inc     %rbx
        jmp     spin

        .balign 8
gdt:    .quad   0
        .equ    USER_CODE, . - gdt
        .quad   0x00affb000000ffff
        .equ    USER_DATA, . - gdt
        .quad   0x00cff3000000ffff
gdtr:   .word   . - gdt - 1
        .quad   gdt
