"""PCI bus 0: it gives each function a page of the ECAM, and lets BARs answer inside its window."""

from __future__ import annotations

from ..core.bus import Bus, BusDevice
from ..core.errors import ConfigError
from .config import MULTIFUNCTION, ConfigSpace

FUNCTIONS = 8  # of a device
MAX_FUNCTIONS = 31 * FUNCTIONS  # of the 32 devices, number 0 is where a host bridge would be
ECAM_PAGE = 0x1000  # PCI Express Base 5.0, 7.2.2: of each function; bus, device and function number are its address
ECAM_BUS = 0x100000  # of all functions of a bus


class PciBus:
    """Bus 0 of segment 0, behind the addresses `ecam` and `window` of the memory bus.

    Functions that are there are found by scanning, in the order in which they were added: function 0 to 7 of device 1,
    then those of device 2. Where none is, reads of the ECAM float high, which means just that.
    """

    def __init__(self, memory: Bus, ecam: int, window: range) -> None:
        self._memory = memory
        self._ecam = ecam
        self._window = window
        self._next = window.start
        self.functions: list[ConfigSpace] = []

    def add(self, config: ConfigSpace) -> None:
        """Let the guest find one more function; raises ConfigError when the bus is full."""
        number = len(self.functions)
        if number == MAX_FUNCTIONS:
            raise ConfigError("no room for another PCI device", f"attach {MAX_FUNCTIONS} or fewer")
        if number % FUNCTIONS:
            self.functions[number - number % FUNCTIONS].header.header_type |= MULTIFUNCTION
        self._memory.add(self.config_address(number), ECAM_PAGE, config)
        self.functions.append(config)

    def config_address(self, number: int) -> int:
        """Where the configuration space of the function is that was added as number `number`."""
        return self._ecam + (FUNCTIONS + number) * ECAM_PAGE

    def allocate(self, size: int) -> int:
        """An address for a BAR of `size` bytes, a power of two; raises ConfigError when the window is full."""
        base = -(-self._next // size) * size
        if base + size > self._window.stop:
            raise ConfigError(f"no room for {size:#x} bytes of PCI memory", "attach fewer or smaller devices")
        self._next = base + size
        return base

    def map(self, base: int, size: int, device: BusDevice) -> bool:
        """Let `device` answer [base, base+size); False outside the window, where RAM and other devices are, and where
        another BAR answers. The guest chose the address."""
        if base < self._window.start or base + size > self._window.stop:
            return False
        try:
            self._memory.add(base, size, device)
        except ValueError:
            return False
        return True

    def unmap(self, base: int) -> None:
        """Let nobody answer any more what `map` gave at `base`."""
        self._memory.remove(base)
