# Timer interrupts: the local APIC's own timer, first once, then periodic.
#
# Entry: long mode.
# Reports the byte 1 from the one shot, then 2, 3, 4 from the periodic timer (10 ms). END 0.

        .include "tiny.inc"
        .equ    VECTOR, 0x40
        .equ    PERIODIC, 1 << 17
        .equ    TEN_MS, 10000000                # KVM's APIC bus runs at 1 GHz

        .code64
        mov     $0x7000, %esp
        lidt    idtr
        mov     $LAPIC, %edi
        movl    $0x1ff, LAPIC_SPURIOUS - LAPIC(%rdi)            # enabled, spurious vector 0xff
        movl    $0xb, LAPIC_TIMER_DIVIDE - LAPIC(%rdi)          # by 1
        xor     %ebx, %ebx

        movl    $VECTOR, LAPIC_TIMER - LAPIC(%rdi)
        movl    $TEN_MS, LAPIC_TIMER_COUNT - LAPIC(%rdi)
        sti
once:   hlt
        cmp     $1, %bl
        jb      once

        movl    $VECTOR | PERIODIC, LAPIC_TIMER - LAPIC(%rdi)
        movl    $TEN_MS, LAPIC_TIMER_COUNT - LAPIC(%rdi)
again:  hlt
        cmp     $4, %bl
        jb      again
        finish

tick:   inc     %bl
        mov     %bl, %al
        out     %al, $REPORT
        movl    $0, LAPIC_EOI - LAPIC(%rdi)
        iretq

        .balign 8
idt:    .fill   VECTOR * 2, 8, 0
        .word   tick, BOOT_CS, 0x8e00, 0        # 64-bit interrupt gate
        .quad   0
idtr:   .word   . - idt - 1
        .quad   idt
