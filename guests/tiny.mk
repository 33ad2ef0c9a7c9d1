# The tiny guests (README.md): flat binaries for address 0x7c00, made by GNU as and ld alone.
TINY := $(patsubst %.S,build/%.bin,$(wildcard *.S))

.PHONY: tiny clean
tiny: $(TINY)

# Whole files appear at once, so that two builds at the same time do no harm.
build/%.bin: %.S $(wildcard *.inc) tiny.ld tiny.mk
	@mkdir -p build
	@echo '  tiny guest $*'
	@$(AS) --64 --fatal-warnings -o build/$*.$$PPID.o $<
	@$(LD) -T tiny.ld -o build/$*.$$PPID.bin build/$*.$$PPID.o
	@rm build/$*.$$PPID.o
	@mv build/$*.$$PPID.bin $@

clean:
	rm -rf build
