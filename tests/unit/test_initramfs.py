"""The built-in initramfs: what is in it, where, and what cannot be asked of it."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import lz4.block
import pytest
import zstandard

from kvmpy import cli
from kvmpy.boot import cpio, initramfs, programs
from kvmpy.boot.cpio import Entry
from kvmpy.core.errors import ConfigError, HostError, KvmpyError, NotFoundError

INIT = b"\x7fELF the init"
GLIBC = "/lib64/ld-linux-x86-64.so.2"
BUSYBOX = initramfs.find_busybox()
needs_busybox = pytest.mark.skipif(BUSYBOX is None, reason="no static busybox here (package busybox-static)")
needs_gcc = pytest.mark.skipif(
    not shutil.which("gcc") or not Path(GLIBC).exists(), reason="needs gcc and a host with glibc"
)


@pytest.fixture(autouse=True)
def init(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("package") / "init"
    path.write_bytes(INIT)
    monkeypatch.setattr(initramfs, "INIT", path)
    return path


def entries(image: bytes) -> dict[str, Entry]:
    found, end = cpio.read(image)
    assert end == len(image)
    assert len({entry.name for entry in found}) == len(found)
    return {entry.name: entry for entry in found}


def contents(image: bytes, name: str) -> bytes:
    data = entries(image)[name].data
    assert isinstance(data, memoryview)
    return bytes(data)


def elf(path: Path, loader: str | None, machine: int = 62, phnum: int = 2, phoff: int = 64) -> Path:
    """An ELF file with PT_LOAD and, unless `loader` is None, PT_INTERP."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, 0, phoff, 0, 0, 64, 56, phnum, 0, 0, 0
    )
    text = (loader or "").encode() + b"\0"
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 0)
    segments += struct.pack("<IIQQQQQQ", 4 if loader is None else 3, 4, 176, 0, 0, len(text), 0, 0)
    path.write_bytes(header + segments + text)
    path.chmod(0o755)
    return path


def test_what_the_kernel_needs_to_start_init() -> None:
    found = entries(initramfs.build(busybox=None))

    assert stat.filemode(found["init"].mode) == "-rwxr-xr-x"
    assert found["init"].data == INIT
    assert (stat.filemode(found["dev/console"].mode), found["dev/console"].rdev) == ("crw-------", (5, 1))
    assert "etc/kvmpy/exec" not in found
    assert "etc/kvmpy/modules" not in found


def test_folders_come_before_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")

    names = list(entries(initramfs.build(busybox=None, files=[(tmp_path / "f", "/new/deep/f")])))

    assert names.index("new") < names.index("new/deep") < names.index("new/deep/f")
    assert all(name.rpartition("/")[0] in [*names[: names.index(name)], ""] for name in names)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")

    first = initramfs.build(busybox=None, files=[(tmp_path, "/data")], exec="/init")
    os.utime(tmp_path / "f", (1, 1))

    assert initramfs.build(busybox=None, files=[(tmp_path, "/data")], exec="/init") == first


def test_an_init_that_is_not_built(init: Path) -> None:
    init.unlink()

    with pytest.raises(HostError, match="`make -C guests init`"):
        initramfs.build(busybox=None)


def test_the_agent_is_there_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tmp_path / "agent"
    monkeypatch.setattr(initramfs, "AGENT", agent)

    with pytest.raises(HostError, match="make -C guests agent"):
        initramfs.build(agent=True)
    agent.write_bytes(b"the agent")
    image = initramfs.build(agent=True)

    assert contents(image, "usr/lib/kvmpy/agent") == b"the agent"
    assert entries(image)["usr/lib/kvmpy/agent"].mode == stat.S_IFREG | 0o755
    assert "usr/lib/kvmpy/agent" not in entries(initramfs.build())


@needs_busybox
def test_busybox_brings_its_commands() -> None:
    image = initramfs.build()

    assert BUSYBOX is not None
    assert contents(image, "usr/bin/busybox") == BUSYBOX.read_bytes()
    assert contents(image, "usr/bin/sh") == b"busybox"
    assert contents(image, "bin") == b"usr/bin"
    assert contents(image, "usr/sbin") == b"../usr/bin"


@pytest.mark.parametrize(
    ("loader", "machine", "message"),
    [(GLIBC, 62, "dynamically linked"), (None, 183, "not an x86-64 program")],
)
def test_a_busybox_that_could_not_run(tmp_path: Path, loader: str | None, machine: int, message: str) -> None:
    path = elf(tmp_path / "busybox", loader, machine)

    with pytest.raises(ConfigError, match=f"busybox {path} is {message}; .*busybox-static"):
        initramfs.build(busybox=path)


