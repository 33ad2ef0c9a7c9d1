"""Applies one layer, a tar archive that may be compressed, to the tree of an image (OCI image-spec 1.1, layer.md).

What is read is bounded before it is kept: the archive's headers, the number of files, and what decompressing gives.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Protocol

from ..core.errors import ImageError
from ..core.record import Record
from . import tar
from .tree import Node, Tree, shown

CHUNK = 1 << 20
ZSTD_WINDOW_LOG = 27  # a frame may ask for 128 MiB of memory: what `zstd --ultra` makes
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
KEPT_XATTRS = (b"user.", b"security.")  # trusted.overlay.* would be an order to the guest's overlay
KINDS = {
    tar.FILE: stat.S_IFREG,
    tar.SYMLINK: stat.S_IFLNK,
    tar.CHAR: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
    tar.FOLDER: stat.S_IFDIR,
    tar.FIFO: stat.S_IFIFO,
}
REMEDY = "get the image from its source again"


class Layer(Record, frozen=True):
    """Where a layer is, and what it must be. `open` gives the file, `name` is for people."""

    name: str
    open: Callable[[], BinaryIO]
    digest: str | None  # of the file as it is, where that is known: sha256:HEX or sha512:HEX
    diff_id: str  # of the archive in it
    size: int = 0  # bytes of the file, where that is known


class Contents(Protocol):
    """Where the content of files goes."""

    def add(self, chunks: Iterable[bytes], node: Node) -> None: ...


class Budget:
    """How many bytes all layers together may have when they are unpacked."""

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            what = f"the image is larger than {self.limit} bytes when unpacked"
            raise ImageError(what, "if you trust it, allow more with --root-limit (root_limit=)")


def apply(layer: Layer, tree: Tree, contents: Contents, budget: Budget, tick: Callable[[int], None]) -> None:
    """Add what the layer has to `tree`, and the content of its files to `contents`; `tick` counts the bytes read.

    Raises ImageError for a damaged or hostile layer, OSError for what the host cannot do.
    """
    tree.layer += 1
    with layer.open() as file:
        outer = _Hashed(file, layer.digest, tick)
        inner = _Hashed(_decompressed(outer), layer.diff_id, budget.spend)
        try:
            archive = tar.Tar(inner.read)
            for member in archive:
                _add(archive, member, tree, contents, budget)
            inner.drain()
            outer.drain()
        except ImageError as error:
            raise ImageError(f"{layer.name}: {error.what}", error.remedy) from None
        except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as error:
            why = "ends early" if isinstance(error, EOFError) else f"is damaged ({error})"
            raise ImageError(f"{layer.name} {why}", REMEDY) from None
        for stream in (outer, inner):
            if stream.is_wrong():
                raise ImageError(f"{layer.name} is not what its digest {stream.digest} says", REMEDY)


class _Hashed(io.RawIOBase):
    """A stream that is hashed and counted as it is read."""

    def __init__(self, stream: Any, digest: str | None, count: Callable[[int], None]) -> None:
        self._stream = stream
        self.digest = digest
        self._hash = hasher(digest) if digest else None
        self._count = count

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self._stream.read(min(size, CHUNK) if size >= 0 else CHUNK)
        if self._hash is not None:
            self._hash.update(data)
        self._count(len(data))
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def drain(self) -> None:
        while self.read(CHUNK):
            pass

    def is_wrong(self) -> bool:
        return self._hash is not None and self.digest != f"{self._hash.name}:{self._hash.hexdigest()}"


def hasher(digest: str) -> Any:
    """A hash for a digest whose form was checked; raises ImageError for an algorithm that is not known."""
    algorithm = digest.partition(":")[0]
    if algorithm not in ("sha256", "sha512"):
        raise ImageError(f"a digest by {algorithm!r}", "use an image with digests by sha256 or sha512")
    return hashlib.new(algorithm)


def _decompressed(stream: _Hashed) -> Any:
    buffered = io.BufferedReader(stream, CHUNK)
    head = buffered.peek(4)[:4]
    if head.startswith(GZIP):
        return gzip.GzipFile(fileobj=buffered, mode="rb")
    if head != ZSTD:
        return buffered
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdFile(buffered, options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_LOG)
    return decoder.stream_reader(buffered, read_across_frames=True)


def _zstd_error() -> type[Exception]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdError
    import zstandard

    return zstandard.ZstdError


def _add(archive: tar.Tar, member: tar.Member, tree: Tree, contents: Contents, budget: Budget) -> None:
    if tree.whiteout(member.name):
        return
    if member.kind == tar.LINK:
        tree.link(member.name, member.target)
        return
    kind = KINDS.get(member.kind)
    if kind is None:
        raise ImageError(f"{shown(member.name)} is of the unknown kind {member.kind!r}", REMEDY)
    for owner in (member.uid, member.gid):
        if not 0 <= owner < 0xFFFFFFFF:
            raise ImageError(f"{shown(member.name)} has the owner {owner}, which Linux has not", REMEDY)
    node = Node(kind | member.mode, member.uid, member.gid, member.mtime)
    node.rdev = member.rdev[0] & 0xFFF, member.rdev[1] & 0xFFFFF
    if member.xattrs:
        node.xattrs = {
            name.decode("utf-8", "surrogateescape"): value
            for name, value in member.xattrs.items()
            if name.startswith(KEPT_XATTRS)
        }
    if kind == stat.S_IFLNK:
        node.target = member.target
        if not 0 < len(node.target) < 4096 or b"\0" in node.target:
            raise ImageError(f"the link {shown(member.name)} has a target that no link can have", REMEDY)
    elif kind == stat.S_IFREG:
        if member.runs is not None or member.size > budget.left:  # holes are not read; or it is known now
            budget.spend(member.size)
        contents.add(archive.content(member), node)
    tree.put(member.name, node)
