"""Builds kvmpy: metadata is in pyproject.toml, cffi compiles the C of the package, gcc the guest's init and agent."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildWithGuests(build_ext):
    """Also builds what the package ships for guests: the first process of the built-in initramfs, and the agent."""

    def run(self) -> None:
        super().run()
        folder = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        init, agent = (folder / "kvmpy/boot/init").absolute(), (folder / "kvmpy/guest/agent").absolute()
        init.parent.mkdir(parents=True, exist_ok=True)
        agent.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["make", "-C", "guests", "init", "agent", f"INIT={init}", f"AGENT={agent}"], check=True)


setup(
    cffi_modules=["kvmpy/_kvm_build.py:ffibuilder", "kvmpy/_virtqueue_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildWithGuests},
)
