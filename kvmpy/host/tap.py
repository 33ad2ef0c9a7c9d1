"""A tap interface of the host, with offloads (Documentation/networking/tuntap.rst, <linux/if_tun.h>)."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Sequence

from ..core.errors import ConfigError, HostError
from .frames import MAX_FRAME, VLAN_TAG, VNET_HEADER, Frame

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
IFREQ = struct.Struct("16sH22x")  # struct ifreq: the name, and ifr_flags
NEW = "kvmpy%d"  # the kernel puts the first free number in
NAME = re.compile(r"(?!\.{1,2}$)[!-.0-9;-~]{1,15}")  # dev_valid_name(): no space, no slash, no colon

REMEDIES = {
    errno.EPERM: "run as root, or make one for yourself: sudo ip tuntap add {name} mode tap user $USER",
    errno.EACCES: "run as root, or give your user access to it",
    errno.ENOENT: "load the kernel's module: sudo modprobe tun",
    errno.ENODEV: "load the kernel's module: sudo modprobe tun",
    errno.EBUSY: "end the program that uses it, or name another one",
    errno.EINVAL: "name a tap interface: this one is of another kind, or made with multi_queue",
}


def check_name(name: str) -> None:
    """Raises ConfigError unless an interface can have this name."""
    if not NAME.fullmatch(name) or "%" in name:
        raise ConfigError(f'"{name}" is no name for a network interface', "use up to 15 letters and digits")


class Tap:
    """A NetBackend on the tap interface `name`, made if there is none (then it goes with us); None: a new one.

    Bringing it up, addresses and bridges are the user's. `name` is the one that the interface has.
    """

    vnet_header = True

    def __init__(self, name: str | None = None) -> None:
        """Raises HostError when the interface cannot be had."""
        wanted = name or NEW
        self._fd = -1
        try:
            self._fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            request = IFREQ.pack(wanted.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            self.name = IFREQ.unpack(fcntl.ioctl(self._fd, TUNSETIFF, request))[0].rstrip(b"\0").decode()
            fcntl.ioctl(self._fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
        except OSError as error:
            what = DEVICE if self._fd < 0 else f"tap interface {name}" if name else "a new tap interface"
            self.close()
            remedy = REMEDIES.get(error.errno or 0, "").format(name=name or "tap0")
            raise HostError(f"cannot use {what}: {error.strerror}", remedy) from None
        self.buffer = memoryview(bytearray(VNET_HEADER + MAX_FRAME + VLAN_TAG))

    def set_offloads(self, flags: int) -> None:
        """Which frames the guest takes unfinished: TUN_F_CSUM without checksum, the others also unsegmented."""
        try:
            fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)
        except OSError as error:
            raise self._gone(error) from None

    def fileno(self) -> int:
        return self._fd

    def send(self, frame: Sequence[Frame]) -> bool:
        try:
            os.writev(self._fd, frame)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EBADFD:
                raise self._gone(error) from None
            # EIO: the interface is down; EINVAL: a header that this kernel does not take; ENOBUFS. Lost, as on a wire.
        return True

    def flush(self) -> bool:
        return True

    def receive(self) -> Frame | None:
        try:
            count = os.readv(self._fd, [self.buffer])
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone(error) from None
        return self.buffer[:count]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _gone(self, error: OSError) -> HostError:
        why = "is gone" if error.errno == errno.EBADFD else f"fails: {error.strerror}"
        return HostError(f"tap interface {self.name} {why}")
