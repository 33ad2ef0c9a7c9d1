"""Names of the bits in RFLAGS, the control registers and EFER (Intel SDM vol. 1, 3.4.3; vol. 3A, 2.5 and 2.2.1)."""

from __future__ import annotations

from ..core.regs import Bits, bit


class RFLAGS(Bits):
    CF = bit(0)
    PF = bit(2)
    AF = bit(4)
    ZF = bit(6)
    SF = bit(7)
    TF = bit(8)
    IF = bit(9)
    DF = bit(10)
    OF = bit(11)
    NT = bit(14)
    RF = bit(16)
    VM = bit(17)
    AC = bit(18)
    VIF = bit(19)
    VIP = bit(20)
    ID = bit(21)


class CR0(Bits):
    PE = bit(0)
    MP = bit(1)
    EM = bit(2)
    TS = bit(3)
    ET = bit(4)
    NE = bit(5)
    WP = bit(16)
    AM = bit(18)
    NW = bit(29)
    CD = bit(30)
    PG = bit(31)


class CR4(Bits):
    VME = bit(0)
    PVI = bit(1)
    TSD = bit(2)
    DE = bit(3)
    PSE = bit(4)
    PAE = bit(5)
    MCE = bit(6)
    PGE = bit(7)
    PCE = bit(8)
    OSFXSR = bit(9)
    OSXMMEXCPT = bit(10)
    UMIP = bit(11)
    LA57 = bit(12)
    VMXE = bit(13)
    SMXE = bit(14)
    FSGSBASE = bit(16)
    PCIDE = bit(17)
    OSXSAVE = bit(18)
    KL = bit(19)
    SMEP = bit(20)
    SMAP = bit(21)
    PKE = bit(22)
    CET = bit(23)
    PKS = bit(24)
    UINTR = bit(25)
    LAM_SUP = bit(28)


class EFER(Bits):
    SCE = bit(0)
    LME = bit(8)
    LMA = bit(10)
    NXE = bit(11)
    SVME = bit(12)  # this one and the next two: AMD APM vol. 2, 3.1.7
    LMSLE = bit(13)
    FFXSR = bit(14)
