"""What layers make of a tree: names, links, whiteouts; and that nothing in a layer is more than its own problem."""

from __future__ import annotations

import gzip
import io
import stat
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from oci_images import digest, entry, folder, layer, link

from kvmpy.core.errors import ImageError
from kvmpy.oci.layer import Budget, Layer, apply
from kvmpy.oci.tree import MAX_LINKS, MAX_PATH, Node, Tree

LIMIT = 1 << 20


class Contents:
    """Keeps what files contain."""

    def __init__(self) -> None:
        self.of: dict[int, bytes] = {}

    def add(self, chunks: Iterable[bytes], node: Node) -> None:
        self.of[id(node)] = data = b"".join(chunks)
        node.size = len(data)


class Made:
    """A tree of layers: `names()` of all files, `made["path"]` is a node, `text("path")` what is in it."""

    def __init__(self, *layers: bytes, files: int = 1000, limit: int = LIMIT) -> None:
        self.tree, self.contents, budget = Tree(files), Contents(), Budget(limit)
        self.nodes: list[Node] = []  # so that their ids stay their own
        for data in layers:
            apply(as_layer(data), self.tree, self.contents, budget, lambda size: None)

    def __getitem__(self, path: str) -> Node:
        found = self.tree.find(path.encode())
        assert found is not None
        return found

    def text(self, path: str) -> bytes:
        return self.contents.of[id(self[path])]

    def names(self) -> set[str]:
        found, pending = set(), [("", self.tree.root)]
        while pending:
            path, node = pending.pop()
            for name, (child, _) in node.children.items():
                found.add(f"{path}{name.decode()}")
                if child.is_folder:
                    pending.append((f"{path}{name.decode()}/", child))
        return found


def as_layer(data: bytes, packed: bytes | None = None, **more: Any) -> Layer:
    whole = data if packed is None else packed
    wanted = {"digest": digest(whole), "diff_id": digest(data)} | more
    return Layer("the layer", lambda: io.BytesIO(whole), **wanted)  # type: ignore[arg-type, return-value]


