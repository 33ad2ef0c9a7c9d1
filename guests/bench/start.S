# The first code of the benchmark guests that are written in C: from real mode to long mode, then `main`.
#
# Entry: real mode, at the first byte, wherever the image was loaded below 1 MiB; or as a 64 KiB ROM at the reset
# vector (QEMU -bios); or in long mode at ENTRY64, as a kernel that was loaded to where it is linked (Firecracker). The
# parameters (bench.h) are at offset 4, to be filled in by who runs it. The image copies itself
# to where it was linked, maps the first and the fourth GiB one to one, and takes one interrupt: the virtio-mmio
# device's, at VECTOR.

        .include "tiny.inc"
        .equ    SCRATCH, 0x600                  # RAM for the GDT register and a stack below it
        .equ    IMAGE_SIZE, 0x10000
        .equ    STACK, 0x80000
        .equ    PML4, 0x30000                   # then the pointers, then the two directories
        .equ    PDPT, PML4 + 0x1000
        .equ    LOW_DIRECTORY, PML4 + 0x2000
        .equ    HIGH_DIRECTORY, PML4 + 0x3000
        .equ    ENTRY, 0x3                      # present, writable
        .equ    LARGE_PAGE, 0x83
        .equ    VECTOR, 0x35
        .equ    IDT, 0x34000
        .equ    AP_PAGE, 0x8000                 # bench.h has these, too
        .equ    AP_NEXT, AP_PAGE + 0x800
        .equ    AP_PORT, AP_PAGE + 0x804
        .equ    AP_KEYS, AP_PAGE + 0x808        # how many bytes have come, for who looks into the guest's memory
        .equ    AP_COUNTS, AP_PAGE + 0x80c
        .equ    COM1, 0x3f8
        .equ    LINE_STATUS, COM1 + 5
        .equ    INTERRUPT_STATUS, 0x60          # VIRTIO 1.2, 4.2.2
        .equ    INTERRUPT_ACK, 0x64

        .section .start, "ax"
        .code16
        .globl  start, parameters
start:  jmp     begin
        .org    4
parameters:
        .zero   508

begin:  cli
        cld
        xor     %ax, %ax
        mov     %ax, %ss
        mov     $SCRATCH, %sp
        call    here
here:   pop     %bx                             # its offset in CS, wherever that is
        sub     $here - start, %bx
        mov     %cs, %eax                       # linear address of the image
        movzwl  %ax, %eax
        shl     $4, %eax
        movzwl  %bx, %ebx
        add     %eax, %ebx
        xor     %ax, %ax
        mov     %ax, %ds
        movw    $gdt_end - gdt - 1, SCRATCH
        lea     gdt - start(%ebx), %eax
        mov     %eax, SCRATCH + 2
        lgdtl   SCRATCH
        mov     %cr0, %eax
        or      $CR0_PE, %al
        mov     %eax, %cr0
        pushl   $CODE32
        lea     protected - start(%ebx), %eax
        pushl   %eax
        lretl

        .code32
protected:
        mov     $DATA, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     %ebx, %esi
        mov     $start, %edi
        mov     $IMAGE_SIZE / 4, %ecx
        rep movsl
        mov     $copied, %eax
        jmp     *%eax

copied: lgdtl   gdtr
        mov     $PML4, %edi
        xor     %eax, %eax
        mov     $4 * 0x400, %ecx
        rep stosl
        movl    $PDPT + ENTRY, PML4
        movl    $LOW_DIRECTORY + ENTRY, PDPT
        movl    $HIGH_DIRECTORY + ENTRY, PDPT + 3 * 8
        mov     $LOW_DIRECTORY, %edi
        mov     $LARGE_PAGE, %eax
        call    map
        mov     $HIGH_DIRECTORY, %edi
        mov     $0xc0000000 + LARGE_PAGE, %eax
        call    map
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
long_entry:                                     # back to protected mode, to go the same way as the others
        lgdt    gdtr64
        mov     $STACK, %esp
        pushq   $CODE32
        pushq   $compatible
        lretq
        .code32
