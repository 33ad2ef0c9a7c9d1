"""File system device: a folder of the host that the guest mounts (VIRTIO 1.2, 5.11).

Linux: VIRTIO_FS; `mount -t virtiofs TAG FOLDER`. The requests are FUSE's, and host/fuse.py does them, also for a
hostile guest: the data of reads and writes goes between files and guest RAM without a copy. Here is nothing but the tag
and the queues. One request is done after the other, on the device's own thread; none waits for the guest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.board import Board
from ..core.errors import ConfigError
from ..core.wire import U32, Overlay
from ..host.fuse import FuseServer
from .device import VirtioDevice
from .queue import VirtQueue
from .spec import Type

TAG_BYTES = 36  # 5.11.4: padded with NUL
HIPRIO_SIZE = 128  # of the queue for FORGET and INTERRUPT
REQUEST_SIZE = 1024  # a request of 1 MiB has 256 pages and a few headers


class Config(Overlay, size=40):
    """virtio_fs_config (5.11.4), up to what the offered features cover."""

    num_request_queues = U32(36)  # behind the tag


class Fs(VirtioDevice):
    """A shared folder. It is opened when the device is attached.

    path   the folder
    tag    the name under which the guest mounts it: up to 36 bytes
    ro     the guest can only read it
    cache  auto: the guest looks after a second whether a file has changed; always: it trusts what it knows, for folders
           that nobody else changes meanwhile
    xattrs user.* extended attributes; without, the guest has fewer questions
    """

    type_id = Type.FS
    queue_sizes = (HIPRIO_SIZE, REQUEST_SIZE)
    modules = ("virtiofs",)
    own_thread = True
    reaches = True

    def __init__(self, *, path: Path, tag: str, ro: bool = False, cache: str = "auto", xattrs: bool = True) -> None:
        name = tag.encode(errors="surrogateescape")
        if not 1 <= len(name) <= TAG_BYTES or b"\0" in name:
            raise ConfigError(f"invalid tag {tag!r} of a share", f"use 1 to {TAG_BYTES} bytes")
        self.path = Path(path)
        self.folders = ((self.path, not ro),)
        self.tag = tag
        self._ro = ro
        self._cache = cache
        self._xattrs = xattrs
        self._server: FuseServer | None = None
        space = Config()
        space.buf[: len(name)] = name
        space.num_request_queues = 1
        self.config = space.buf

    def attach(self, board: Board) -> None:
        """Open the folder; raises ConfigError, NotFoundError or HostError."""
        self._server = FuseServer(self.path, read_only=self._ro, cache=self._cache, xattrs=self._xattrs)
        try:
            super().attach(board)
        except BaseException:
            self.close()
            raise

    def notify(self, index: int, queue: VirtQueue) -> None:
        server = self._server
        if server is None:
            return
        for chain in queue.available():
            chain.written = server.serve(chain.readable, chain.writable)
            queue.push(chain)

    def reset(self) -> None:
        if self._server is not None:
            self._server.reset()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def state(self) -> dict[str, Any]:
        """Raises ConfigError while the folder is mounted: the files that the guest knows cannot be told elsewhere."""
        if self._server is not None and self._server.started:
            raise ConfigError(f'the share "{self.tag}" is mounted', "unmount it in the guest first")
        return super().state() | {"tag": self.tag}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if state.get("tag") != self.tag:
            raise ValueError(f'the share has the tag "{self.tag}", the state wants "{state.get("tag")}"')
