/* SPDX-License-Identifier: Apache-2.0
 *
 * The KVM API (Documentation/virt/kvm/api.rst) as C functions, one for each ioctl: mechanism only, no policy.
 * Every function returns the ioctl's result, or -errno. cffi drops the GIL around each call, KVM_RUN among them.
 * Built by _kvm_build.py; typed and documented in _kvm_ioctls.pyi. Needs the headers of Linux 6.1 or later.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

/* The three shapes an ioctl has: no argument, a number, a structure. */
#define IOCTL(name, request)                                                                                          \
    static int name(int fd)                                                                                           \
    {                                                                                                                 \
        int result = ioctl(fd, request, 0);                                                                           \
        return result < 0 ? -errno : result;                                                                          \
    }
#define IOCTL_NUMBER(name, request)                                                                                   \
    static int name(int fd, unsigned long argument)                                                                   \
    {                                                                                                                 \
        int result = ioctl(fd, request, argument);                                                                    \
        return result < 0 ? -errno : result;                                                                          \
    }
#define IOCTL_STRUCT(name, request, type)                                                                             \
    static int name(int fd, type *argument)                                                                           \
    {                                                                                                                 \
        int result = ioctl(fd, request, argument);                                                                    \
        return result < 0 ? -errno : result;                                                                          \
    }

/* On /dev/kvm. */
IOCTL(kvm_get_api_version, KVM_GET_API_VERSION)
IOCTL_NUMBER(kvm_create_vm, KVM_CREATE_VM)
IOCTL_NUMBER(kvm_check_extension, KVM_CHECK_EXTENSION) /* also on a VM */
IOCTL(kvm_get_vcpu_mmap_size, KVM_GET_VCPU_MMAP_SIZE)
IOCTL_STRUCT(kvm_get_supported_cpuid, KVM_GET_SUPPORTED_CPUID, void)
IOCTL_STRUCT(kvm_get_msr_index_list, KVM_GET_MSR_INDEX_LIST, void)

/* On a VM. */
IOCTL_NUMBER(kvm_create_vcpu, KVM_CREATE_VCPU)
IOCTL_STRUCT(kvm_set_user_memory_region, KVM_SET_USER_MEMORY_REGION, struct kvm_userspace_memory_region)
IOCTL_STRUCT(kvm_get_dirty_log, KVM_GET_DIRTY_LOG, struct kvm_dirty_log)
IOCTL_NUMBER(kvm_set_tss_addr, KVM_SET_TSS_ADDR)
IOCTL_STRUCT(kvm_set_identity_map_addr, KVM_SET_IDENTITY_MAP_ADDR, uint64_t)
IOCTL(kvm_create_irqchip, KVM_CREATE_IRQCHIP)
IOCTL_STRUCT(kvm_create_pit2, KVM_CREATE_PIT2, struct kvm_pit_config)
IOCTL_STRUCT(kvm_get_pit2, KVM_GET_PIT2, void)
IOCTL_STRUCT(kvm_set_pit2, KVM_SET_PIT2, void)
IOCTL_STRUCT(kvm_get_irqchip, KVM_GET_IRQCHIP, void)
IOCTL_STRUCT(kvm_set_irqchip, KVM_SET_IRQCHIP, void)
IOCTL_STRUCT(kvm_irqfd, KVM_IRQFD, struct kvm_irqfd)
IOCTL_STRUCT(kvm_ioeventfd, KVM_IOEVENTFD, struct kvm_ioeventfd)
IOCTL_STRUCT(kvm_set_gsi_routing, KVM_SET_GSI_ROUTING, void)
IOCTL_STRUCT(kvm_signal_msi, KVM_SIGNAL_MSI, struct kvm_msi)
IOCTL_STRUCT(kvm_register_coalesced_mmio, KVM_REGISTER_COALESCED_MMIO, struct kvm_coalesced_mmio_zone)
IOCTL_STRUCT(kvm_unregister_coalesced_mmio, KVM_UNREGISTER_COALESCED_MMIO, struct kvm_coalesced_mmio_zone)
IOCTL_STRUCT(kvm_get_clock, KVM_GET_CLOCK, struct kvm_clock_data)
IOCTL_STRUCT(kvm_set_clock, KVM_SET_CLOCK, struct kvm_clock_data)
IOCTL_STRUCT(kvm_enable_cap, KVM_ENABLE_CAP, struct kvm_enable_cap)

