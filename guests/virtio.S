# The driver's half of one virtio-mmio device, from reset to the first answer.
#
# Entry: long mode.
# The device is at MMIO and interrupts pin 5 of the IOAPIC. Sets up queue 0 with 4 entries and one chain in it: 16 zero
# bytes to read, 512 bytes and 1 byte to write (a read of sector 0, to a disk). Reports Status when it is up; kicks and
# waits in HLT; the interrupt handler reports InterruptStatus and acknowledges it. Then reports the used ring's index,
# the length in its first element, the last byte, the first dword of the 512 bytes, and ends with END 0.

        .include "tiny.inc"
        .include "virtio_up.inc"
        .equ    VECTOR, 0x35
        .equ    QUEUE_NOTIFY, 0x50              # VIRTIO 1.2, 4.2.2
        .equ    INTERRUPT_STATUS, 0x60
        .equ    INTERRUPT_ACK, 0x64
        .equ    STATUS, 0x70

        .code64
        up_mmio
        mov     STATUS(%rbx), %eax
        out     %eax, $REPORT

        xor     %ebp, %ebp                      # interrupts so far
        movl    $0, QUEUE_NOTIFY(%rbx)
wait:   sti
        hlt
        cli
        test    %ebp, %ebp
        jz      wait

        xor     %eax, %eax
        mov     used + 2, %ax
        out     %eax, $REPORT
        mov     used + 8, %eax
        out     %eax, $REPORT
        xor     %eax, %eax
        mov     last, %al
        out     %eax, $REPORT
        mov     data, %eax
        out     %eax, $REPORT
        finish

interrupt:
        inc     %ebp
        mov     INTERRUPT_STATUS(%rbx), %eax
        mov     %eax, INTERRUPT_ACK(%rbx)
        out     %eax, $REPORT
        mov     $LAPIC, %eax
        movl    $0, LAPIC_EOI - LAPIC(%rax)
        iretq

        .balign 8
setup:  .long   STATUS, 0, STATUS, 1, STATUS, 3         # reset, ACKNOWLEDGE, DRIVER
        .long   0x24, 0, 0x20, 0, 0x24, 1, 0x20, 1      # features: VERSION_1
        .long   STATUS, 0xb                             # FEATURES_OK
        .long   0x30, 0, 0x38, 4                        # queue 0 has 4 entries
        .long   0x80, desc, 0x84, 0, 0x90, avail, 0x94, 0, 0xa0, used, 0xa4, 0
        .long   0x44, 1, STATUS, 0xf                    # QueueReady, DRIVER_OK
        .long   -1

        .include "virtio.inc"
