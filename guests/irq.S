# Interrupts from outside: IOAPIC pins and messages, each vector told to the test.
#
# Entry: long mode.
# IOAPIC pin n gives vector 0x30 + n, edge-triggered below pin 16, level-triggered (active high) from there on.
# Vectors 0x50 to 0x5f are free for messages. Reports the byte 1 when it is ready; then, for each interrupt, its
# vector, before the end of interrupt. Waits in HLT for the next, for ever. An exception reports its vector and
# ends with END 0xee.

        .include "tiny.inc"
        .equ    PINS, 24
        .equ    PIN_VECTOR, 0x30
        .equ    FIRST_LEVEL_PIN, 16
        .equ    LEVEL, 1 << 15
        .equ    VECTORS, 0x60
        .equ    STUB, 16

        .code64
        mov     $0x7000, %esp
        lidt    idtr
        mov     $0xff, %al                      # the PICs stay out of it
        out     %al, $0x21
        out     %al, $0xa1
        mov     $LAPIC, %ebx
        movl    $0x1ff, LAPIC_SPURIOUS - LAPIC(%rbx)

        mov     $IOAPIC, %edi
        xor     %ecx, %ecx
pin:    lea     0x10(%rcx,%rcx), %eax           # low half of the redirection entry
        mov     %eax, (%rdi)
        lea     PIN_VECTOR(%rcx), %edx
        cmp     $FIRST_LEVEL_PIN, %ecx
        jb      edge
        or      $LEVEL, %edx
edge:   mov     %edx, 0x10(%rdi)
        inc     %eax                            # high half: to APIC 0
        mov     %eax, (%rdi)
        movl    $0, 0x10(%rdi)
        inc     %ecx
        cmp     $PINS, %ecx
        jb      pin

        say     1
        sti
wait:   hlt
        jmp     wait

common: pop     %rax                            # the vector
        out     %al, $REPORT
        cmp     $0x20, %al
        jb      fault
        movl    $0, LAPIC_EOI - LAPIC(%rbx)
        iretq
fault:  finish  0xee

        .balign STUB
stubs:  .set    vector, 0
        .rept   VECTORS
        push    $vector
        jmp     common
        .balign STUB
        .set    vector, vector + 1
        .endr

        .balign 8
idt:    .set    vector, 0
        .rept   VECTORS
        .word   stubs + vector * STUB, BOOT_CS, 0x8e00, 0       # 64-bit interrupt gate
        .quad   0
        .set    vector, vector + 1
        .endr
idtr:   .word   . - idt - 1
        .quad   idt