static int kvm_irq_line(int fd, uint32_t gsi, uint32_t level)
{
    struct kvm_irq_level line = {.irq = gsi, .level = level};
    int result = ioctl(fd, KVM_IRQ_LINE, &line);
    return result < 0 ? -errno : result;
}

/* On a vCPU. */
IOCTL(kvm_run, KVM_RUN)
IOCTL_STRUCT(kvm_get_regs, KVM_GET_REGS, void)
IOCTL_STRUCT(kvm_set_regs, KVM_SET_REGS, void)
IOCTL_STRUCT(kvm_get_sregs, KVM_GET_SREGS, void)
IOCTL_STRUCT(kvm_set_sregs, KVM_SET_SREGS, void)
IOCTL_STRUCT(kvm_get_fpu, KVM_GET_FPU, void)
IOCTL_STRUCT(kvm_set_fpu, KVM_SET_FPU, void)
IOCTL_STRUCT(kvm_get_xsave, KVM_GET_XSAVE, void)
IOCTL_STRUCT(kvm_get_xsave2, KVM_GET_XSAVE2, void)
IOCTL_STRUCT(kvm_set_xsave, KVM_SET_XSAVE, void)
IOCTL_STRUCT(kvm_get_xcrs, KVM_GET_XCRS, void)
IOCTL_STRUCT(kvm_set_xcrs, KVM_SET_XCRS, void)
IOCTL_STRUCT(kvm_get_msrs, KVM_GET_MSRS, void)
IOCTL_STRUCT(kvm_set_msrs, KVM_SET_MSRS, void)
IOCTL_STRUCT(kvm_set_cpuid2, KVM_SET_CPUID2, void)
IOCTL_STRUCT(kvm_get_cpuid2, KVM_GET_CPUID2, void)
IOCTL_STRUCT(kvm_get_lapic, KVM_GET_LAPIC, void)
IOCTL_STRUCT(kvm_set_lapic, KVM_SET_LAPIC, void)
IOCTL_STRUCT(kvm_get_vcpu_events, KVM_GET_VCPU_EVENTS, void)
IOCTL_STRUCT(kvm_set_vcpu_events, KVM_SET_VCPU_EVENTS, void)
IOCTL_STRUCT(kvm_get_debugregs, KVM_GET_DEBUGREGS, void)
IOCTL_STRUCT(kvm_set_debugregs, KVM_SET_DEBUGREGS, void)
IOCTL_STRUCT(kvm_get_mp_state, KVM_GET_MP_STATE, struct kvm_mp_state)
IOCTL_STRUCT(kvm_set_mp_state, KVM_SET_MP_STATE, struct kvm_mp_state)
IOCTL_STRUCT(kvm_set_guest_debug, KVM_SET_GUEST_DEBUG, void)
IOCTL_STRUCT(kvm_translate, KVM_TRANSLATE, struct kvm_translation)
IOCTL_STRUCT(kvm_interrupt, KVM_INTERRUPT, struct kvm_interrupt)
IOCTL(kvm_nmi, KVM_NMI)
IOCTL(kvm_get_tsc_khz, KVM_GET_TSC_KHZ)
IOCTL_NUMBER(kvm_set_tsc_khz, KVM_SET_TSC_KHZ)
IOCTL(kvm_kvmclock_ctrl, KVM_KVMCLOCK_CTRL)

/* A signal that does nothing but make KVM_RUN return EINTR: Python's own handlers would need the GIL to run. */
static void kick_arrived(int signal_number)
{
    (void)signal_number;
}

static int kvmpy_prepare_kick(int signal_number)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = kick_arrived;
    action.sa_flags = SA_RESTART;
    return sigaction(signal_number, &action, NULL) < 0 ? -errno : 0;
}