def test_a_busybox_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no busybox"):
        initramfs.build(busybox=tmp_path / "busybox")


def test_a_static_program_that_is_no_busybox(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="--list` failed"):
        initramfs.build(busybox=elf(tmp_path / "busybox", None))


def test_only_a_static_busybox_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "BUSYBOX_FOLDERS", ())
    monkeypatch.setenv("PATH", f":{tmp_path}/a:{tmp_path}/b")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    elf(tmp_path / "a/busybox", GLIBC)
    wanted = elf(tmp_path / "b/busybox.static", None)

    assert initramfs.find_busybox() == wanted


@pytest.mark.parametrize(
    ("text", "host", "guest"),
    [
        ("/a/b:/c", "/a/b", "/c"),
        ("a:b:/c", "a:b", "/c"),
        ("/a/../b", "/a/../b", "/b"),
        ("/x:y", "/x:y", "/x:y"),
    ],
)
def test_where_a_file_goes(text: str, host: str, guest: str) -> None:
    assert initramfs.parse_file(text) == (Path(host), guest)


@pytest.mark.parametrize("text", ["", ":/x", ":/"])
def test_no_file(text: str) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        initramfs.parse_file(text)


def test_a_relative_file_keeps_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert initramfs.parse_file("./a") == (Path("a"), f"{tmp_path}/a")


@pytest.mark.parametrize(
    ("guest", "name"),
    [("/tool", "tool"), ("/bin/tool", "usr/bin/tool"), ("//usr/./sbin//tool", "usr/bin/tool"), ("/lib/x", "usr/lib/x")],
)
def test_a_file_is_placed_where_links_lead(tmp_path: Path, guest: str, name: str) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "tool").chmod(0o4755)

    found = entries(initramfs.build(busybox=None, files=[(tmp_path / "tool", guest)]))

    assert stat.filemode(found[name].mode) == "-rwxr-xr-x"
    assert stat.S_ISLNK(found["bin"].mode)


def test_a_file_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("mine")

    image = initramfs.build(busybox=None, files=[(tmp_path / "p", "/etc/passwd")])

    assert contents(image, "etc/passwd") == b"mine"


def test_a_folder_goes_in_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/sub/file").write_text("text")
    (tmp_path / "d/link").symlink_to("sub/file")
    (tmp_path / "d/loop").symlink_to("..")

    image = initramfs.build(busybox=None, files=[(tmp_path / "d", "/data/x/")])

    assert contents(image, "data/x/sub/file") == b"text"
    assert contents(image, "data/x/link") == b"sub/file"
    assert contents(image, "data/x/loop") == b".."


