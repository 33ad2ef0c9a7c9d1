#!/usr/bin/env python3
"""Deletes and weakens bounds checks one by one, and tells for which of them no unit test fails.

    scripts/lib/mutate.py [-j N] [--seconds S] [NAME...]     NAME: a key of TARGETS; default all

A check is an `if`, the bound of a loop, or a min() or max(). It is taken out where it leads to an early end, made off
by one in each of its comparisons, or loses one of its parts. Each change is made in a copy of the
checkout, whose tests for that module then run until the first fails. What survives is either tested by nothing, or
makes no difference: that is for people to say.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RING = "test_virtio_queue test_hostile_ring"
BOOT = "test_boot_fuzz test_boot_image test_boot_loader test_boot_files"
TARGETS = {  # modules of kvmpy, and the tests that are for each, the quickest first
    "core/memory": "test_memory",
    "virtio/queue": RING,
    "virtio/transport": "test_virtio_transport test_hostile_transport",
    "virtio/mmio": "test_virtio_transport test_hostile_transport",
    "virtio/blk": "test_virtio_blk test_hostile_blk",
    "virtio/net": "test_virtio_net test_hostile_devices",
    "virtio/vsock": "test_virtio_vsock test_hostile_vsock",
    "virtio/vsock_stream": "test_virtio_vsock test_hostile_vsock",
    "virtio/console": "test_virtio_console test_hostile_devices",
    "virtio/balloon": "test_virtio_balloon test_hostile_devices",
    "virtio/rng": "test_virtio_rng test_hostile_devices",
    "virtio/fs": "test_virtio_fs",
    "host/fuse": "test_fuse test_virtio_fs test_fuse_mount",
    "host/fuse_folder": "test_fuse test_virtio_fs test_fuse_mount",
    "host/fuse_nodes": "test_fuse test_virtio_fs test_fuse_mount",
    "boot/bzimage": f"test_boot_bzimage {BOOT}",
    "boot/elf": f"test_boot_elf test_boot_pvh {BOOT}",
    "boot/multiboot": f"test_boot_multiboot {BOOT}",
    "boot/linux64": f"test_boot_linux64 {BOOT}",
    "boot/placement": f"test_boot_linux64 test_boot_pvh {BOOT}",
    "boot/payload": f"test_boot_payload {BOOT}",
    "boot/cmdline": "test_boot_cmdline",
    "pci/config": "test_pci test_virtio_pci",
    "pci/bus": "test_pci test_virtio_pci",
    "pci/msix": "test_pci test_virtio_pci",
}
WEAKER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
ENDS = (ast.Raise, ast.Return, ast.Continue, ast.Break)


class Mutant(NamedTuple):
    path: Path  # of the module, below kvmpy/
    line: int
    begin: int  # of what is replaced, in bytes
    end: int
    text: str


def mutants(path: Path) -> Iterator[Mutant]:
    """All of a module."""
    source = (ROOT / "kvmpy" / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(node: ast.expr) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[(node.end_lineno or 0) - 1] + (
            node.end_col_offset or 0
        )

    def made(node: ast.expr, text: str) -> Mutant:
        return Mutant(path, node.lineno, *place(node), text)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and not typing_only(node):
            if isinstance(node.body[-1], ENDS):
                yield made(node.test, "False")
                if isinstance(node.body[-1], ast.Return) and node.body[-1].value is not None:
                    yield made(node.test, "True")
            yield from weaker(node.test, source, place, path)
            if isinstance(node.test, ast.BoolOp):
                constant = "False" if isinstance(node.test.op, ast.Or) else "True"
                yield from (made(part, constant) for part in node.test.values)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Compare | ast.BoolOp):
            yield from weaker(node.value, source, place, path)
        elif isinstance(node, ast.While) and not isinstance(node.test, ast.Constant):
            yield from weaker(node.test, source, place, path)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max") and len(node.args) == 2:
            for argument in node.args:
                begin, end = place(argument)
                yield made(node, source[begin:end].decode())


def weaker(test: ast.expr, source: bytes, place: Callable[[ast.expr], tuple[int, int]], path: Path) -> Iterator[Mutant]:
    """Each comparison of `test` off by one."""
    for node in ast.walk(test):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        for at, sign in enumerate(node.ops):
            if type(sign) in WEAKER:
                begin, end = place(sides[at])[1], place(sides[at + 1])[0]
                between = source[begin:end].decode().replace(SIGNS[type(sign)], WEAKER[type(sign)], 1)
                yield Mutant(path, node.lineno, begin, end, between)


def typing_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


class Worker(threading.Thread):
    """Tries mutants in a copy of its own."""

    def __init__(self, work: deque[tuple[str, Mutant]], found: list[Mutant], folder: Path, limit: float) -> None:
        super().__init__()
        self.work, self.found, self.limit = work, found, limit
        self.copy = folder / self.name
        ignored = shutil.ignore_patterns(".git", ".venv", "venv", ".*_cache", ".hypothesis", "__pycache__")
        shutil.copytree(ROOT, self.copy, ignore=ignored, symlinks=True)
        self.tried = 0

    def run(self) -> None:
        while self.work:
            try:
                tests, mutant = self.work.popleft()
            except IndexError:
                return
            path = self.copy / "kvmpy" / mutant.path
            whole = path.read_bytes()
            path.write_bytes(whole[: mutant.begin] + mutant.text.encode() + whole[mutant.end :])
            try:
                if run(self.copy, tests, self.limit) == 0:
                    self.found.append(mutant)
                    print("survived", described(mutant), flush=True)
            finally:
                path.write_bytes(whole)
            self.tried += 1


def run(copy: Path, tests: str, limit: float) -> int:
    """The status of the tests; a child that has loaded what takes long already, and is killed when its time is up."""
    files = [f"tests/unit/{name}.py" for name in tests.split() if (copy / f"tests/unit/{name}.py").exists()]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = str(copy)
            sys.path.insert(0, str(copy))
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)
            import pytest

            known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there before the plugin
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:kvmpy", *known, *files]))
        finally:
            os._exit(status)
    deadline = time.monotonic() + limit
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1
        time.sleep(0.02)


def described(mutant: Mutant) -> str:
    source = (ROOT / "kvmpy" / mutant.path).read_bytes()
    begin = source.rindex(b"\n", 0, mutant.begin) + 1
    end = source.index(b"\n", mutant.end)
    before = source[begin:end].decode().strip()
    after = (source[begin : mutant.begin] + mutant.text.encode() + source[mutant.end : end]).decode().strip()
    return f"kvmpy/{mutant.path}:{mutant.line}\n    {before}\n    {after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("-j", type=int, default=1, metavar="N", help="copies at work (default 1)")
    parser.add_argument("--seconds", type=float, default=100.0, metavar="S", help="for the tests of one change")
    parser.add_argument("--list", action="store_true", help="only tell what would be changed")
    args = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401 - children have them
    import pytest  # noqa: F401

    work: deque[tuple[str, Mutant]] = deque()
    for name in args.names or TARGETS:
        work += ((TARGETS[name], mutant) for mutant in mutants(Path(f"{name}.py")))
    if args.list:
        print(*(described(mutant) for _, mutant in work), f"{len(work)} changes", sep="\n")
        return 0
    count, begin = len(work), time.monotonic()
    found: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="kvmpy-mutate-") as folder:
        workers = [Worker(work, found, Path(folder), args.seconds) for _ in range(args.j)]
        for tests in sorted({tests for tests, _ in work}):
            if run(workers[0].copy, tests, 5 * args.seconds) != 0:
                raise SystemExit(f"mutate: these fail, or take too long, without any change: {tests}")
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    print(f"{count} changes, {len(found)} survived, {time.monotonic() - begin:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
