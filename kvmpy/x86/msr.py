"""Model-specific registers of a CPU at its first instruction, as firmware leaves them (Intel SDM vol. 4)."""

from __future__ import annotations

IA32_TIME_STAMP_COUNTER = 0x10
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_MISC_ENABLE = 0x1A0
IA32_PAT = 0x277
IA32_MTRR_DEF_TYPE = 0x2FF
IA32_STAR = 0xC0000081
IA32_LSTAR = 0xC0000082
IA32_CSTAR = 0xC0000083
IA32_FMASK = 0xC0000084
IA32_KERNEL_GS_BASE = 0xC0000102

FAST_STRINGS = 1 << 0  # IA32_MISC_ENABLE
MTRR_ENABLE, MTRR_WRITE_BACK = 1 << 11, 6  # IA32_MTRR_DEF_TYPE (SDM vol. 3A, 12.11.2.1)
PAT_RESET = 0x0007040600070406  # WB, WT, UC-, UC, twice (SDM vol. 3A, 12.12.4)

# (index, value) in the order to write them. The time stamp counter goes first and to 0 on every CPU: KVM then keeps
# them in step. MTRRs: all of memory is write-back, so that Linux does not take RAM for uncached.
BOOT: tuple[tuple[int, int], ...] = (
    (IA32_TIME_STAMP_COUNTER, 0),
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (IA32_STAR, 0),
    (IA32_LSTAR, 0),
    (IA32_CSTAR, 0),
    (IA32_FMASK, 0),
    (IA32_KERNEL_GS_BASE, 0),
    (IA32_PAT, PAT_RESET),
    (IA32_MISC_ENABLE, FAST_STRINGS),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
)
