# The driver's half of one virtio-pci device, from the scan to the first answer, by way of a BAR that it moves.
#
# Entry: long mode.
# The device is 00:01.0. Finds the MSI-X capability, reports what BAR 0 says about its size, puts the BAR elsewhere and
# turns it on. Gives vector 1 of two a message for APIC 0 and queue 0 that vector. Sets up queue 0 with 4 entries and
# one chain in it: 16 zero bytes to read, 512 bytes and 1 byte to write. Reports Status when it is up; kicks with the
# vector masked, and reports the pending bits until one is set; then unmasks it and waits in HLT; the interrupt handler
# reports its vector. Then reports the used ring's index, the length in its first element, the last byte, the first
# dword of the 512 bytes, and ends with END 0.

        .include "tiny.inc"
        .include "virtio_up.inc"
        .equ    VECTOR, 0x36
        .equ    BAR, 0xe2000000                 # inside layout.PCI_WINDOW, not where it was
        .equ    STATUS, 0x14                    # VIRTIO 1.2, 4.1.4.3
        .equ    NOTIFY, 0x3000                  # kvmpy/virtio/pci.py
        .equ    PENDING, 0x5000

        .code64
        up_pci
        movzbl  STATUS(%rbx), %eax
        out     %eax, $REPORT

        movw    $0, NOTIFY(%rbx)
poll:   mov     PENDING(%rbx), %eax
        test    %eax, %eax
        jz      poll
        out     %eax, $REPORT
        xor     %ebp, %ebp                      # interrupts so far
        movl    $0, ENTRY + 12(%rbx)
wait:   sti
        hlt
        cli
        test    %ebp, %ebp
        jz      wait

        mov     PENDING(%rbx), %eax
        out     %eax, $REPORT
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
        mov     $VECTOR, %eax
        out     %eax, $REPORT
        mov     $LAPIC, %eax
        movl    $0, LAPIC_EOI - LAPIC(%rax)
        iretq

        .balign 8
setup:  .long   STATUS, 1, 0, STATUS, 1, 1, STATUS, 1, 3        # offset, bytes, value: reset, ACKNOWLEDGE, DRIVER
        .long   0x08, 4, 0, 0x0c, 4, 0, 0x08, 4, 1, 0x0c, 4, 1  # features: VERSION_1
        .long   STATUS, 1, 0xb                                  # FEATURES_OK
        .long   ENTRY, 4, LAPIC, ENTRY + 4, 4, 0, ENTRY + 8, 4, VECTOR
        .long   0x16, 2, 0, 0x18, 2, 4, 0x1a, 2, 1              # queue 0 has 4 entries and vector 1
        .long   0x20, 4, desc, 0x24, 4, 0, 0x28, 4, avail, 0x2c, 4, 0, 0x30, 4, used, 0x34, 4, 0
        .long   0x1c, 2, 1, STATUS, 1, 0xf                      # queue_enable, DRIVER_OK
        .long   -1

        .include "virtio.inc"
