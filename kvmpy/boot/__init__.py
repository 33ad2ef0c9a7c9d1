"""Kernel images into guest memory: one module for each boot protocol."""
