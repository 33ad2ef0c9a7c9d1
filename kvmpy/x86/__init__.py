"""Facts of the x86 PC platform: addresses, CPU state, CPUID, MSRs, ACPI and MP tables."""
