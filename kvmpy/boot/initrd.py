"""Joins initrd files into the one buffer a kernel takes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..core.errors import ImageError
from . import files


def read(paths: Sequence[str | os.PathLike[str]], ram_size: int) -> bytes:
    """All files at `paths` in order, with zeros between them up to a multiple of 4, where the kernel looks for the next
    archive (Documentation/driver-api/early-userspace/buffer-format.rst).

    Raises NotFoundError, HostError, and ImageError for an empty file or more than `ram_size` bytes in total.
    """
    parts: list[memoryview | bytes] = []
    total = 0
    for path in paths:
        content = files.read(path, "initrd", max(ram_size - total, 0), "give more with --mem, or a smaller initrd")
        if not content:
            raise ImageError(f"initrd {os.fspath(path)} is empty", "make one with kvmpy initrd, or leave it out")
        padding = bytes(-total % 4)
        parts += [padding, content]
        total += len(padding) + len(content)
    return b"".join(parts)
