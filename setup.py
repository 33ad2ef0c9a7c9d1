"""Builds kvmpy: metadata is in pyproject.toml, cffi compiles the C of the package, gcc the guest's init."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildWithInit(build_ext):
    """Also builds the first process of the built-in initramfs (guests/init.c), which the package ships."""

    def run(self) -> None:
        super().run()
        folder = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
        init = (folder / "kvmpy/boot/init").absolute()
        init.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["make", "-C", "guests", "init", f"INIT={init}"], check=True)


setup(
    cffi_modules=["kvmpy/_kvm_build.py:ffibuilder", "kvmpy/_virtqueue_build.py:ffibuilder"],
    cmdclass={"build_ext": BuildWithInit},
)
