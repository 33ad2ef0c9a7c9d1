# The benchmark guests in C (bench/start.S tells how they start): 64 KiB images, build/bench_NAME.bin.
BENCH := $(patsubst bench/%.c,build/bench_%.bin,$(wildcard bench/*.c))
BENCH_CFLAGS := -std=gnu11 -O2 -Wall -Wextra -Werror -m64 -ffreestanding -fno-pic -mno-red-zone -mgeneral-regs-only \
	-mcmodel=small -fno-stack-protector -fno-asynchronous-unwind-tables -fcf-protection=none -fno-ident

.PHONY: bench
bench: tiny $(BENCH)

build/bench_%.bin: bench/%.c bench/start.S bench/bench.h bench/bench.ld tiny.inc bench/bench.mk
	@mkdir -p build
	@echo '  benchmark guest $*'
	@$(AS) --64 --fatal-warnings -I . -o build/bench_$*.start.$$PPID.o bench/start.S
	@$(CC) $(BENCH_CFLAGS) -c -o build/bench_$*.$$PPID.o $<
	@$(LD) -T bench/bench.ld -o build/bench_$*.$$PPID.bin build/bench_$*.start.$$PPID.o build/bench_$*.$$PPID.o
	@rm build/bench_$*.start.$$PPID.o build/bench_$*.$$PPID.o
	@mv build/bench_$*.$$PPID.bin $@
