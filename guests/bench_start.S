# The benchmark guest that ends at once: a line on COM1, then a byte to the port of the end.
#
# Entry: real mode, at the first byte, wherever the image was loaded; or as a 64 KiB ROM at the reset vector
# (QEMU -bios). The word at offset 4 is the port of the end, to be set by who runs it; with 0, the guest sleeps.

        .include "tiny.inc"
        .equ    COM1, 0x3f8

        .code16
start:  jmp     begin
        .org    4
exit_port:
        .word   END

begin:  mov     $COM1, %dx
        mov     $'B', %al
        out     %al, %dx
        mov     $'\n', %al
        out     %al, %dx
        call    here
here:   pop     %bx                             # its offset in CS, wherever that is
        mov     %cs:exit_port - here(%bx), %dx
        test    %dx, %dx
        jz      sleep
        xor     %al, %al
        out     %al, %dx
sleep:  sti
        hlt
        jmp     sleep

        .org    0xfff0                          # the reset vector of a ROM that ends at 1 MiB
        jmp     start
        .org    0x10000
