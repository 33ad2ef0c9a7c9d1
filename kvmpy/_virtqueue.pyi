"""The compiled twin of the virtqueues: what ordinary requests need, done without the GIL (_virtqueue.c).

    kvmpy_serve_disk(queue, disk, limit, patience)           serve a disk's queue
    kvmpy_send_frames(queue, wire, limit, patience)          from a network device's queue to a stream socket
    kvmpy_receive_frames(queue, wire, limit)                 the other way
    kvmpy_tap_send(queue, tap, limit, patience)              from a network device's queue to a tap
    kvmpy_tap_receive(queue, tap, limit)                     the other way

Each returns one of lib.KVMPY_* (enum outcome in _virtqueue.c).
`queue`, `disk`, `wire` and `tap` are `struct kvmpy_queue *` and so on, filled in completely: C trusts them.
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
    KVMPY_BLOCKED: int
    LENGTH: int
    VNET_HEADER: int
    ETH_HEADER: int
    MAX_FRAME: int
    def kvmpy_serve_disk(self, queue: Any, disk: Any, limit: int, patience: int) -> int: ...
    def kvmpy_send_frames(self, queue: Any, wire: Any, limit: int, patience: int) -> int: ...
    def kvmpy_receive_frames(self, queue: Any, wire: Any, limit: int) -> int: ...
    def kvmpy_tap_send(self, queue: Any, tap: Any, limit: int, patience: int) -> int: ...
    def kvmpy_tap_receive(self, queue: Any, tap: Any, limit: int) -> int: ...

class _FFI:
    def new(self, ctype: str, init: Any = ...) -> Any: ...
    def cast(self, ctype: str, value: Any) -> Any: ...
    def from_buffer(self, ctype: str, buf: Any, require_writable: bool = ...) -> Any: ...

ffi: _FFI
lib: _Lib
