/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of scripts/bench: the least that a monitor can do. Runs a 64 KiB ROM at the reset vector, answers every
 * port and MMIO read with a constant, and ends at the first write to port 0xf4.
 *     bare_loop ROM
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 1 << 20, ROM = 1 << 16, END_PORT = 0xf4, ANSWER = 0x60 };

static int must(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

int main(int argc, char **argv)
{
    int rom = must(open(argc > 1 ? argv[1] : "", O_RDONLY), "ROM");
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED || read(rom, ram + RAM - ROM, ROM) != ROM) {
        fprintf(stderr, "bare_loop: cannot load the ROM\n");
        return 1;
    }
    struct kvm_userspace_memory_region slot = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        return 1;
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = RAM - ROM; /* RAM ends at 1 MiB: the reset vector there, not below 4 GiB */
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");

    for (;;) {
        must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO) {
            if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == END_PORT)
                return 0;
            memset((char *)run + run->io.data_offset, ANSWER, run->io.size * run->io.count);
        } else if (run->exit_reason == KVM_EXIT_MMIO) {
            memset(run->mmio.data, ANSWER, sizeof run->mmio.data);
        } else {
            fprintf(stderr, "bare_loop: exit reason %u\n", run->exit_reason);
            return 1;
        }
    }
}
