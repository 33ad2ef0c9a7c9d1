#!/bin/sh
# The guest's side of hello_mmio.py: reads the greeting, writes two numbers, reads their sum and how many there were.
for word in $(cat /proc/cmdline); do
    case $word in hello_mmio=*) base=${word#*=} ;; esac
done
greeting=$(devmem $((base)) 32)
for shift in 0 8 16 24; do
    printf "\\$(printf %o $((greeting >> shift & 255)))"
done
echo
devmem $((base + 4)) 32 30
devmem $((base + 4)) 32 12
echo "sum $(($(devmem $((base + 8)) 32)))"
echo "count $(($(devmem $((base + 12)) 32))), then $(($(devmem $((base + 12)) 32)))"
