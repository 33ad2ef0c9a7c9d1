"""Make an initramfs from chosen files, busybox and kernel modules, with kvmpy's init.

With --exec it runs one command and powers off; without, it gives a shell on the console.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="the image to write")
    parser.add_argument(
        "--file",
        metavar="HOST[:GUEST]",
        action="append",
        default=[],
        help="add a file or folder, with the shared libraries of programs; GUEST is the absolute path in the guest, "
        "by default the same as on the host (repeatable)",
    )
    parser.add_argument(
        "--module",
        metavar="NAME",
        action="append",
        default=[],
        help="load this kernel module first, with all that it needs (repeatable)",
    )
    parser.add_argument(
        "--modules-dir",
        metavar="DIR",
        help="where the modules are; by default the folder of the kernel that `kvmpy boot` would take",
    )
    parser.add_argument(
        "--busybox", metavar="PATH|none", default="auto", help="static busybox to put in; by default the host's"
    )
    parser.add_argument(
        "--exec", metavar="CMD", help="shell command, or file with a script, that init runs before it powers off"
    )
    parser.add_argument(
        "--compress",
        choices=("none", "gzip", "zstd", "lz4"),
        default="none",
        help="the guest's kernel must know the format (default: none, which boots fastest)",
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path
    from typing import Literal

    from ..boot import initramfs, kernels
    from ..core import progress
    from ..core.errors import HostError, NotFoundError

    modules_dir = Path(args.modules_dir) if args.modules_dir else None
    if args.module and modules_dir is None:
        kernel = kernels.find_kernel()
        modules_dir = kernels.modules_dir_for(kernel)
        if modules_dir is None:
            raise NotFoundError(f"no modules folder for {kernel}", "give one with --modules-dir")
    busybox: Path | Literal["auto"] | None = Path(args.busybox)
    if args.busybox in ("auto", "none"):
        busybox = "auto" if args.busybox == "auto" else None
    data = initramfs.build(
        exec=None if args.exec is None else initramfs.read_command(args.exec),
        files=[initramfs.parse_file(text) for text in args.file],
        busybox=busybox,
        modules=args.module,
        modules_dir=modules_dir,
    )
    try:
        with progress.working(f"compressing {args.output}"):
            compressed = initramfs.compress(data, args.compress)
        Path(args.output).write_bytes(compressed)
    except OSError as error:
        raise HostError(f"cannot write {args.output}: {error.strerror}", "give -o a file that can be written") from None
    return 0
