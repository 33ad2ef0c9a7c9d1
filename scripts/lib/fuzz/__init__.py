"""Hostile drivers in volume, without KVM: random programs for the guest's half of every virtio device and transport.

A case (cases.py) is a list of operations, made from a seed (generate.py, defects.py, registers.py, and one module of
requests for each kind of device); rig.py performs it on a device on a FakeBoard, with real memory between pages that
nobody can touch (ram.py). After each step oracle.py compares all of RAM and the used rings with what the device was
allowed to do, and a model of the device (disks.py, nets.py, ...) what lies behind it: files, frames, streams.
runner.py lets processes do that many times, shrink.py makes failing cases short.
"""
