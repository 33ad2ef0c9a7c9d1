"""Virtio devices and the transports that connect them to a guest."""
