"""The compiled twin of the virtqueues: what ordinary requests need, done without the GIL (_virtqueue.c).

    kvmpy_serve_disk(queue, disk, limit, length, patience)   serve a disk's queue; returns one of lib.KVMPY_*

`queue` and `disk` are `struct kvmpy_queue *` and `struct kvmpy_disk *`, filled in completely: C trusts them.
Only kvmpy.virtio.twin imports this module.
"""

from typing import Any

class _Lib:
    MAX_REGIONS: int
    MAX_SEGMENTS: int
    KVMPY_EMPTY: int
    KVMPY_DRAINED: int
    KVMPY_MORE: int
    KVMPY_ODD: int
    def kvmpy_serve_disk(self, queue: Any, disk: Any, limit: int, length: int, patience: int) -> int: ...

class _FFI:
    def new(self, ctype: str, init: Any = ...) -> Any: ...
    def cast(self, ctype: str, value: Any) -> Any: ...
    def from_buffer(self, ctype: str, buf: Any, require_writable: bool = ...) -> Any: ...

ffi: _FFI
lib: _Lib
