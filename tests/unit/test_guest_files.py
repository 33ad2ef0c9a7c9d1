"""Files through the agent; and trees from a guest that wants to reach what is outside of them."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from agents import NativeAgent

from kvmpy.core.errors import (
    ConfigError,
    GuestError,
    GuestFileError,
    GuestLost,
    HostError,
    NotFoundError,
    TimedOut,
    TooLarge,
)
from kvmpy.guest import protocol
from kvmpy.guest.files import Files
from kvmpy.guest.protocol import HELLO, UNCHANGED, Entry, FileRequest, How, Kind, frame

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
GREETING = frame(Kind.HELLO, HELLO)


@pytest.fixture
def files(agent: NativeAgent) -> Files:
    return agent.files


def test_read_and_write(files: Files, tmp_path: Path) -> None:
    data = os.urandom(200_000)
    path = tmp_path / "file"

    files.write(path, data)
    files.write(path, b"more", append=True)

    assert path.read_bytes() == data + b"more"
    assert files.read(path) == data + b"more"
    assert files.read(path, offset=100_000, size=70_000) == data[100_000:170_000]
    assert files.read(path, offset=200_002, size=70_000) == b"re"
    assert files.read(path, size=0) == b""
    assert files.read("/proc/self/comm") == b"agent\n"
    files.write(path, b"")
    assert (path.read_bytes(), files.read(path)) == (b"", b"")


def test_modes_and_folders_above(files: Files, tmp_path: Path) -> None:
    files.write(tmp_path / "a/b/new", b"1", parents=True)
    files.write(tmp_path / "a/b/secret", b"1", mode=0o600)
    files.write(tmp_path / "a/b/secret", b"2")
    files.write(tmp_path / "a/b/secret", b"3", atomic=True)

    modes = {info.name: oct(stat.S_IMODE(info.mode)) for info in files.list(tmp_path / "a/b")}
    assert modes == {"new": "0o644", "secret": "0o600"}
    assert (tmp_path / "a/b/secret").read_bytes() == b"3"


def test_an_atomic_write_replaces_the_file(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as old:
        files.write(path, b"new", atomic=True)
        assert old.read() == "old"

    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_an_atomic_write_that_is_broken_off_leaves_nothing(agent: NativeAgent, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    request = bytes(FileRequest(How.ATOMIC, UNCHANGED, UNCHANGED, UNCHANGED, 0, 0)) + protocol.strings(bytes(path))
    with agent.connect() as connection:
        connection.sendall(GREETING + frame(Kind.WRITE, request) + frame(Kind.DATA, b"half"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(100):
            pass

    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_exclusive(files: Files, tmp_path: Path) -> None:
    for atomic in (False, True):
        files.write(tmp_path / f"{atomic}", b"1", exclusive=True, atomic=atomic)
        with pytest.raises(GuestFileError) as caught:
            files.write(tmp_path / f"{atomic}", b"2" * 3_000_000, exclusive=True, atomic=atomic)
        assert caught.value.errno == errno.EEXIST
        assert (tmp_path / f"{atomic}").read_bytes() == b"1"
    with pytest.raises(ConfigError):
        files.write(tmp_path / "x", b"", atomic=True, append=True)


def test_stat_and_list(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    (tmp_path / "file").chmod(0o640)
    os.utime(tmp_path / "file", ns=(0, 1_500_000_000_250_000_000))
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "\udcff folder").mkdir()

    file, link, folder = files.list(tmp_path)

    assert (file.name, file.is_file, file.size, oct(file.mode), file.links) == ("file", True, 5, "0o100640", 1)
    assert (file.mtime, file.uid, file.gid) == (1_500_000_000.25, os.geteuid(), os.getegid())
    assert (link.name, link.is_link, link.target) == ("link", True, "file")
    assert (folder.name, folder.is_folder) == ("\udcff folder", True)
    assert files.stat(tmp_path / "link").size == 5
    assert files.stat(tmp_path / "link", follow=False).target == "file"
    assert files.list(tmp_path / "\udcff folder") == ()
    assert files.exists(tmp_path / "link")
    assert not files.exists(tmp_path / "nothing")
    assert not files.exists(tmp_path / "file/nothing")


def test_a_time_before_1970(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.utime(tmp_path / "file", ns=(0, -1_500_000_000))

    files.get(tmp_path / "file", tmp_path / "got")
    files.put(tmp_path / "got", tmp_path / "put")

    assert files.stat(tmp_path / "file").mtime == -1.5
    assert (tmp_path / "put").stat().st_mtime_ns == -1_500_000_000


def test_a_folder_with_many_files(files: Files, tmp_path: Path) -> None:
    for i in range(500):
        (tmp_path / f"{i:03}").touch()

    assert [info.name for info in files.list(tmp_path)] == [f"{i:03}" for i in range(500)]


def test_folders_are_made_and_removed(files: Files, tmp_path: Path) -> None:
    files.mkdir(tmp_path / "one", mode=0o700)
    files.mkdir(tmp_path / "two/three/four", parents=True)
    files.mkdir(tmp_path / "two", parents=True)
    (tmp_path / "two/file").write_text("")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("")
    (tmp_path / "two/three/link").symlink_to(tmp_path / "outside")

    files.remove(tmp_path / "two", recursive=True)
    files.remove(tmp_path / "one")

    assert os.listdir(tmp_path) == ["outside"]
    assert os.listdir(tmp_path / "outside") == ["kept"]


def test_rename(files: Files, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")

    with pytest.raises(GuestFileError) as caught:
        files.rename(tmp_path / "a", tmp_path / "b", replace=False)
    files.rename(tmp_path / "a", tmp_path / "b")

    assert caught.value.errno == errno.EEXIST
    assert (os.listdir(tmp_path), (tmp_path / "b").read_text()) == (["b"], "a")


@needs_root
def test_owners(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("")
    (tmp_path / "tree/link").symlink_to("file")

    files.write(tmp_path / "written", b"", owner=(1, 2), mode=0o4755)
    files.mkdir(tmp_path / "made", owner=(3, 4))
    files.put(tmp_path / "tree", tmp_path / "put", owner=(5, 6))

    found = [files.stat(tmp_path / n, follow=False) for n in ("written", "made", "put", "put/file", "put/link")]
    assert [(info.uid, info.gid) for info in found] == [(1, 2), (3, 4), (5, 6), (5, 6), (5, 6)]
    assert oct(found[0].mode) == "0o104755"


@pytest.mark.parametrize(
    ("what", "number"),
    [
        (lambda files, path: files.read(path / "nothing"), errno.ENOENT),
        (lambda files, path: files.read(path), errno.EISDIR),
        (lambda files, path: files.write(path, b"x"), errno.EISDIR),
        (lambda files, path: files.write(path, b"x", atomic=True), errno.EISDIR),
        (lambda files, path: files.write(path / "nothing/x", b"x"), errno.ENOENT),
        (lambda files, path: files.write(path / "fifo", b"x"), errno.ENXIO),
        (lambda files, path: files.list(path / "file"), errno.ENOTDIR),
        (lambda files, path: files.stat(path / "nothing"), errno.ENOENT),
        (lambda files, path: files.mkdir(path / "file"), errno.EEXIST),
        (lambda files, path: files.mkdir(path / "file", parents=True), errno.ENOTDIR),
        (lambda files, path: files.mkdir(path / "nothing/x"), errno.ENOENT),
        (lambda files, path: files.remove(path / "nothing"), errno.ENOENT),
        (lambda files, path: files.remove(path), errno.ENOTEMPTY),
        (lambda files, path: files.remove(path / "nothing", recursive=True), errno.ENOENT),
        (lambda files, path: files.rename(path / "nothing", path / "x"), errno.ENOENT),
        (lambda files, path: files.get(path / "nothing", path / "x"), errno.ENOENT),
        (lambda files, path: files.put(path / "file", path / "nothing/x"), errno.ENOENT),
        (lambda files, path: files.put(path / "file", path), errno.EEXIST),
        (lambda files, path: files.read(path / ("x" * 300)), errno.ENAMETOOLONG),
        (lambda files, path: files.read("/" + "x/" * 3000), errno.ENAMETOOLONG),
    ],
)
def test_what_fails_in_the_guest(
    files: Files, tmp_path: Path, what: Callable[[Files, Path], object], number: int
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(GuestFileError) as caught:
        what(files, tmp_path)

    assert (caught.value.errno, caught.value.stage) == (number, "file")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


def test_a_fifo_does_not_hold_up_a_read(files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    assert files.read(tmp_path / "fifo") == b""


# Trees.


def make_tree(root: Path) -> None:
    (root / "folder/inner").mkdir(parents=True)
    (root / "folder/inner/big").write_bytes(os.urandom(200_000))
    (root / "folder/program").write_text("#!/bin/sh\n")
    (root / "folder/program").chmod(0o755)
    (root / "empty").mkdir()
    (root / "link").symlink_to("folder/inner")
    (root / "folder/up").symlink_to("../empty")
    (root / "\udcfe\udcff").write_text("no text")
    os.utime(root / "folder/program", (1, 1_000_000_000))


def described(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): (
            path.readlink() if path.is_symlink() else path.is_dir() or (path.read_bytes(), path.stat().st_mode)
        )
        for path in root.rglob("*")
    }


def test_trees_there_and_back(files: Files, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")

    files.put(tmp_path / "tree", tmp_path / "guest/a", parents=True)
    files.get(tmp_path / "guest/a", tmp_path / "back")

    assert described(tmp_path / "guest/a") == described(tmp_path / "tree")
    assert described(tmp_path / "back") == described(tmp_path / "tree")
    assert (tmp_path / "back/folder/program").stat().st_mtime == 1_000_000_000
    assert (tmp_path / "guest/a/folder/program").stat().st_mtime == 1_000_000_000


def test_what_is_there_already(files: Files, tmp_path: Path) -> None:
    """Folders are merged; all else is replaced, and links are not written through."""
    make_tree(tmp_path / "tree")
    for place in (tmp_path / "guest", tmp_path / "back"):
        (place / "folder").mkdir(parents=True)
        (place / "folder/kept").write_text("kept")
        (place / "outside").write_text("untouched")
        (place / "folder/program").symlink_to("../outside")
        (place / "link").write_text("a file once")

    files.put(tmp_path / "tree", tmp_path / "guest")
    files.get(tmp_path / "tree", tmp_path / "back")

    for place in (tmp_path / "guest", tmp_path / "back"):
        assert (place / "outside").read_text() == "untouched"
        assert (place / "folder/kept").read_text() == "kept"
        assert (place / "folder/program").read_text() == "#!/bin/sh\n"
        assert (place / "link").readlink() == Path("folder/inner")


def test_a_single_file_there_and_back(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "file").chmod(0o750)
    (tmp_path / "link").symlink_to("file")

    files.put(tmp_path / "link", tmp_path / "there")
    files.get(tmp_path / "there", tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == b"x" * 100_000
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("there", "back")] == [0o750, 0o750]


def test_what_the_host_has_not_or_should_not_send(files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(NotFoundError, match="nothing"):
        files.put(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ConfigError, match="neither file, folder nor link"):
        files.put(tmp_path / "fifo", tmp_path / "x")
    with pytest.raises(ConfigError, match="neither file, folder nor link"):
        files.put(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="null byte"):
        files.read("a\0b")


def test_devices_and_pipes_of_the_guest_stay_there(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree/fifo")

    with pytest.raises(GuestError, match="neither file, folder nor link"):
        files.get(tmp_path / "tree", tmp_path / "back")


def test_modes_that_do_harm_on_the_host_are_dropped(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir(mode=0o700)
    (tmp_path / "tree/file").write_text("")
    (tmp_path / "tree/file").chmod(0o6777)
    (tmp_path / "tree/closed").mkdir(mode=0o000)

    files.get(tmp_path / "tree", tmp_path / "back")

    assert stat.S_IMODE((tmp_path / "back/file").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "back/closed").stat().st_mode) == 0o700


def tree(*entries: tuple[int, bytes, bytes]) -> bytes:
    """The frames of a tree in a folder: modes, names and link targets."""
    all_entries = ((stat.S_IFDIR | 0o755, b"", b""), *entries)
    return b"".join(
        frame(Kind.ENTRY, bytes(Entry(mode, 0, 0, 1, 0, 0)) + protocol.strings(name, target))
        for mode, name, target in all_entries
    )


def speaking(data: bytes) -> Files:
    """Files of a guest that says this to whoever connects."""

    def speak(mouth: socket.socket) -> None:
        with mouth, suppress(BrokenPipeError, ConnectionResetError):
            mouth.sendall(GREETING + data)
            while mouth.recv(1 << 16):
                pass

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=speak, args=(theirs,)).start()
        return ours

    return Files(connect)


DIR, REG, LNK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
END = frame(Kind.END)
CONTENT = frame(Kind.DATA, b"evil")


@pytest.mark.parametrize(
    "name",
    [b"../x", b"/x", b"a/../../x", b"..", b".", b"a//x", b"a/", b"./x", b"a/./x"],
    ids=lambda name: name.decode(),
)
def test_names_that_lead_out_of_a_tree(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "in").mkdir()

    with pytest.raises(GuestError, match="refused"):
        speaking(tree((DIR, b"a", b""), (REG, name, b"")) + CONTENT + END).get("/x", tmp_path / "in/tree")

    assert os.listdir(tmp_path) == ["in"]
    assert list((tmp_path / "in").rglob("*")) == [tmp_path / "in/tree", tmp_path / "in/tree/a"]


@pytest.mark.parametrize("target", [b"/etc/passwd", b"..", b"../outside", b"a/../../outside", b""])
def test_links_that_lead_out_of_a_tree(tmp_path: Path, target: bytes) -> None:
    with pytest.raises(GuestError, match="leads out"):
        speaking(tree((LNK, b"link", target)) + END).get("/x", tmp_path / "tree")

    assert os.listdir(tmp_path / "tree") == []


def test_links_that_lead_out_of_a_tree_together(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    sent = tree((DIR, b"d", b""), (LNK, b"d/up", b".."), (LNK, b"d/out", b"up/../outside"))

    with pytest.raises(GuestError, match="leads out"):
        speaking(sent + END).get("/x", tmp_path / "tree")

    assert os.listdir(tmp_path / "tree/d") == ["up"]


def test_hostile_77_links_that_lead_out_by_way_of_others(tmp_path: Path) -> None:
    """Each is inside by its text; together they are two folders above the tree."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    links = (LNK, b"p/q/up", b"../.."), (LNK, b"p/q/x", b"up/../../../secret")
    sent = tree((DIR, b"p", b""), (DIR, b"p/q", b""), *links)

    with pytest.raises(GuestError, match="leads out"):
        speaking(sent + END).get("/x", tmp_path / "a/b/tree")

    assert not (tmp_path / "a/b/tree/p/q/x").exists()


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    links = {b"p/q/up": b"../..", b"p/q/here": b".", b"p/file": b"q/..data", b"p/q/next": b"../r/s"}
    sent = tree((DIR, b"p", b""), (DIR, b"p/q", b""), *[(LNK, name, target) for name, target in links.items()])

    speaking(sent + END).get("/x", tmp_path / "tree")

    assert {name: os.fsencode((tmp_path / "tree" / os.fsdecode(name)).readlink()) for name in links} == links


