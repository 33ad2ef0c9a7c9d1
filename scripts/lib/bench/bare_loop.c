/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of scripts/bench: the least that a monitor can do. Starts a flat image as `kvmpy boot --boot flat` does,
 * answers every port and MMIO read with a constant, prints what is written to COM1, lets KVM take notifications of the
 * virtio-mmio device that is not there, and ends at the first write to port 0xf4.
 *     bare_loop IMAGE
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 128 << 20, LOAD = 0x7c00, MAX_IMAGE = 0x98000, COM1 = 0x3f8, END_PORT = 0xf4 };
enum { ANSWER = 0x2f }; /* a UART that can send, a virtio device that is up */
enum { TSS = 0xfffbd000, IDENTITY_MAP = 0xfffbc000, QUEUE_NOTIFY = 0xd0000050 };

static char line[4096];
static size_t used;

static int must(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static void print(char c)
{
    line[used++] = c;
    if (c == '\n' || used == sizeof line) {
        must(write(1, line, used), "standard output");
        used = 0;
    }
}

int main(int argc, char **argv)
{
    int image = must(open(argc > 1 ? argv[1] : "", O_RDONLY), "image");
    int kvm = must(open("/dev/kvm", O_RDWR), "/dev/kvm");
    int vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    uint64_t identity_map = IDENTITY_MAP;
    must(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map), "KVM_SET_IDENTITY_MAP_ADDR");
    must(ioctl(vm, KVM_SET_TSS_ADDR, TSS), "KVM_SET_TSS_ADDR");
    must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED || must(read(image, ram + LOAD, MAX_IMAGE), "image") == 0) {
        fprintf(stderr, "bare_loop: cannot load the image\n");
        return 1;
    }
    struct kvm_userspace_memory_region slot = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    struct kvm_ioeventfd doorbell = {.addr = QUEUE_NOTIFY, .len = 4, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
    doorbell.fd = must(eventfd(0, 0), "eventfd");
    must(ioctl(vm, KVM_IOEVENTFD, &doorbell), "KVM_IOEVENTFD");
    int vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        return 1;
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.head.nent = 256};
    must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
    struct kvm_sregs sregs;
    must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    sregs.cs.base = sregs.cs.selector = 0;
    must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = LOAD, .rsp = LOAD, .rflags = 2};
    must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

    for (;;) {
        must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO) {
            char *data = (char *)run + run->io.data_offset;
            if (run->io.direction == KVM_EXIT_IO_IN)
                memset(data, ANSWER, run->io.size * run->io.count);
            else if (run->io.port == COM1)
                print(*data);
            else if (run->io.port == END_PORT)
                return 0;
        } else if (run->exit_reason == KVM_EXIT_MMIO) {
            memset(run->mmio.data, ANSWER, sizeof run->mmio.data);
        } else {
            fprintf(stderr, "bare_loop: exit reason %u\n", run->exit_reason);
            return 1;
        }
    }
}