compatible:
        mov     $DATA, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     %ax, %ss
        mov     %cr0, %eax
        and     $~CR0_PG, %eax
        mov     %eax, %cr0
        mov     $MSR_EFER, %ecx
        rdmsr
        and     $~EFER_LME, %eax
        wrmsr
        jmp     copied

map:    mov     $512, %ecx                      # entries in a directory, for 1 GiB from EAX on
1:      mov     %eax, (%edi)
        add     $8, %edi
        add     $0x200000, %eax
        loop    1b
        ret

        .code64
long_mode:
        mov     $STACK, %esp
        mov     $IDT + 16 * VECTOR, %edi        # a 64-bit interrupt gate
        mov     $interrupt, %eax
        mov     %ax, (%rdi)
        movw    $CODE64, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shr     $16, %eax
        mov     %ax, 6(%rdi)
        movl    $0, 8(%rdi)
        lidt    idtr
        mov     $0xff, %al                      # the PICs stay out of it
        out     %al, $0x21
        out     %al, $0xa1
        mov     $LAPIC, %eax
        movl    $0x1ff, LAPIC_SPURIOUS - LAPIC(%rax)
        mov     parameters + 4, %ecx            # the pin
        lea     0x10(,%rcx,2), %ecx
        mov     $IOAPIC, %edi
        lea     1(%rcx), %eax
        mov     %eax, (%rdi)                    # high half of the redirection entry: to APIC 0
        movl    $0, 0x10(%rdi)
        mov     %ecx, (%rdi)
        movl    $VECTOR, 0x10(%rdi)             # an edge
        call    main
        mov     parameters + 8, %edx            # the port of the end
        xor     %eax, %eax
        out     %al, %dx
9:      cli
        hlt
        jmp     9b

# What Linux's driver does at an interrupt: ask, acknowledge.
interrupt:
        push    %rax
        push    %rbx
        mov     parameters, %ebx                # the device
        mov     INTERRUPT_STATUS(%rbx), %eax
        mov     %eax, INTERRUPT_ACK(%rbx)
        mov     $LAPIC, %eax
        movl    $0, LAPIC_EOI - LAPIC(%rax)
        pop     %rbx
        pop     %rax
        iretq

# void wait_interrupt(volatile u16 *index, u16 until): until *index has reached that; the interrupt comes in HLT.
        .globl  wait_interrupt
wait_interrupt:
        cli
        mov     (%rdi), %ax
        sub     %si, %ax
        jns     1f
        sti
        hlt
        jmp     wait_interrupt
1:      ret

# Where the other CPUs start, copied to AP_PAGE: each reads a port for ever and counts that. If it is COM1's line
# status, one of them looks whether there is input, and echoes it.
        .code16
        .globl  ap_start, ap_end
ap_start:
        cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     $4, %ax
        lock xadd %ax, AP_NEXT                  # the place of its counter
        mov     %ax, %si
1:      mov     AP_PORT, %dx
        in      %dx, %al
        incl    AP_COUNTS(%si)
        cmp     $LINE_STATUS, %dx
        jne     1b
        test    %si, %si
        jnz     1b
        test    $1, %al                         # DR
        jz      1b
        mov     $COM1, %dx
        in      %dx, %al
        incl    AP_KEYS
        out     %al, %dx
        jmp     1b
ap_end:

        .balign 8
gdt:    .quad   0
        .equ    CODE32, . - gdt
        .quad   0x00cf9b000000ffff
        .equ    DATA, . - gdt
        .quad   0x00cf93000000ffff
        .equ    CODE64, . - gdt
        .quad   0x00af9b000000ffff
gdt_end:
gdtr:   .word   gdt_end - gdt - 1
        .long   gdt
        .balign 8
gdtr64: .word   gdt_end - gdt - 1
        .quad   gdt
        .balign 8
idtr:   .word   16 * (VECTOR + 1) - 1
        .quad   IDT

        .section .entry64, "ax"
        .code64
        jmp     long_entry

        .section .reset, "ax"                   # 16 bytes below the end of a ROM
        .code16
        .byte   0xe9                            # jmp to 0xfff3 + 0xd, which is 0
        .word   0xd
