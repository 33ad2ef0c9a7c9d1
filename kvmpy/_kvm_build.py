"""Compiles the C shim with cffi, in API mode: the compiler fills in every number and structure marked with dots."""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

CONSTANTS = """
KVM_CAP_IRQCHIP KVM_CAP_USER_MEMORY KVM_CAP_SET_TSS_ADDR KVM_CAP_EXT_CPUID KVM_CAP_NR_VCPUS KVM_CAP_MAX_VCPUS
KVM_CAP_MAX_VCPU_ID KVM_CAP_NR_MEMSLOTS KVM_CAP_MP_STATE KVM_CAP_COALESCED_MMIO KVM_CAP_COALESCED_PIO
KVM_CAP_PIT2 KVM_CAP_IRQ_ROUTING KVM_CAP_IRQFD KVM_CAP_IRQFD_RESAMPLE KVM_CAP_IOEVENTFD KVM_CAP_SIGNAL_MSI
KVM_CAP_ADJUST_CLOCK KVM_CAP_VCPU_EVENTS KVM_CAP_DEBUGREGS KVM_CAP_XSAVE KVM_CAP_XSAVE2 KVM_CAP_XCRS
KVM_CAP_TSC_CONTROL KVM_CAP_GET_TSC_KHZ KVM_CAP_TSC_DEADLINE_TIMER KVM_CAP_X2APIC_API KVM_CAP_IMMEDIATE_EXIT
KVM_CAP_SYNC_REGS KVM_CAP_SET_IDENTITY_MAP_ADDR KVM_CAP_KVMCLOCK_CTRL KVM_CAP_SET_GUEST_DEBUG
KVM_CAP_READONLY_MEM KVM_CAP_EXIT_ON_EMULATION_FAILURE KVM_CAP_NESTED_STATE KVM_MEM_LOG_DIRTY_PAGES
KVM_MEM_READONLY KVM_PIT_SPEAKER_DUMMY KVM_IRQFD_FLAG_DEASSIGN KVM_IRQFD_FLAG_RESAMPLE
KVM_IOEVENTFD_FLAG_DATAMATCH KVM_IOEVENTFD_FLAG_PIO KVM_IOEVENTFD_FLAG_DEASSIGN KVM_COALESCED_MMIO_PAGE_OFFSET
KVM_EXIT_UNKNOWN KVM_EXIT_EXCEPTION KVM_EXIT_IO KVM_EXIT_HYPERCALL KVM_EXIT_DEBUG KVM_EXIT_HLT KVM_EXIT_MMIO
KVM_EXIT_IRQ_WINDOW_OPEN KVM_EXIT_SHUTDOWN KVM_EXIT_FAIL_ENTRY KVM_EXIT_INTR KVM_EXIT_SET_TPR
KVM_EXIT_TPR_ACCESS KVM_EXIT_NMI KVM_EXIT_INTERNAL_ERROR KVM_EXIT_SYSTEM_EVENT KVM_EXIT_IOAPIC_EOI
KVM_EXIT_HYPERV KVM_EXIT_X86_RDMSR KVM_EXIT_X86_WRMSR KVM_EXIT_DIRTY_RING_FULL KVM_EXIT_X86_BUS_LOCK
KVM_EXIT_XEN KVM_EXIT_NOTIFY
""".split()

# name(fd), name(fd, number), name(fd, structure): as the macros of the same shapes in _kvm_ioctls.c
PLAIN = """
kvm_get_api_version kvm_get_vcpu_mmap_size kvm_create_irqchip kvm_run kvm_nmi kvm_get_tsc_khz kvm_kvmclock_ctrl
""".split()
NUMBER = """
kvm_create_vm kvm_check_extension kvm_create_vcpu kvm_set_tss_addr kvm_set_tsc_khz
""".split()
STRUCT = {
    "void": """
        kvm_get_supported_cpuid kvm_get_msr_index_list kvm_get_pit2 kvm_set_pit2 kvm_get_irqchip kvm_set_irqchip
        kvm_set_gsi_routing kvm_get_regs kvm_set_regs kvm_get_sregs kvm_set_sregs kvm_get_fpu kvm_set_fpu
        kvm_get_xsave kvm_get_xsave2 kvm_set_xsave kvm_get_xcrs kvm_set_xcrs kvm_get_msrs kvm_set_msrs kvm_set_cpuid2
        kvm_get_cpuid2 kvm_get_lapic kvm_set_lapic kvm_get_vcpu_events kvm_set_vcpu_events kvm_get_debugregs
        kvm_set_debugregs kvm_set_guest_debug
    """,
    "uint64_t": "kvm_set_identity_map_addr",
    "struct kvm_userspace_memory_region": "kvm_set_user_memory_region",
    "struct kvm_dirty_log": "kvm_get_dirty_log",
    "struct kvm_pit_config": "kvm_create_pit2",
    "struct kvm_irqfd": "kvm_irqfd",
    "struct kvm_ioeventfd": "kvm_ioeventfd",
    "struct kvm_msi": "kvm_signal_msi",
    "struct kvm_coalesced_mmio_zone": "kvm_register_coalesced_mmio kvm_unregister_coalesced_mmio",
    "struct kvm_clock_data": "kvm_get_clock kvm_set_clock",
    "struct kvm_enable_cap": "kvm_enable_cap",
    "struct kvm_mp_state": "kvm_get_mp_state kvm_set_mp_state",
    "struct kvm_translation": "kvm_translate",
    "struct kvm_interrupt": "kvm_interrupt",
}