def test_files_folders_and_links_with_their_attributes() -> None:
    made = Made(
        layer(
            folder("etc", mode=0o750, uid=3, gid=70000),
            entry("etc/passwd", b"root", mode=0o4711, uid=7, mtime=1234.5),
            link("name", "etc/passwd"),
            link("other", "etc/passwd", hard=True),
            entry("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
            entry("pipe", kind=tarfile.FIFOTYPE),
            entry(
                "./a/b/c", b"x", pax_headers={"SCHILY.xattr.user.k": "v", "SCHILY.xattr.trusted.overlay.opaque": "y"}
            ),
        )
    )

    assert made.names() == {"etc", "etc/passwd", "name", "other", "null", "pipe", "a", "a/b", "a/b/c"}
    assert (made["etc"].mode, made["etc"].uid, made["etc"].gid) == (stat.S_IFDIR | 0o750, 3, 70000)
    assert (made["etc/passwd"].mode, made["etc/passwd"].mtime) == (stat.S_IFREG | 0o4711, 1234500000000)
    assert made["other"] is made["etc/passwd"]
    assert made.text("other") == b"root"
    assert made["name"].target == b"etc/passwd"
    assert (made["null"].rdev, stat.S_IFMT(made["pipe"].mode)) == ((1, 3), stat.S_IFIFO)
    assert made["a/b/c"].xattrs == {"user.k": b"v"}


def test_whiteouts_hide_what_lower_layers_have_and_nothing_else() -> None:
    lower = layer(entry("a", b"1"), entry("d/x"), entry("d/y"), entry("o/low"), entry("o/sub/low"), entry("w/z"))
    upper = layer(
        entry("o/new"), entry("o/sub/new"), entry("o/.wh..wh..opq"), entry("o/late"),
        entry(".wh.a"), entry("d/.wh.x"), entry(".wh.w"), entry("w/z2"), entry(".wh.absent"), entry(".wh..wh.plnk"),
    )  # fmt: skip

    made = Made(lower, upper)

    assert made.names() == {"d", "d/y", "o", "o/new", "o/sub", "o/sub/new", "o/late", "w", "w/z2"}


def test_a_whiteout_behind_what_its_own_layer_has_put_there() -> None:
    made = Made(
        layer(entry("f", b"1"), entry("d/low")), layer(entry("f", b"2"), entry("d/new"), entry(".wh.f"), entry(".wh.d"))
    )

    assert made.names() == {"f", "d", "d/new"}
    assert made.text("f") == b"2"


def test_what_replaces_what() -> None:
    lower = layer(folder("d", mode=0o700), entry("d/in"), entry("f", b"1"), folder("gone"), entry("gone/in"))
    upper = layer(folder("d", mode=0o755), entry("f", b"2"), entry("f", b"3"), link("gone", "d"))

    made = Made(lower, upper)

    assert made.names() == {"d", "d/in", "f", "gone"}
    assert (made["d"].mode & 0o777, made.text("f"), made["gone"].target) == (0o755, b"3", b"d")


@pytest.mark.parametrize("target", ["/", "../../../..", "/../..", "."])
def test_links_lead_no_further_than_to_the_root_of_the_image(target: str) -> None:
    made = Made(layer(link("etc", target)), layer(entry("etc/passwd", b"in the image")))

    assert made.names() == {"etc", "passwd"}


def test_names_through_links_are_as_in_a_container() -> None:
    made = Made(layer(folder("usr/lib"), link("lib", "usr/lib"), link("dangling", "/made/there")))
    more = Made(
        layer(folder("usr/lib"), link("lib", "usr/lib"), link("dangling", "/made/there")),
        layer(entry("lib/x", b"x"), entry("dangling/y"), entry("/absolute/z"), link("h", "lib/x", hard=True)),
    )

    assert more.names() - made.names() == {
        "usr/lib/x",
        "made",
        "made/there",
        "made/there/y",
        "absolute",
        "absolute/z",
        "h",
    }


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([entry("../x")], '".." in it'),
        ([entry("a/../../x")], '".." in it'),
        ([folder("d/..")], '".." in it'),
        ([entry("../.wh.x")], '".." in it'),
        ([entry("d/.wh...")], "stands for no name"),
        ([entry(".wh..")], "stands for no name"),
        ([entry("d/.wh.")], "stands for no name"),
        ([link("h", "../../etc/passwd", hard=True)], '".." in it'),
        ([link("h", "/etc/shadow", hard=True)], "is not there"),
        ([folder("d"), link("h", "d", hard=True)], "is a folder"),
        ([link(".", "d")], "is no folder"),
        ([entry("x" * 256)], "longer than Linux allows"),
        ([entry("d/" * (MAX_PATH // 2 + 1) + "x")], "longer than Linux allows"),
        ([entry("f"), entry("f/x")], "in what is no folder"),
        ([link("a", "b"), link("b", "a"), entry("a/x")], "loop of links"),
        ([link("l", "t" * 4096)], "target that no link can have"),
        ([entry("x", uid=1 << 33)], "the owner"),
        ([entry("x", kind=b"V")], "unknown kind"),
        ([entry(f"f{number}") for number in range(12)], "more than 10 files"),
    ],
)  # fmt: skip
def test_what_is_refused(bad: list[Any], why: str) -> None:
    with pytest.raises(ImageError, match="the layer: .*" + why) as caught:
        Made(layer(*bad), files=10)

    assert caught.value.remedy


def test_many_links_in_a_row_are_followed_up_to_a_bound() -> None:
    steps = [link(f"l{number}", f"l{number + 1}") for number in range(MAX_LINKS + 1)]

    assert "end/x" in Made(layer(link("l1", "l2"), link("l2", "end"), entry("l1/x"))).names()
    with pytest.raises(ImageError, match="loop of links"):
        Made(layer(*steps, entry("l0/x")))


def test_a_bomb_is_defused() -> None:
    bomb = layer(entry("zeros", bytes(8 * LIMIT)))

    with pytest.raises(ImageError, match=r"larger than 1048576 bytes.*--root-limit"):
        Made(bomb)
    with pytest.raises(ImageError, match="larger than"):
        apply(as_layer(bomb, gzip.compress(bomb)), Tree(9), Contents(), Budget(LIMIT), lambda size: None)


@pytest.mark.parametrize("form", ["gnu", "ustar", "pax", "oldgnu", "v7"])
def test_archives_of_tar(form: str, tmp_path: Path) -> None:
    deep = tmp_path / "tree" / "/".join(["long" * 10] * (1 if form in ("ustar", "v7") else 4))
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"content")
    (tmp_path / "tree/link").symlink_to("l" * 90)
    command = ["tar", f"--format={form}", "-C", tmp_path / "tree", "-cf", tmp_path / "tar", "."]
    subprocess.run(command, check=True)

    made = Made((tmp_path / "tar").read_bytes())

    assert made.text(str(deep.relative_to(tmp_path / "tree") / "file")) == b"content"
    assert made["link"].target == b"l" * 90


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.1", "posix --sparse-version=1.0"])
def test_sparse_files(form: str, tmp_path: Path) -> None:
    parts = b"".join(bytes([number]) * 4096 + bytes(61440) for number in range(1, 30))
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(1, 30):
            file.seek((number - 1) * 65536)
            file.write(bytes([number]) * 4096)
        file.truncate(29 * 65536)
    command = f"tar --sparse --format={form} -C {tmp_path} -cf {tmp_path}/tar sparse"
    subprocess.run(command.split(), check=True)

    made = Made((tmp_path / "tar").read_bytes(), limit=16 << 20)

    assert made.text("sparse") == parts


# Damage.

GOOD = layer(folder("d"), entry("d/f", b"content" * 200), entry("long" * 40, b"x"), link("l", "d/f"))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_how_layers_are_compressed(pack: Any) -> None:
    tree = Tree(9)

    apply(as_layer(GOOD, pack(GOOD)), tree, Contents(), Budget(LIMIT), lambda size: None)

    assert tree.find(b"d/f") is not None


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_layer_cut_off_anywhere_is_refused(pack: Any) -> None:
    packed = pack(GOOD)

    for size in range(0, len(packed), 1 if len(packed) < 1000 else 97):
        for known in (None, digest(packed)):
            cut = as_layer(GOOD, packed[:size], digest=known)
            with pytest.raises(ImageError, match="the layer"):
                apply(cut, Tree(9), Contents(), Budget(LIMIT), lambda size: None)


@pytest.mark.parametrize("which", ["digest", "diff_id"])
def test_a_wrong_digest(which: str) -> None:
    wrong = as_layer(GOOD, **{which: digest(b"something else")})

    with pytest.raises(ImageError, match="not what its digest sha256:"):
        apply(wrong, Tree(9), Contents(), Budget(LIMIT), lambda size: None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_any_damage_is_an_image_error_or_another_image(changes: list[tuple[int, int]], mend: bool) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
        if mend:  # the checksum of the header: damage gets further
            header = memoryview(data)[at // 512 * 512 :][:512]
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            header.release()

    try:
        Made(bytes(data))
    except ImageError as error:
        assert str(error).startswith("the layer")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=1500))
def test_any_bytes_are_no_layer(data: bytes) -> None:
    try:
        apply(as_layer(b"", data, digest=None), Tree(9), Contents(), Budget(LIMIT), lambda size: None)
    except ImageError as error:
        assert str(error).startswith("the layer")


@pytest.mark.parametrize(
    "records",
    [
        b"99999999999999999999 path=x\n", b"x path=y\n", b"10 path=x", b"11 pathxxx\n", b"0 path=x\n", b"9 size=x\n",
        b"11 size=-1\n", b"26 GNU.sparse.map=0,1,9,9\n", b"22 GNU.sparse.major=1\n", b"16 mtime=1e999\n",
        b"9" * 5000, b"31 uid=99999999999999999999999\n",
    ],
)  # fmt: skip
def test_damaged_extended_headers(records: bytes) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = b"x", len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    data = header + records.ljust(-(-len(records) // 512) * 512, b"\0") + layer(entry("f", b"1"))

    with pytest.raises(ImageError, match="the layer"):
        Made(data)


def test_extended_headers_without_end() -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = b"x", 1 << 40
    huge = info.tobuf(tarfile.USTAR_FORMAT if info.size < 1 << 33 else tarfile.GNU_FORMAT)
    info.size = 0
    many = info.tobuf(tarfile.USTAR_FORMAT) * 50

    with pytest.raises(ImageError, match="extended header of"):
        Made(huge)
    with pytest.raises(ImageError, match="extended headers for one file"):
        Made(many)
