"""Platform devices: one file a device, none of which knows KVM or the machine."""