STRUCTS = """
struct kvm_userspace_memory_region {
    uint32_t slot; uint32_t flags; uint64_t guest_phys_addr; uint64_t memory_size; uint64_t userspace_addr; ...;
};
struct kvm_dirty_log { uint32_t slot; void *dirty_bitmap; ...; };
struct kvm_pit_config { uint32_t flags; ...; };
struct kvm_irqfd { uint32_t fd; uint32_t gsi; uint32_t flags; uint32_t resamplefd; ...; };
struct kvm_ioeventfd { uint64_t datamatch; uint64_t addr; uint32_t len; int32_t fd; uint32_t flags; ...; };
struct kvm_msi { uint32_t address_lo; uint32_t address_hi; uint32_t data; uint32_t flags; ...; };
struct kvm_coalesced_mmio_zone { uint64_t addr; uint32_t size; uint32_t pio; ...; };
struct kvm_clock_data { uint64_t clock; uint32_t flags; ...; };
struct kvm_enable_cap { uint32_t cap; uint32_t flags; uint64_t args[4]; ...; };
struct kvm_mp_state { uint32_t mp_state; ...; };
struct kvm_translation { uint64_t linear_address; uint64_t physical_address; uint8_t valid; ...; };
struct kvm_interrupt { uint32_t irq; ...; };
"""

# Structures that cross as plain bytes: Python only needs their sizes.
SIZES = """
regs sregs fpu xsave xcrs lapic_state vcpu_events debugregs pit_state2 irqchip guest_debug
""".split()

ffibuilder = FFI()
ffibuilder.cdef(STRUCTS)
for constant in CONSTANTS:
    ffibuilder.cdef(f"#define {constant} ...")
for name in SIZES:
    ffibuilder.cdef(f"struct kvm_{name} {{ ...; }};")
for function in PLAIN:
    ffibuilder.cdef(f"int {function}(int fd);")
for function in NUMBER:
    ffibuilder.cdef(f"int {function}(int fd, unsigned long argument);")
for ctype, functions in STRUCT.items():
    for function in functions.split():
        ffibuilder.cdef(f"int {function}(int fd, {ctype} *argument);")
ffibuilder.cdef("int kvm_irq_line(int fd, uint32_t gsi, uint32_t level);")
ffibuilder.cdef("int kvmpy_prepare_kick(int signal_number);")
ffibuilder.cdef("int kvmpy_explain_bus_error(const char *text, size_t length, int status);")
ffibuilder.cdef("long kvmpy_syscall(long, unsigned long, unsigned long, unsigned long, unsigned long, unsigned long);")
ffibuilder.cdef(
    """
    struct kvmpy_stream { ...; };
    struct kvmpy_stream *kvmpy_stream_new(size_t limit, size_t batch, int wake);
    void kvmpy_stream_free(struct kvmpy_stream *stream);
    void kvmpy_stream_close(struct kvmpy_stream *stream);
    int kvmpy_stream_put(struct kvmpy_stream *stream, const uint8_t *data, size_t size);
    size_t kvmpy_stream_waiting(struct kvmpy_stream *stream, int *lingers);
    size_t kvmpy_stream_take(struct kvmpy_stream *stream, uint8_t *data, size_t size);
    int kvmpy_stream_sent(struct kvmpy_stream *stream, size_t size);
    size_t kvmpy_stream_under_way(struct kvmpy_stream *stream);

    struct kvmpy_cell { uint32_t kinds; uint32_t value; uint8_t seen[32]; struct kvmpy_stream *stream;
                        struct kvmpy_cell *target; ...; };
    struct kvmpy_cells { ...; };
    int kvmpy_cell_add(struct kvmpy_cells *cells, uint64_t key, struct kvmpy_cell *cell);

    #define RECENT ...
    struct kvmpy_exit { uint64_t address; uint64_t count; uint32_t reason; uint32_t size; uint32_t is_write; ...; };
    struct kvmpy_vcpu {
        void *run; struct kvmpy_cells *cells; uint64_t data; uint64_t exits; struct kvmpy_exit recent[...]; ...;
    };
    int64_t kvmpy_run(int fd, struct kvmpy_vcpu *cpu, uint64_t answer);
    """
)

ffibuilder.set_source(
    "kvmpy._kvm_ioctls", (HERE / "_kvm_ioctls.c").read_text(), extra_compile_args=["-O2", "-Wall", "-Wextra"]
)
