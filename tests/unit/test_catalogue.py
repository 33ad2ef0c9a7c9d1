"""What `--device` takes: names, files of the user's own, options by their type hints."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy import catalogue
from kvmpy.core.errors import ConfigError, NotFoundError
from kvmpy.virtio.rng import Rng

MINE = '''
from pathlib import Path
from beside import DEFAULT

class Mine:
    """A device with options of each kind."""

    def __init__(
        self, path: Path, size: int = DEFAULT, rate: float | None = None, ro: bool = False, name: str = "x"
    ) -> None:
        self.options = (path, size, rate, ro, name)

    def attach(self, board: object) -> None:
        pass

class Plain:
    def attach(self, board: object) -> None:
        pass
'''


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("DEFAULT = 7\n")
    return str(tmp_path / "mine.py")


def test_name() -> None:
    assert isinstance(catalogue.make("virtio-rng"), Rng)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("path=a", (Path("a"), 7, None, False, "x")),
        ("path=a,ro,size=0x10", (Path("a"), 16, None, True, "x")),
        ("path=a,ro=off,rate=0.5,name=n", (Path("a"), 7, 0.5, False, "n")),
        ("path=a,,b=c,ro=on", (Path("a,b=c"), 7, None, True, "x")),
    ],
)
def test_file_of_the_users_own(mine: str, options: str, expected: object) -> None:
    assert catalogue.make(f"{mine}:Mine,{options}").options == expected


def test_without_options(mine: str) -> None:
    assert type(catalogue.make(f"{mine}:Plain")).__name__ == "Plain"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("virtio-bulk", 'unknown device "virtio-bulk"; use virtio-'),
        ("", 'unknown device ""; use virtio-'),
        ("virtio-rng,speed=3", 'virtio-rng has no option "speed"; it has none'),
        ("{mine}:Other", '{mine} has no device "Other"; it has Mine, Plain'),
        ("{mine}:DEFAULT", '{mine} has no device "DEFAULT"; it has Mine, Plain'),
        ("{mine}:Mine", '{mine}:Mine needs the option "path"; write {mine}:Mine,path=...'),
        ("{mine}:Mine,path", "{mine}:Mine: option path needs a value; write path=..."),
        ("{mine}:Mine,path=", "{mine}:Mine: option path needs a value; write path=..."),
        ("{mine}:Mine,path=a,path=b", '{mine}:Mine: option "path" is given twice; give it once'),
        ("{mine}:Mine,path=a,size=big", '{mine}:Mine: option size: "big" is no number; use e.g. 10'),
        ("{mine}:Mine,path=a,ro=maybe", '{mine}:Mine: option ro: "maybe" is no switch; use on or off'),
        ("{mine}:Mine,path=a,colour=red", '{mine}:Mine has no option "colour"; it has path, size, rate, ro, name'),
    ],
)
def test_mistakes(mine: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        catalogue.make(text.replace("{mine}", mine))

    assert str(error.value).startswith(message.replace("{mine}", mine))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file .*none\.py; give the path"):
        catalogue.make(f"{tmp_path}/none.py:Mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nothing_like_it\n", "line 1: ModuleNotFoundError: No module named"),
        ("\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("\ndef f(:\n", "line 2: SyntaxError: "),
    ],
)
def test_file_with_a_mistake(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)

    with pytest.raises(ConfigError) as error:
        catalogue.make(f"{path}:Mine")

    assert str(error.value).startswith(f"{path}, {message}")


def test_all_names_lead_to_classes() -> None:
    for name in catalogue.CATALOGUE:
        assert hasattr(catalogue.find(name), "attach")
