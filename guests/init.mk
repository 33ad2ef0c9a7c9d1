# The guest's first process; shipped in the package as kvmpy/boot/init. Static, free-standing, reproducible.
INIT := ../kvmpy/boot/init
INIT_CFLAGS := -std=gnu11 -Os -Wall -Wextra -Werror -ffreestanding -nostdlib -static -fno-pie -no-pie \
	-fno-stack-protector -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fcf-protection=none \
	-fno-ident -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,noexecstack -s

.PHONY: init
init: $(INIT)

$(INIT): init.c free.h init.mk
	$(CC) $(INIT_CFLAGS) -o $@ $<
