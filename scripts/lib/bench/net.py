"""A network card: frames from and to a ring that is prepared once, over a stream socket; segments to a tap."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import phases
from .contenders import BUILD, Contender, Job, found
from .harness import Failed, Figure, Options, Run
from .phases import Measured, Phase

SEND, RECEIVE, SEND_TSO = range(3)  # guests/bench/net.c
SIZES = {"64 B": 64, "1500 B": 1514, "64 KiB": 14 + 0xFFFF}  # of frames with their Ethernet header
DEPTH = 64
TAP = f"kvmpy{os.getpid()}"
SLICES = 5  # of each round


def runs(options: Options, folder: Path) -> dict[str, Run]:
    tap = can_make_taps()
    if not tap:
        print("net: no right to make a tap interface: no TSO", file=sys.stderr)
    probe = Job(nets=(Path(),))
    monitors = [monitor for monitor in found() if not monitor.lacks(probe)]
    return {monitor.name: partial(run, monitor, folder / "net.sock", options, tap) for monitor in monitors}


def run(contender: Contender, path: Path, options: Options, tap: bool) -> Iterator[Figure]:
    sends = [Phase(SEND, DEPTH, size) for size in SIZES.values()]
    with peer(path, "sink"):
        results = phases.run(contender, "net", Job(nets=(path,)), sends, options.seconds)
    for (name, size), done in zip(SIZES.items(), results, strict=True):
        yield from figures(f"send {name}", size, done)
    for name, size in list(SIZES.items())[: 1 if options.smoke else None]:
        with peer(path, "source", str(size)):
            (done,) = phases.run(contender, "net", Job(nets=(path,)), [Phase(RECEIVE, DEPTH, size)], options.seconds)
        yield from figures(f"receive {name}", size, done)
    if tap:
        for name, kind, size in (("1500 B, tap", SEND, 1514), ("64 KiB TSO, tap", SEND_TSO, 14 + 0xFFFF)):
            with interface():
                (done,) = phases.run(contender, "net", Job(taps=(TAP,)), [Phase(kind, DEPTH, size)], options.seconds)
                came = int(Path(f"/sys/class/net/{TAP}/statistics/rx_packets").read_text())
            if came < done.operations:
                raise Failed(f"sent {done.operations} frames, {came} came through the tap")
            yield from figures(f"send {name}", size, done)


def figures(case: str, size: int, done: Measured) -> Iterator[Figure]:
    yield Figure(case, "packets/s", done.operations / done.seconds)
    yield Figure(case, "Gbit/s", done.operations * size * 8 / done.seconds / 1e9)
    yield Figure(case, "cpu us", done.cpu / done.operations * 1e6)


@contextmanager
def peer(path: Path, *words: str) -> Iterator[None]:
    """net_peer.c on the socket `path`, for one connection."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        process = subprocess.Popen([BUILD / "net_peer", *words], stdin=server)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def can_make_taps() -> bool:
    try:
        with interface():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def interface() -> Iterator[None]:
    """A tap interface that is up and has no address: the host's stack drops what is sent to it."""
    ip = partial(subprocess.run, check=True, stderr=subprocess.DEVNULL)
    ip(["ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr", "user", str(os.getuid())])
    try:
        Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6").write_text("1")  # it would send by itself
        ip(["ip", "link", "set", TAP, "up"])
        yield
    finally:
        ip(["ip", "tuntap", "del", "dev", TAP, "mode", "tap"])
