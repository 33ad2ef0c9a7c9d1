"""The hypervisor seam: the only package that issues KVM ioctls."""
