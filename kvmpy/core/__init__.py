"""The parts that know neither KVM nor any device: memory, buses, registers, interrupts, events, errors."""
