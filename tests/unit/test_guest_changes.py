"""What a guest has changed of its root: as its agent tells it of an overlay, and as it is kept on the host."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from agents import NativeAgent

from kvmpy.core.errors import ConfigError, GuestError
from kvmpy.guest import changes
from kvmpy.guest.changes import Changes, Keeper
from kvmpy.guest.protocol import Change, Entry

OPAQUE = "trusted.overlay.opaque"
DIR, REG, LNK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The upper folder and the one below it."""
    paths = tmp_path / "upper", tmp_path / "lower"
    for path, name in zip(paths, ("UPPER", "LOWER"), strict=True):
        path.mkdir()
        monkeypatch.setattr(changes, name, str(path))
    return paths


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")


def whiteout(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
    except PermissionError:
        pytest.skip("this host lets only root make whiteouts")


def test_added_changed_deleted(agent: NativeAgent, overlay: tuple[Path, Path], tmp_path: Path) -> None:
    upper, lower = overlay
    write(lower, "etc/passwd", "etc/gone", "etc/same", "dir/deep/f", "replaced/x")
    write(upper, "etc/passwd", "new/file", "replaced")
    (upper / "link").symlink_to("/etc/passwd")
    whiteout(upper / "etc/gone")
    whiteout(upper / "dir/deep")
    whiteout(upper / "never-was")

    told = agent.files.changes()
    keeper = Keeper(tmp_path / "kept", 1 << 20)
    again = agent.files.changes(keep=keeper)
    keeper.close()

    assert list(map(str, told)) == [
        "C /dir", "D /dir/deep", "C /etc", "D /etc/gone", "C /etc/passwd", "A /link", "A /new", "A /new/file",
        "C /replaced",
    ]  # fmt: skip
    assert again == told
    kept = tmp_path / "kept"
    names = {str(path.relative_to(kept)) for path in kept.rglob("*") if not path.is_dir()}
    assert names == {"dir/.wh.deep", "etc/.wh.gone", "etc/passwd", "link", "new/file", "replaced"}
    assert (kept / "etc/passwd").read_text() == "upper etc/passwd"
    assert (kept / "etc/.wh.gone").read_bytes() == b""
    assert (kept / "link").readlink() == Path("etc/passwd")
    assert keeper.left_out == []


def test_a_folder_that_was_removed_and_made_again(agent: NativeAgent, overlay: tuple[Path, Path]) -> None:
    upper, lower = overlay
    write(lower, "d/old", "d/sub/x", "d/both", "e/f")
    write(upper, "d/both", "d/new")
    try:
        os.setxattr(upper / "d", OPAQUE, b"y")
    except OSError as error:
        pytest.skip(f"no {OPAQUE} here: {error.strerror}")

    told = list(map(str, agent.files.changes()))

    assert told == ["C /d", "C /d/both", "A /d/new", "D /d/old", "D /d/sub"]


def test_folders_that_are_as_they_were_are_no_changes(agent: NativeAgent, overlay: tuple[Path, Path]) -> None:
    upper, _ = overlay
    for folder in overlay:
        (folder / "same/in").mkdir(parents=True)
        (folder / "mode").mkdir()
    (upper / "mode").chmod(0o700)

    assert list(map(str, agent.files.changes())) == ["C /mode"]


def test_what_the_machine_itself_writes(agent: NativeAgent, overlay: tuple[Path, Path]) -> None:
    upper, lower = overlay
    write(lower, "etc/hosts")
    write(upper, "etc/resolv.conf", "srv/mine")
    for name in ("dev", "proc", "srv/data", "mnt/volume"):
        (upper / name).mkdir(parents=True)

    told = agent.files.changes(["/etc/resolv.conf"], ["/srv/data", "/mnt/volume"])

    assert list(map(str, told)) == ["A /srv", "A /srv/mine"]


def test_a_root_without_an_overlay(agent: NativeAgent, overlay: tuple[Path, Path]) -> None:
    overlay[1].rmdir()

    with pytest.raises(ConfigError, match="no record of what was changed"):
        agent.files.changes()


def test_a_deep_and_wide_tree(agent: NativeAgent, overlay: tuple[Path, Path]) -> None:
    upper, _ = overlay
    write(upper, "d/" * 200 + "f", *(f"many/{number}" for number in range(500)))

    assert len(agent.files.changes()) == 200 + 1 + 501


def keep(tmp_path: Path, *entries: tuple[int, bytes, bytes]) -> Keeper:
    keeper = Keeper(tmp_path / "kept", 10)
    try:
        for mode, name, target in entries:
            keeper.change(Change.ADDED, name, Entry(mode, 0, 0, 2, 0, 0), target)
            keeper.data(b"data")
    finally:
        keeper.close()
    return keeper


def test_what_is_not_kept(tmp_path: Path) -> None:
    keeper = keep(
        tmp_path,
        (stat.S_IFBLK | 0o600, b"disk", b""),
        (LNK, b"out", b"../outside"),
        (LNK, b"absolute", b"/../../etc/passwd"),
        (REG | 0o7777, b"program", b""),
    )

    assert os.listdir(tmp_path / "kept") == ["program"]
    assert (tmp_path / "kept/program").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "kept/program").stat().st_mode) == 0o755
    assert [line.split()[0] for line in keeper.left_out] == ["/disk", "the", "the"]


@pytest.mark.parametrize("name", [b"../x", b"/x", b"a/../../x", b"", b"x/.."])
def test_names_that_lead_out(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(GuestError):
        keep(tmp_path, (REG, name, b""))

    assert os.listdir(tmp_path) == ["kept"]


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/x").touch()

    with pytest.raises(ConfigError, match="not an empty folder; give one that is new or empty"):
        Keeper(tmp_path / "kept", 1)
    with pytest.raises(ConfigError, match=r"no folder .*/no to make where in"):
        Keeper(tmp_path / "no/where", 1)


def test_more_than_a_guest_can_have_written(tmp_path: Path) -> None:
    files = [(REG, b"%d" % number, b"") for number in range(3)]

    with pytest.raises(ConfigError, match="more than can be kept; let the command make no large sparse files"):
        keep(tmp_path, *files)


def test_an_agent_that_lies() -> None:
    with pytest.raises(GuestError, match="kind 7"):
        list(Changes([], []).take(Entry(REG, 0, 0, 7, 0, 0), b"x"))
