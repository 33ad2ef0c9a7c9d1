"""A disk that kvmpy's init makes the guest's root, with a tmpfs above it for what is written (guests/init.c)."""

from __future__ import annotations

from pathlib import Path

from ..core.board import Board
from ..core.errors import HostError
from ..host import filesystems
from ..host.disk import QCOW2_MAGIC, open_image
from ..host.filesystems import Found
from .blk import Blk

SERIAL = "kvmpy-root"  # by which init finds it


class RootDisk(Blk):
    """The image at `path`, which is never written to: what its file system's driver must write is forgotten.

    Raises NotFoundError, ImageError and HostError for the image, ConfigError when no file system is found in it.
    """

    def __init__(self, path: Path) -> None:
        format = "qcow2" if _head(path) == QCOW2_MAGIC else "raw"
        self.found = _probe(path, format)
        # Guessing the format is safe here: no guest writes to this image, and no backing file is opened.
        super().__init__(path=path, format=format, ro=not self.found.dirty, snapshot=self.found.dirty, serial=SERIAL)

    def attach(self, board: Board) -> None:
        super().attach(board)
        board.cmdline(f"kvmpy.root=disk:{self.found.partition}:{self.found.name}")


def _probe(path: Path, format: str) -> Found:
    image = open_image(path, read_only=True, cache="writeback", snapshot=False, format=format, backing=False)
    try:
        return filesystems.find(image, str(path))
    except OSError as error:
        raise HostError(f"cannot read disk image {path}: {error.strerror}", "copy it anew") from None
    finally:
        image.close()


def _head(path: Path) -> bytes:
    """Nothing for what cannot be read: who opens it as an image says why."""
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(len(QCOW2_MAGIC))
    except OSError:
        return b""
