# Port I/O of every size, in both directions.
#
# Entry: real mode.
# Reads 1, 2 and 4 bytes of ASK and writes each answer to REPORT with the same size; then the same through DX, from
# port 0xfff0 to port 0xfff8. END 0.

        .include "tiny.inc"
        .code16

        in      $ASK, %al
        out     %al, $REPORT
        in      $ASK, %ax
        out     %ax, $REPORT
        in      $ASK, %eax
        out     %eax, $REPORT

        mov     $0xfff0, %bx
        mov     $0xfff8, %cx
        mov     %bx, %dx
        in      %dx, %al
        mov     %cx, %dx
        out     %al, %dx
        mov     %bx, %dx
        in      %dx, %ax
        mov     %cx, %dx
        out     %ax, %dx
        mov     %bx, %dx
        in      %dx, %eax
        mov     %cx, %dx
        out     %eax, %dx
        finish
