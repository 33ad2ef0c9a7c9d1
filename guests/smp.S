# Start of the other CPUs: INIT, then STARTUP twice, from the first CPU to all others.
#
# Entry: real mode, on the first CPU; the others come in at 0x8000, from their start-up interrupt.
# The first CPU reads the number of CPUs (byte) from ASK. Each CPU reports its APIC id (byte); when all have, the
# first one says END 0. The others halt with interrupts off.

        .include "tiny.inc"
        .equ    ALL_BUT_SELF, 3 << 18
        .equ    ASSERT, 1 << 14
        .equ    INIT, 5 << 8
        .equ    STARTUP, 6 << 8
        .equ    AP_PAGE, 8                      # AP_PAGE << 12 is the address of `others`

.macro report
        mov     LAPIC_ID, %eax
        shr     $24, %eax
        out     %al, $REPORT
        lock incl reported
.endm

        .code16
        mov     $first, %ebx
up:     cli
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
        jmp     *%ebx

first:  movl    $0x1ff, LAPIC_SPURIOUS
        in      $ASK, %al
        movzbl  %al, %esi
        movl    $ALL_BUT_SELF | ASSERT | INIT, LAPIC_ICR
        movl    $ALL_BUT_SELF | ASSERT | STARTUP | AP_PAGE, LAPIC_ICR
        movl    $ALL_BUT_SELF | ASSERT | STARTUP | AP_PAGE, LAPIC_ICR
        report
all:    pause
        cmp     %esi, reported
        jne     all
        finish

other:  movl    $0x1ff, LAPIC_SPURIOUS
        report
done:   hlt
        jmp     done

        .balign 4
reported: .long 0
        .balign 8
gdt:    .quad   0
        .equ    CODE32, . - gdt
        .quad   0x00cf9b000000ffff
        .equ    DATA, . - gdt
        .quad   0x00cf93000000ffff
gdtr:   .word   . - gdt - 1
        .long   gdt

        .org    0x400
        .code16
others: ljmp    $0, $others_flat
others_flat:
        mov     $other, %ebx
        jmp     up
