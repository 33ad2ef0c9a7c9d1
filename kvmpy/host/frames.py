"""What stands behind a network device on the host: something that takes and gives whole Ethernet frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

ETH_HEADER = 14  # bytes: two addresses and a type (IEEE 802.3)
VLAN_TAG = 4
MAX_FRAME = ETH_HEADER + 0xFFFF  # bytes: the longest IP packet, as segmentation offload hands it over
VNET_HEADER = 12  # bytes of struct virtio_net_hdr in front of a frame (VIRTIO 1.2, 5.1.6)

Frame = bytes | memoryview


class NetBackend(Protocol):
    """One end of a wire. No method blocks; each raises HostError when the other end has gone, for good.

    `vnet_header` says that every frame, in both directions, begins with a struct virtio_net_hdr.
    """

    vnet_header: bool

    def fileno(self) -> int:
        """Readable when a frame may wait, writable when one can be sent; hung up when the other end has gone."""

    def send(self, frame: Sequence[Frame]) -> bool:
        """Take the frame that these pieces make up; False: no room, try again when writable. As on any wire, a frame
        that was taken may be lost."""

    def flush(self) -> bool:
        """Send what is left of the last frame; False: some still is, and `send` must wait."""

    def receive(self) -> Frame | None:
        """The next frame, valid until the next call; None: none is there."""

    def close(self) -> None: ...
