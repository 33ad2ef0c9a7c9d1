"""Who may import whom: the layers of ARCHITECTURE.md, checked on the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvmpy"

# Layer: the layers (or modules) it may import from besides itself. A layer is a package, or a module of the top level.
ALLOWED = {
    "bundle": set(),
    "core": set(),
    "kvm": {"core", "_kvm_ioctls"},
    "jail": {"core", "_kvm_ioctls"},
    "x86": {"core", "kvm.state"},
    "boot": {"core", "x86"},
    "host": {"core"},
    "devices": {"core", "host"},
    "guest": {"core"},
    "oci": {"boot.cache", "core", "host"},
    "root": {"core", "oci", "virtio.root_disk"},
    "pci": {"core"},
    "virtio": {"core", "host", "pci", "_virtqueue"},
    "catalogue": {"core"},
    "testing": {"core", "pci", "virtio"},
    "faults": {"core", "host", "virtio"},
    "config": {"core", "x86.layout"},
    "console": {"core"},
    "mainboard": {"core", "kvm", "pci", "virtio", "x86.layout"},
    "vcpu": {"core", "kvm"},
    "foundation": {"config", "core", "kvm", "x86"},
    "machine": {
        "boot", "catalogue", "config", "console", "core", "devices", "foundation", "host", "kvm", "mainboard", "vcpu",
        "virtio", "x86",
    },
    "evidence": {"core", "kvm", "machine", "remains", "vcpu", "x86"},
    "remains": {"core", "kvm", "x86.layout"},
    "steward": {"core", "evidence", "kvm", "machine", "remains", "report", "jail"},
    "hints": {"core", "evidence", "kvm.exits"},
    "report": {"core", "evidence", "hints", "kvm.state", "machine", "x86.flags"},
    "sandbox": {"config", "core", "guest", "host", "machine", "oci.manifest", "report", "root", "virtio"},
    "named": {"core", "guest", "host"},
    "doctor": {"boot", "core", "host", "jail", "kvm"},
    "aio": {"guest", "machine", "oci.manifest", "sandbox"},
    "pool": {"core", "sandbox"},
    "oops": set(),
    "pytest_plugin": {"core", "doctor", "kvm", "machine", "oops", "report", "sandbox"},
    "cli": {
        "boot", "bundle", "catalogue", "config", "console", "core", "doctor", "foundation", "guest", "host", "jail",
        "kvm", "machine", "named", "report", "sandbox", "steward", "virtio",
    },
}  # fmt: skip
FREE = {"__init__", "__main__", "_kvm_build", "_kvm_ioctls", "_virtqueue_build"}  # the facade, the command, the C


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names, within kvmpy, of what a file imports, wherever in it the import stands."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("kvmpy.") for alias in node.names if alias.name.startswith("kvmpy."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module == "kvmpy":
                yield from (alias.name for alias in node.names)
            elif module.startswith("kvmpy."):
                inner = module.removeprefix("kvmpy.")
                # `from .x86 import layout` names a module; `from .x86.layout import RSDP` names what is in one
                yield from (
                    f"{inner}.{alias.name}" if (PACKAGE / inner.replace(".", "/")).is_dir() else inner
                    for alias in node.names
                )


FILES = sorted(path for path in PACKAGE.rglob("*.py") if layer_of(path) not in FREE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    layer = layer_of(path)
    allowed = {layer} | ALLOWED[layer]

    foreign = [
        name for name in imports(path) if not any(name == item or name.startswith(item + ".") for item in allowed)
    ]

    assert foreign == []


def test_only_kvm_and_the_jail_import_the_shim() -> None:
    importers = {layer_of(path) for path in FILES if any(name.startswith("_kvm_ioctls") for name in imports(path))}

    assert importers == {"kvm", "jail"}


def test_only_the_twin_imports_the_virtqueues_in_c() -> None:
    importers = {path.name for path in FILES if any(name.startswith("_virtqueue") for name in imports(path))}

    assert importers == {"twin.py"}


def test_core_is_stdlib_only() -> None:
    foreign = set()
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.parse(path.read_text()).body:  # log.py loads structlog when it writes its first line
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            foreign |= {name.split(".")[0] for name in names}

    import sys

    assert foreign <= set(sys.stdlib_module_names)