def test_a_tree_that_writes_through_its_own_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/planted").symlink_to("../outside")
    sent = tree((LNK, b"link", b"."), (REG, b"link/x", b"")) + CONTENT + END
    through = tree((REG, b"planted/x", b"")) + CONTENT + END
    folder = tree((DIR, b"planted", b"")) + END

    for frames in (sent, through, folder):
        with pytest.raises(HostError, match="cannot write"):
            speaking(frames).get("/x", tmp_path / "tree")

    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.parametrize("kind", [stat.S_IFBLK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK, 0])
def test_files_that_are_no_files(tmp_path: Path, kind: int) -> None:
    with pytest.raises(GuestError, match="neither file, folder nor link"):
        speaking(tree((kind | 0o666, b"x", b"")) + END).get("/x", tmp_path / "tree")

    assert os.listdir(tmp_path / "tree") == []


@pytest.mark.parametrize(
    "frames",
    [
        CONTENT,
        tree() + CONTENT,
        tree() + tree() + END,
        tree((LNK, b"link", b"x")) + CONTENT + END,
        frame(Kind.ENTRY, bytes(Entry(REG, 0, 0, 1, 0, 0)) + b"a\0"),
        frame(Kind.ENTRY, bytes(Entry(REG, 0, 0, 1, 0, 0)) + protocol.strings(b"first", b"")),
        frame(Kind.ENTRY, bytes(Entry(stat.S_IFCHR, 0, 0, 1, 0, 0)) + protocol.strings(b"", b"")),
        frame(Kind.ENTRY, b""),
    ],
)
def test_trees_that_make_no_sense(tmp_path: Path, frames: bytes) -> None:
    with pytest.raises(GuestError):
        speaking(frames).get("/x", tmp_path / "tree")