def test_a_root_file_system_can_be_laid_over(tmp_path: Path) -> None:
    """Its links of the merged /usr must not replace our folders, nor its folders our links."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/sbin").mkdir()
    (tmp_path / "usr/bin/a").write_text("a")
    (tmp_path / "usr/sbin/b").write_text("b")
    (tmp_path / "bin").symlink_to("usr/bin")

    image = initramfs.build(busybox=None, files=[(tmp_path, "/")])

    assert contents(image, "usr/bin/a") == b"a"
    assert contents(image, "usr/bin/b") == b"b"
    assert contents(image, "usr/sbin") == b"../usr/bin"
    assert contents(image, "bin") == b"usr/bin"


@pytest.mark.parametrize(
    ("guest", "message"),
    [
        ("relative", "absolute"),
        ("/a/../../b", "without '..'"),
        ("/etc", "is a folder; give /etc/f"),
        ("/bin", "is a folder; give /bin/f"),
        ("/", "is a folder; give /f"),
        ("/new/", "is a folder; give /new/f"),
        ("/init/x", "/init is no folder"),
        ("/bin/" + "x" * 5000, "bad file name"),
    ],
)
def test_a_place_that_cannot_be(tmp_path: Path, guest: str, message: str) -> None:
    (tmp_path / "f").write_text("")

    with pytest.raises(ConfigError, match=message):
        initramfs.build(busybox=None, files=[(tmp_path / "f", guest)])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="gone: no such file"):
        initramfs.build(busybox=None, files=[(tmp_path / "gone", "/x")])


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ConfigError, match="neither file, folder nor link"):
        initramfs.build(busybox=None, files=[(tmp_path / "pipe", "/pipe")])


@needs_gcc
def test_a_program_brings_its_loader_and_libraries(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    compile_c("int f(void) { return 0; }", tmp_path / "own/libown.so", "-shared", "-fPIC")
    program = compile_c(
        "int f(void); int main(void) { return f(); }",
        tmp_path / "p",
        f"-L{tmp_path}/own",
        "-lown",
        "-Wl,-rpath,$ORIGIN/own",
    )

    image = initramfs.build(busybox=None, files=[(program, "/bin/p")])

    found = entries(image)
    libc = next(name for name in found if name.endswith("/libc.so.6"))
    assert contents(image, libc) == Path("/", libc).read_bytes()
    assert contents(image, GLIBC.replace("/lib64", "usr/lib64")) == Path(GLIBC).read_bytes()
    assert contents(image, libc.replace("libc.so.6", "libown.so")) == (tmp_path / "own/libown.so").read_bytes()


@needs_gcc
def test_a_program_whose_library_is_gone(tmp_path: Path) -> None:
    library = compile_c("int f(void) { return 0; }", tmp_path / "libown.so", "-shared", "-fPIC")
    program = compile_c("int f(void); int main(void) { return f(); }", tmp_path / "p", str(library))
    library.unlink()

    with pytest.raises(KvmpyError, match=r"libown\.so"):
        initramfs.build(busybox=None, files=[(program, "/p")])


def test_a_program_with_a_loader_that_is_not_the_hosts(tmp_path: Path) -> None:
    program = elf(tmp_path / "p", f"{tmp_path}/evil-loader")

    with pytest.raises(ConfigError, match=r"needs the program loader .*evil-loader; link it statically"):
        initramfs.build(busybox=None, files=[(program, "/p")])


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n" * 20, b"\x7fELF" + bytes(60)])
def test_what_is_no_program(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)

    assert programs.loader_of(tmp_path / "x") is None


@pytest.mark.parametrize(
    ("phoff", "phnum", "loader"), [(1 << 63, 2, None), (1 << 20, 2, ""), (64, 65535, GLIBC), (64, 0, "")]
)
def test_a_program_with_headers_beyond_its_end(tmp_path: Path, phoff: int, phnum: int, loader: str | None) -> None:
    assert programs.loader_of(elf(tmp_path / "x", GLIBC, phoff=phoff, phnum=phnum)) == loader


def compile_c(source: str, out: Path, *flags: str) -> Path:
    command = ["gcc", "-x", "c", "-", "-x", "none", *flags, "-o", str(out)]
    subprocess.run(command, input=source.encode(), check=True, timeout=60)
    return out


@needs_busybox
@pytest.mark.parametrize("command", ["echo 1; exit 3", 'two\nlines \'and "quotes"', "é \udcff"])
def test_a_command_goes_to_the_shell_as_it_is(command: str) -> None:
    assert contents(initramfs.build(exec=command), "etc/kvmpy/exec") == b"sh\0-c\0" + os.fsencode(command) + b"\0"


def test_a_script_is_run_by_the_interpreter_it_names() -> None:
    image = initramfs.build(busybox=None, exec="#!/opt/tool -x\n" + "data\n" * 50000)

    assert contents(image, "etc/kvmpy/exec") == b"/etc/kvmpy/script\0"
    assert contents(image, "etc/kvmpy/script").startswith(b"#!/opt/tool -x\ndata\n")
    assert stat.filemode(entries(image)["etc/kvmpy/script"].mode) == "-rwxr-xr-x"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/init", b"/init\0"),
        ("  tool  --x=1\ttwo ", b"tool\0--x=1\0two\0"),
        ("tool 'a b' \"c;d\" e\\ f", b"tool\0a b\0c;d\0e f\0"),
        ("tool '$HOME' \\;", b"tool\0$HOME\0;\0"),
    ],
)
def test_without_a_shell_a_command_is_split_into_words(command: str, words: bytes) -> None:
    assert contents(initramfs.build(busybox=None, exec=command), "etc/kvmpy/exec") == words


@pytest.mark.parametrize(
    "command", ["a; b", "a && b", "a > b", "a | b", "a $x", 'a "$x"', 'a "`b`"', "a *", "a\nb", "a &"]
)
def test_without_a_shell_a_command_that_needs_one(command: str) -> None:
    with pytest.raises(ConfigError, match="needs a shell; install busybox-static"):
        initramfs.build(busybox=None, exec=command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("a\0b", "NUL"),
        ("it's", "quotation"),
        ("x" * (128 << 10), "longer than 128 KiB"),
    ],
)
def test_a_command_that_cannot_be(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initramfs.build(busybox=None, exec=command)


def test_the_longest_command() -> None:
    image = initramfs.build(busybox=None, exec="x" * ((128 << 10) - 1))

    assert len(contents(image, "etc/kvmpy/exec")) == 128 << 10


def test_modules_are_listed_in_the_order_to_load_them(tmp_path: Path) -> None:
    folder = tmp_path / "6.1.0"
    (folder / "kernel").mkdir(parents=True)
    (folder / "modules.dep").write_text("kernel/b.ko.gz: kernel/a.ko\nkernel/a.ko:\n")
    (folder / "kernel/a.ko").write_bytes(b"\x7fELF a")
    (folder / "kernel/b.ko.gz").write_bytes(gzip.compress(b"\x7fELF b"))

    image = initramfs.build(busybox=None, modules=["b"], modules_dir=tmp_path)

    assert contents(image, "etc/kvmpy/modules") == b"/lib/modules/6.1.0/kernel/a.ko\n/lib/modules/6.1.0/kernel/b.ko\n"
    assert contents(image, "usr/lib/modules/6.1.0/kernel/b.ko") == b"\x7fELF b"


def test_the_command_line_makes_an_image(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    (tmp_path / "job").write_text("#!/init\n")
    out = tmp_path / "out.img"
    words = ["initrd", "-o", str(out), "--file", f"{tmp_path}/f:/data/f", "--busybox", "none", "--compress", "gzip"]

    status = cli.main([*words, "--exec", f"{tmp_path}/job"])

    assert status == 0
    assert contents(gzip.decompress(out.read_bytes()), "data/f") == b"text"
    assert contents(gzip.decompress(out.read_bytes()), "etc/kvmpy/script") == b"#!/init\n"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-o", "gone/out.img"], 125, "cannot write gone/out.img: No such file"),
        (["-o", "out.img", "--file", "gone"], 127, "--file gone: no such file"),
        (["-o", "out.img", "--module", "x", "--modules-dir", "gone"], 127, "no modules folder gone"),
        (["-o", "out.img", "--busybox", "gone"], 127, "no busybox gone"),
        (["-o", "out.img", "--compress", "rar"], 125, "--compress"),
        ([], 125, "-o"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    assert cli.main(["initrd", "--busybox", "none", *words]) == status

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.img").exists()


def test_modules_without_a_folder() -> None:
    with pytest.raises(ConfigError, match="need a modules folder"):
        initramfs.build(busybox=None, modules=["virtio_blk"])


def test_compression_can_be_undone() -> None:
    image = os.urandom(1000) + bytes(20 << 20)

    packed = {how: initramfs.compress(image, how) for how in ("none", "gzip", "zstd", "lz4")}

    assert packed["none"] == image
    assert gzip.decompress(packed["gzip"]) == image
    assert zstandard.decompress(packed["zstd"]) == image
    assert unpack_lz4_legacy(packed["lz4"]) == image
    assert initramfs.compress(image, "gzip") == packed["gzip"]


def unpack_lz4_legacy(data: bytes) -> bytes:
    assert data[:4] == bytes.fromhex("02214c18")
    content, at = b"", 4
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        content += lz4.block.decompress(data[at + 4 : at + 4 + size], uncompressed_size=8 << 20)
        at += 4 + size
    return content


@pytest.mark.parametrize(
    ("content", "meant"), [(b"echo one\necho two\n", "echo one\necho two\n"), (b"\x7fELF\xff\xfe", None)]
)
def test_a_file_is_a_script_when_it_is_text(tmp_path: Path, content: bytes, meant: str | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)

    assert initramfs.read_command(str(path)) == (meant or str(path))


@pytest.mark.parametrize("text", ["uname -a", "x" * 5000, "a\0b", ""])
def test_what_is_no_file_is_a_command(text: str) -> None:
    assert initramfs.read_command(text) == text


def test_volumes() -> None:
    found = entries(initramfs.build(busybox=None, volumes=[("volume0", "/mnt/src", True), ("t", "/out", False)]))

    assert bytes(found["etc/kvmpy/volumes"].data) == b"volume0\0/mnt/src\0ro\0t\0/out\0rw\0"
    assert "etc/kvmpy/volumes" not in entries(initramfs.build(busybox=None))
