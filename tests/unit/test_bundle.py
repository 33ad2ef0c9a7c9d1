"""The bundle of compiled modules: what is in it is what the sources say, whatever has happened to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import kvmpy

START = """
import sys
from kvmpy import bundle
bundle.use()
import json, kvmpy.core.units, kvmpy.core.regs, kvmpy.cli.options
bundle.keep()
where = {name: type(module.__loader__).__name__ for name, module in sys.modules.items() if name[:6] == "kvmpy."}
print(json.dumps([where, kvmpy.core.units.__file__, getattr(kvmpy.core.units, "PLANTED", 0)]))
"""


class Start(NamedTuple):
    bundled: set[str]
    file: str
    planted: int


class Place:
    """A copy of the package that starts may write into."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "kvmpy"
        self.source = self.package / "core/units.py"
        skip = shutil.ignore_patterns("__pycache__", "init", "agent")
        shutil.copytree(Path(kvmpy.__file__).parent, self.package, ignore=skip)

    def run(self, code: str, **more: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd="/", env=env | {"PYTHONPATH": str(self.package.parent)} | more
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, **more: str) -> Start:
        where, file, planted = json.loads(self.run(START, **more))
        return Start({name for name, loader in where.items() if loader == "_Loader"}, file, planted)

    @property
    def bundle(self) -> Path:
        (found,) = self.package.glob("__pycache__/bundle.*.marshal")
        return found


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_second_start_takes_its_modules_from_the_bundle(place: Place) -> None:
    first, second = place.start(), place.start()

    assert not first.bundled
    assert second.bundled >= {"kvmpy.core.units", "kvmpy.core.regs", "kvmpy.core", "kvmpy.cli"}
    assert first.file == second.file == str(place.source)


def test_a_start_that_misses_nothing_writes_nothing(place: Place) -> None:
    place.start()
    written = place.bundle.stat()

    place.start()

    assert place.bundle.stat().st_ino == written.st_ino


def test_a_start_that_misses_something_adds_it(place: Place) -> None:
    place.start()
    more = START.replace("import json,", "import json, kvmpy.core.ratelimit,")

    place.run(more)

    assert '"kvmpy.core.ratelimit": "_Loader"' in place.run(more)
    assert len(place.start().bundled) > 4


@pytest.mark.parametrize("same", ["length", "time"])
def test_a_changed_source_counts(place: Place, same: str) -> None:
    place.start()
    old = place.source.stat()
    text = place.source.read_text()
    if same == "time":
        place.source.write_text(f"PLANTED = 1\n{text}".replace("from __future__ import annotations\n", ""))
        os.utime(place.source, ns=(old.st_atime_ns, old.st_mtime_ns))
    else:
        docstring = text.split('"""')[1]
        planted = 'x"""\nPLANTED = 1\n"""'
        place.source.write_text(text.replace(docstring, planted.ljust(len(docstring), "x"), 1).replace(
            "from __future__ import annotations\n", "#" * 34 + "\n"
        ))  # fmt: skip
        assert place.source.stat().st_size == old.st_size

    changed = place.start()

    assert changed.planted == 1
    assert "kvmpy.core.units" not in changed.bundled
    assert "kvmpy.core.regs" in changed.bundled
    assert place.start() == changed._replace(bundled=changed.bundled | {"kvmpy.core.units"})


def test_a_damaged_bundle_is_made_anew(place: Place) -> None:
    place.start()
    whole = place.bundle.read_bytes()
    for data in (b"", b"\0" * 16, b"junk" * 1000, *(whole[:length] for length in (1, 15, 16, 17, 500, len(whole) - 1))):
        place.bundle.write_bytes(data)

        assert not place.start().bundled
        assert place.start().bundled


def test_a_bundle_for_other_folders_is_not_used(place: Place, tmp_path: Path) -> None:
    place.start()

    assert not place.start(PYTHONPATH=f"{place.package.parent}:{tmp_path}/more").bundled


def test_a_bundle_without_assertions_is_not_used_with_them(place: Place) -> None:
    place.start(PYTHONOPTIMIZE="1")

    assert not place.start().bundled


def test_nothing_is_written_where_python_is_not_to_write(place: Place) -> None:
    place.start(PYTHONDONTWRITEBYTECODE="1")

    assert not list(place.package.glob("__pycache__/bundle.*.marshal"))


def test_a_folder_that_takes_no_files_is_left_alone(place: Place) -> None:
    (place.package / "__pycache__").write_text("in the way")

    assert not place.start().bundled
    assert not place.start().bundled


def test_tracebacks_and_sources_are_those_of_the_files(place: Place) -> None:
    place.start()
    code = START + "import inspect, traceback\n" + (
        "print(len(inspect.getsource(kvmpy.core.units)))\n"
        "try: kvmpy.core.units.parse_seconds('x')\n"
        "except kvmpy.ConfigError: print(traceback.format_exc())\n"
    )  # fmt: skip

    lines = place.run(code).splitlines()

    assert int(lines[1]) == len(place.source.read_text())
    assert any(f'File "{place.source}"' in line for line in lines)
    assert any("raise ConfigError" in line for line in lines)
