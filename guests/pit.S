# Timer interrupts: the i8254 through the i8259, counted from HLT.
#
# Entry: real mode.
# Programs 100 Hz, waits in HLT with interrupts on, and reports the byte 1, 2, 3 from the handler of IRQ 0. END 0.

        .include "tiny.inc"
        .equ    VECTOR, 0x20
        .equ    HZ100, 11932                    # of 1193182 Hz

        .code16
        mov     $0x7c00, %sp
        movw    $tick, VECTOR * 4
        movw    $0, VECTOR * 4 + 2

        mov     $0x11, %al                      # ICW1: cascade, ICW4 follows
        out     %al, $0x20
        mov     $VECTOR, %al                    # ICW2
        out     %al, $0x21
        mov     $0x04, %al                      # ICW3: slave on input 2
        out     %al, $0x21
        mov     $0x01, %al                      # ICW4: 8086 mode
        out     %al, $0x21
        mov     $0xfe, %al                      # all masked but IRQ 0
        out     %al, $0x21

        mov     $0x34, %al                      # channel 0, low then high byte, mode 2
        out     %al, $0x43
        mov     $HZ100 & 0xff, %al
        out     %al, $0x40
        mov     $HZ100 >> 8, %al
        out     %al, $0x40

        xor     %bl, %bl
        sti
wait:   hlt
        cmp     $3, %bl
        jb      wait
        finish

tick:   inc     %bl
        mov     %bl, %al
        out     %al, $REPORT
        mov     $0x20, %al                      # end of interrupt
        out     %al, $0x20
        iretw
