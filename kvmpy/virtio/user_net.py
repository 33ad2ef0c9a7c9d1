"""A network card through passt whose guest knows its address beforehand, so that it needs no DHCP client."""

from __future__ import annotations

from ..host.passt import Address, Passt, parse_forwards
from .net import Net

ADDRESS = Address("10.0.2.15", 24, "10.0.2.2", "10.0.2.3")
IP_WORD = f"kvmpy.ip={ADDRESS.ip}::{ADDRESS.gateway}:255.255.255.0::eth0:off:{ADDRESS.nameserver}"  # guests/init.c


class UserNet(Net):
    """`publish` is that of Net; raises ConfigError."""

    def __init__(self, publish: str = "") -> None:
        super().__init__(backend="none")
        self._forwards = parse_forwards(publish) if publish else []

    def open(self) -> Passt:
        return Passt(self._forwards, address=ADDRESS)
