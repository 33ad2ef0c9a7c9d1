"""Compiles the twin of the virtqueues with cffi, in API mode."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCE = (HERE / "_virtqueue.c").read_text()

ffibuilder = FFI()
# What Python sees of the source is declared there, once: its structures and numbers, and the functions named kvmpy_*.
for name in "MAX_REGIONS MAX_SEGMENTS LENGTH VNET_HEADER ETH_HEADER MAX_FRAME".split():
    ffibuilder.cdef(f"#define {name} ...")
for declaration in re.findall(r"^(?:enum|struct) (?:kvmpy_\w+|outcome) \{.*?^\};", SOURCE, re.M | re.S):
    plain = re.sub(r"/\*.*?\*/", "", declaration, flags=re.S)
    ffibuilder.cdef(plain.replace("[MAX_REGIONS]", "[...]"))
for function in re.findall(r"^static (int kvmpy_\w+\(.*?\))\n\{", SOURCE, re.M | re.S):
    ffibuilder.cdef(f"{function};")

ffibuilder.set_source("kvmpy._virtqueue", SOURCE, extra_compile_args=["-O2", "-Wall", "-Wextra"])
