"""A KVM-backed virtual machine monitor for x86-64 Linux.

    import kvmpy

    with kvmpy.Machine(kernel="bzImage", initrd="initrd.img", mem="512M") as vm:
        vm.wait_for_console("login:", timeout=60)
        vm.console.send("root\n")

Names are loaded when they are first used: `import kvmpy` by itself costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for True, whatever it says

if TYPE_CHECKING:
    from typing import Any

    from .aio import AsyncSandbox as AsyncSandbox
    from .config import MachineConfig as MachineConfig
    from .console import ConsoleTimeout as ConsoleTimeout
    from .core.board import Board as Board
    from .core.board import Reason as Reason
    from .core.board import Stop as Stop
    from .core.errors import AgentError as AgentError
    from .core.errors import CommandError as CommandError
    from .core.errors import CommandFailed as CommandFailed
    from .core.errors import ConfigError as ConfigError
    from .core.errors import GuestFileError as GuestFileError
    from .core.errors import GuestLost as GuestLost
    from .core.errors import HostError as HostError
    from .core.errors import ImageError as ImageError
    from .core.errors import KvmError as KvmError
    from .core.errors import KvmpyError as KvmpyError
    from .core.errors import NotFoundError as NotFoundError
    from .core.errors import TimedOut as TimedOut
    from .core.errors import TooLarge as TooLarge
    from .core.regs import Bits as Bits
    from .core.regs import Device as Device
    from .core.regs import Field as Field
    from .core.regs import Reg as Reg
    from .core.regs import RegisterDevice as RegisterDevice
    from .core.regs import bit as bit
    from .machine import Machine as Machine
    from .pool import SandboxPool as SandboxPool
    from .sandbox import Sandbox as Sandbox

_HOMES = {
    "Machine": "machine",
    "AsyncSandbox": "aio",
    "Sandbox": "sandbox",
    "SandboxPool": "pool",
    "MachineConfig": "config",
    "ConsoleTimeout": "console",
    "Board": "core.board",
    "Reason": "core.board",
    "Stop": "core.board",
    "AgentError": "core.errors",
    "CommandError": "core.errors",
    "CommandFailed": "core.errors",
    "ConfigError": "core.errors",
    "GuestFileError": "core.errors",
    "GuestLost": "core.errors",
    "HostError": "core.errors",
    "ImageError": "core.errors",
    "KvmError": "core.errors",
    "KvmpyError": "core.errors",
    "NotFoundError": "core.errors",
    "TimedOut": "core.errors",
    "TooLarge": "core.errors",
    "Bits": "core.regs",
    "Device": "core.regs",
    "Field": "core.regs",
    "Reg": "core.regs",
    "RegisterDevice": "core.regs",
    "bit": "core.regs",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvmpy' has no attribute {name!r}")
    from importlib import import_module  # half a millisecond, which the command line does without

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