@pytest.mark.parametrize("frames", [b"", frame(Kind.STARTED, bytes(4)), frame(Kind.ENTRY, b""), frame(Kind.EOF) * 2])
def test_answers_that_make_no_sense(frames: bytes) -> None:
    files = speaking(frames)
    files.timeout = 0.2

    for ask in (
        lambda: files.read("/x"),
        lambda: files.stat("/x"),
        lambda: files.list("/x"),
        lambda: files.remove("/x"),
    ):
        with pytest.raises((GuestLost, TimedOut)):
            ask()


def test_more_than_was_asked_for() -> None:
    with pytest.raises(GuestLost, match="more than"):
        speaking(frame(Kind.DATA, b"x" * 100) + END).read("/x", size=10)


def test_a_file_that_is_larger_than_the_limit(files: Files, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))

    assert files.read(tmp_path / "file", limit=5000) == bytes(5000)
    assert files.read(tmp_path / "file", size=100, limit=10) == bytes(100)  # who says how much wants that
    with pytest.raises(TooLarge, match="in the guest has more than 4999 bytes; give a larger limit"):
        files.read(tmp_path / "file", limit=4999)
    with pytest.raises(TooLarge):
        files.read("/dev/zero", limit=1000)


def test_a_folder_that_is_larger_than_the_limit(files: Files, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).touch()

    assert len(files.list(tmp_path)) == 20
    with pytest.raises(TooLarge, match="more than 18 entries"):
        files.list(tmp_path, limit=10_000)


