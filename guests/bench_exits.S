# The benchmark guest: reads a port many times, then an MMIO address many times, then says END 0.
#
# Entry: real mode, at the first byte, wherever the image was loaded; or as a 64 KiB ROM at the reset vector
# (QEMU -bios). Parameters, to be set in the image by who runs it (little-endian):
#   offset 4   dword   number of port reads (inb), default 200000
#   offset 8   dword   number of MMIO reads (movl), default 0
#   offset 12  dword   MMIO address, default 0xd0000000
#   offset 16  word    port, default 0x80
# MMIO reads are done in protected mode. With QEMU, the exit port is `-device isa-debug-exit,iobase=0xf4,iosize=1`.
# The loops are three and two instructions long: what they cost is what the exits cost.

        .include "tiny.inc"
        .equ    SCRATCH, 0x600                  # RAM for the GDT register and a stack below it

        .code16
start:  jmp     begin
        .org    4
port_reads:     .long 200000
mmio_reads:     .long 0
mmio_address:   .long MMIO
port:           .word 0x80

begin:  cli
        xor     %ax, %ax
        mov     %ax, %ss
        mov     $SCRATCH, %sp
        call    here
here:   pop     %bx                             # its offset in CS, wherever that is
        sub     $here - start, %bx

        mov     %cs:port_reads - start(%bx), %ecx
        mov     %cs:port - start(%bx), %dx
        jecxz   mmio
ports:  in      %dx, %al
        dec     %ecx
        jnz     ports

mmio:   mov     %cs:mmio_reads - start(%bx), %ecx
        jecxz   end
        mov     %cs:mmio_address - start(%bx), %esi

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
reads:  mov     (%esi), %eax
        dec     %ecx
        jnz     reads
        .code16
end:    finish                                  # the same bytes in both modes

        .balign 8
gdt:    .quad   0
        .equ    CODE32, . - gdt
        .quad   0x00cf9b000000ffff
        .equ    DATA, . - gdt
        .quad   0x00cf93000000ffff
gdt_end:

        .org    0xfff0                          # the reset vector of a ROM that ends at 1 MiB
        jmp     start
        .org    0x10000