def test_an_endless_folder() -> None:
    """Entries cost more here than they have bytes."""
    entry = frame(Kind.ENTRY, bytes(Entry(REG, 0, 0, 1, 0, 0)) + protocol.strings(b"x", b""))

    with pytest.raises(TooLarge):
        speaking(entry * 1000).list("/x", limit=100_000)


def test_endless_changes() -> None:
    changes = b"".join(
        frame(Kind.ENTRY, bytes(Entry(REG, 0, 0, protocol.Change.ADDED, 0, 0)) + protocol.strings(b"f%d" % number, b""))
        for number in range(1000)
    )

    assert len(speaking(changes + END).changes()) == 1000
    with pytest.raises(TooLarge, match="changes"):
        speaking(changes + END).changes(limit=100_000)


@pytest.mark.parametrize("name", [b"x" * 5000, b"x" * 60_000])
def test_names_that_are_none(name: bytes) -> None:
    entry = frame(Kind.ENTRY, bytes(Entry(REG, 0, 0, 1, 0, 0)) + protocol.strings(name, b""))

    with pytest.raises(GuestLost, match="malformed ENTRY"):
        speaking(entry + END).list("/x")


def test_a_tree_that_is_larger_than_the_limit(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(bytes(100_000))

    files.get(tmp_path / "tree", tmp_path / "whole", limit=110_000)
    with pytest.raises(TooLarge, match="more than 100000 bytes"):
        files.get(tmp_path / "tree", tmp_path / "cut", limit=100_000)
    with pytest.raises(TooLarge):
        speaking(tree(*((REG, b"f%d" % number, b"") for number in range(100))) + END).get(
            "/x", tmp_path / "many", limit=200_000
        )

    assert (tmp_path / "whole/file").read_bytes() == bytes(100_000)
    assert len(os.listdir(tmp_path / "many")) < 50


# Trees from a host to the agent: it trusts no names either.


@pytest.mark.parametrize("name", [b"../x", b"/x", b"a/../../x", b"..", b".", b"a//x"], ids=lambda name: name.decode())
def test_names_that_the_agent_refuses(agent: NativeAgent, tmp_path: Path, name: bytes) -> None:
    request = bytes(FileRequest(0, UNCHANGED, UNCHANGED, UNCHANGED, 0, 0)) + protocol.strings(bytes(tmp_path / "tree"))
    answer = b""
    with agent.connect() as connection:
        connection.sendall(GREETING + frame(Kind.UNPACK, request) + tree((DIR, b"a", b""), (REG, name, b"")) + END)
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(4096):
            answer += data

    assert b"bad name in a tree" in answer
    assert list(tmp_path.rglob("*")) == [tmp_path / "tree", tmp_path / "tree/a"]


def test_a_link_in_the_guest_is_not_written_through(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/file").write_text("evil")
    (tmp_path / "outside").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/inner").symlink_to(tmp_path / "outside")

    files.put(tmp_path / "tree", tmp_path / "there")

    assert os.listdir(tmp_path / "outside") == []
    assert (tmp_path / "there/inner/file").read_text() == "evil"
