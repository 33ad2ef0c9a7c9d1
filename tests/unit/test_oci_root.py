"""What `--root` makes of images on disk: which they are, how they want to be run, and what the cache keeps of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oci_images import OCI, Image, digest, entry, folder, layer, write_archive, write_folder

import kvmpy
from kvmpy import root
from kvmpy.cli import run
from kvmpy.core.errors import ConfigError, ImageError, KvmpyError, NotFoundError
from kvmpy.host.filesystems import Found
from kvmpy.oci import store

SETTINGS = {
    "Entrypoint": ["/bin/entry", "-x"],
    "Cmd": ["default", "words"],
    "Env": ["A=1", "B=x=y", "PATH=/bin"],
    "WorkingDir": "work//dir",
    "User": "ann:staff",
}
BASE = layer(folder("bin"), entry("bin/entry", b"#!/bin/sh\n", mode=0o755))
IMAGE = Image(BASE, layer(entry("top", b"t")), **SETTINGS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/kvmpy/roots"


def left(cache: Path) -> list[str]:
    """What is in the cache besides locks."""
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock")) if cache.exists() else []


@pytest.fixture(params=["layout", "layout.tar", "docker.tar", "docker"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    files = IMAGE.docker_files() if "docker" in request.param else IMAGE.files()
    write = write_archive if request.param.endswith(".tar") else write_folder
    return write(tmp_path / request.param, files)


def test_an_image_and_how_it_wants_to_be_run(path: Path, cache: Path) -> None:
    found = root.find(path)

    assert found.disk.found == Found("ext4")
    assert found.image is not None
    assert found.image.argv() == ["/bin/entry", "-x", "default", "words"]
    assert found.image.argv(["other"]) == ["/bin/entry", "-x", "other"]
    assert dict(found.image.env) == {"A": "1", "B": "x=y", "PATH": "/bin"}
    assert (found.image.cwd, found.image.user) == ("/work/dir", "ann:staff")
    assert left(cache) == [f"{digest(IMAGE.config).removeprefix('sha256:')}.1"]
    assert os.listdir(found.disk.path.parent) in (["root.ext4", "config.json"], ["config.json", "root.ext4"])


def test_an_image_is_unpacked_once(path: Path) -> None:
    first = root.find(path).disk.path
    before = first.stat()

    assert root.find(path).disk.path == first
    assert first.stat().st_ino == before.st_ino


def test_a_sandbox_with_an_image(path: Path) -> None:
    sandbox = kvmpy.Sandbox(root=path, env={"A": "mine"}, user="bob")
    assert sandbox.image is None

    sandbox.prepare()

    assert sandbox.image is not None
    assert sandbox.env == {"A": "mine", "B": "x=y", "PATH": "/bin"}
    assert (sandbox.cwd, sandbox.user) == ("/work/dir", "bob")
    assert sandbox.machine.config.root is None


def test_folders_are_shared_and_images_are_not(tmp_path: Path, path: Path) -> None:
    (tmp_path / "tree/bin").mkdir(parents=True)

    assert root.is_folder(tmp_path / "tree")
    assert root.is_folder(tmp_path / "not-there")
    assert not root.is_folder(path)
    assert not root.is_folder("oci:busybox")


def test_an_image_without_a_command(tmp_path: Path) -> None:
    found = root.find(write_folder(tmp_path / "layout", Image(BASE).files()))

    assert found.image is not None
    with pytest.raises(ConfigError, match="the image names no command; write one"):
        found.image.argv()
    assert found.image.argv(["sh"]) == ["sh"]


# Which one it is.


def several(*pairs: tuple[Image, dict[str, Any]]) -> dict[str, bytes]:
    descriptors = [image.descriptor(**more) for image, more in pairs]
    files: dict[str, bytes] = {}
    for image, _ in pairs:
        files |= image.files(*descriptors)
    return files


def named(name: str) -> dict[str, Any]:
    return {"annotations": {"org.opencontainers.image.ref.name": name}}


def on(architecture: str, system: str = "linux") -> dict[str, Any]:
    return {"platform": {"architecture": architecture, "os": system}}


ARM = Image(layer(entry("arm")), architecture="arm64")


def test_the_platform(tmp_path: Path) -> None:
    files = several((ARM, on("arm64")), (IMAGE, on("amd64")), (Image(), on("unknown", "unknown")))

    found = root.find(write_folder(tmp_path / "layout", files)).image

    assert found is not None and found.id == digest(IMAGE.config)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (several((ARM, on("arm64"))), "no image for linux/amd64; it has linux/arm64"),
        (ARM.files(), "is an image for linux/arm64; use one for linux/amd64"),
        (several((IMAGE, named("a")), (Image(BASE), named("b"))), r"several images \(a, b\); name one: .*layout#NAME"),
    ],
)
def test_no_image_or_too_many(files: dict[str, bytes], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        root.find(write_folder(tmp_path / "layout", files))


def test_one_of_several(tmp_path: Path) -> None:
    layout = write_folder(tmp_path / "layout", several((IMAGE, named("a")), (Image(BASE), named("b"))))

    found = root.find(f"{layout}#b").image

    assert found is not None and found.entrypoint == ()
    with pytest.raises(ConfigError, match=r'no image "c"; it has a, b'):
        root.find(f"{layout}#c")


def test_an_index_in_an_index(tmp_path: Path) -> None:
    files = IMAGE.files()
    for _ in range(3):
        index = files["index.json"]
        files["blobs/" + digest(index).replace(":", "/")] = index
        outer = {"manifests": [Image.describe(index, f"{OCI}.index.v1+json")]}
        files["index.json"] = json.dumps(outer).encode()
    layout = write_folder(tmp_path / "layout", files)

    assert root.find(layout).image is not None


# What is wrong.


def changed(name: str, data: bytes | None) -> dict[str, bytes]:
    """The layout with another file of this name; None: without it."""
    files = IMAGE.files() | ({name: data} if data is not None else {})
    if data is None:
        del files[name]
    return files


def blob(data: bytes) -> str:
    return "blobs/" + digest(data).replace(":", "/")


LAYER_BLOB = next(name for name, data in IMAGE.files().items() if data.startswith(b"\x1f\x8b"))
LAYER_DATA = IMAGE.files()[LAYER_BLOB]
DEEP = b'{"manifests":' + b"[" * 100_000


def manifests(**fields: Any) -> bytes:
    return json.dumps({"manifests": [IMAGE.descriptor() | fields]}).encode()


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (changed("index.json", None), "has no index.json"),
        (changed("index.json", b"{"), "is no JSON"),
        (changed("index.json", b"[]"), "is no object"),
        (changed("index.json", DEEP), "is no JSON"),
        (changed("index.json", b" " * (5 << 20)), "4194304 is the limit"),
        (changed("index.json", b'{"manifests": 5}'), "manifests is missing, or of the wrong kind"),
        (changed("index.json", b'{"manifests": [5]}'), "is no object"),
        (changed("index.json", manifests(digest="sha256:../../x")), "is no digest"),
        (changed("index.json", manifests(digest="md5:" + "0" * 32)), "is no digest"),
        (changed("index.json", manifests(size=-1)), "a blob of -1 bytes"),
        (changed("index.json", manifests(size="1")), "size is missing"),
        (changed("index.json", manifests(mediaType="text/html")), "unknown media type 'text/html'"),
        (changed(blob(IMAGE.manifest), None), "is missing"),
        (changed(blob(IMAGE.manifest), IMAGE.manifest + b" "), "is not what its digest says"),
        (changed(blob(IMAGE.config), IMAGE.config + b" "), "is not what its digest says"),
        (changed(LAYER_BLOB, None), "is missing"),
        (changed(LAYER_BLOB, LAYER_DATA[:-9]), "layer sha256:.* ends early"),
        (changed(LAYER_BLOB, LAYER_DATA + bytes(9)), "is not what its digest sha256:.* says"),
        (changed(LAYER_BLOB, b"x" * 999), "layer sha256:"),
    ],
)  # fmt: skip
def test_a_damaged_layout(files: dict[str, bytes], why: str, tmp_path: Path, cache: Path) -> None:
    layout = write_folder(tmp_path / "layout", files)

    with pytest.raises(ImageError, match=why) as caught:
        root.find(layout)

    assert str(caught.value).startswith(str(layout)) and caught.value.remedy
    assert left(cache) == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"Cmd": "sh -c"}, "Cmd is missing, or of the wrong kind"),
        ({"Env": [5]}, "Env is no list of words"),
        ({"Entrypoint": ["a\0b"]}, "a word that no program can be given"),
        ({"User": "\ud800"}, "a word that no program can be given"),
        ({"WorkingDir": {"a": 1}}, "WorkingDir is missing, or of the wrong kind"),
    ],
)
def test_a_damaged_configuration(settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=why):
        root.find(write_folder(tmp_path / "layout", Image(BASE, **settings).files()))


def test_layers_of_an_unknown_kind(tmp_path: Path) -> None:
    image = Image(BASE)
    other = json.loads(image.manifest)
    other["layers"][0]["mediaType"] += "+encrypted"
    image.manifest = json.dumps(other).encode()
    image.blobs[digest(image.manifest)] = image.manifest

    with pytest.raises(ImageError, match=r"a layer of the unknown media type .*\+encrypted"):
        root.find(write_folder(tmp_path / "layout", image.files()))


def test_indexes_without_end(tmp_path: Path) -> None:
    files, index = Image(BASE).files(), b'{"manifests": []}'
    for _ in range(20):
        files[blob(index)] = index
        index = json.dumps({"manifests": [Image.describe(index, f"{OCI}.index.v1+json")]}).encode()
    layout = write_folder(tmp_path / "layout", files | {"index.json": index})

    with pytest.raises(ImageError, match="more than 8 indexes"):
        root.find(layout)


@pytest.mark.parametrize(
    ("name", "content", "error", "why"),
    [
        ("x.tar.gz", b"\x1f\x8b" + bytes(600), ConfigError, r"compressed with gzip; decompress it first \(gunzip\)"),
        ("x.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600), ConfigError, "unzstd"),
        ("x.tar", layer(entry("hello", b"x")), ConfigError, "is no container image"),
        ("x.img", bytes(4096), ConfigError, "no file system for a root"),
        ("empty", b"", ImageError, "is empty"),
        ("x.qcow2", b"QFI\xfb" + bytes(600), ImageError, "x.qcow2"),
    ],
)
def test_files_that_are_no_images(
    name: str, content: bytes, error: type[KvmpyError], why: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(error, match=why) as caught:
        root.find(tmp_path / name)

    assert name in str(caught.value) and "; " in str(caught.value)
    assert left(cache) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no "):
        root.find(tmp_path / "no.tar")


def test_a_blob_that_is_no_file(tmp_path: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    (layout / LAYER_BLOB).unlink()
    os.mkfifo(layout / LAYER_BLOB)

    with pytest.raises(ImageError, match="is no regular file"):
        root.find(layout)


def test_a_blob_that_is_a_link_out_of_the_layout(tmp_path: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    (layout / LAYER_BLOB).unlink()
    (layout / LAYER_BLOB).symlink_to("/etc/passwd")

    with pytest.raises(ImageError, match="layer sha256:"):
        root.find(layout)


def test_an_image_larger_than_the_limit(tmp_path: Path, cache: Path) -> None:
    layout = write_folder(tmp_path / "layout", Image(layer(entry("zeros", bytes(3 << 20)))).files())

    with pytest.raises(ImageError, match=r"larger than 1048576 bytes when unpacked.*--root-limit"):
        root.find(layout, limit="1M")

    assert left(cache) == []
    assert root.find(layout, limit="4M").image is not None


def test_hostile_layers_leave_nothing_anywhere(tmp_path: Path, cache: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    layout = tmp_path / "layout"

    for bad in (entry("../../../../escaped"), entry("a/../../escaped")):
        write_folder(layout, Image(BASE, layer(bad)).files())
        with pytest.raises(ImageError, match=r'has "\.\." in it'):
            root.find(layout)

    assert left(cache) == []
    assert list(tmp_path.rglob("escaped")) == []
    assert before <= set(tmp_path.rglob("*"))


def test_an_archive_cut_off_anywhere(tmp_path: Path, cache: Path) -> None:
    whole = write_archive(tmp_path / "whole.tar", IMAGE.files()).read_bytes()
    end = len(whole.rstrip(b"\0"))

    for size in range(512, end, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(KvmpyError, match=r"cut\.tar"):
            root.find(tmp_path / "cut.tar")

    assert left(cache) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["index.json", blob(IMAGE.manifest), blob(IMAGE.config)]),
    at=st.integers(0, 2000),
    put=st.binary(max_size=9),
)
def test_any_change_of_json_is_one_line(name: str, at: int, put: bytes, tmp_path: Path) -> None:
    data = bytearray(IMAGE.files()[name])
    data[at % len(data) : at % len(data) + len(put)] = put
    layout = write_folder(tmp_path / "layout", changed(name, bytes(data)))

    try:
        root.find(layout)
    except KvmpyError as error:
        assert str(layout) in str(error)


# The cache.

MAKE = """
import sys, time
from kvmpy import root
from kvmpy.oci import ext4
finish = ext4.Ext4.finish
def slow(*words):
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    finish(*words)
ext4.Ext4.finish = slow
print(root.find(sys.argv[1]).disk.path)
"""


def begun(layout: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that is in the middle of it."""
    process = subprocess.Popen([sys.executable, "-c", MAKE, layout, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def test_a_process_that_is_killed_leaves_nothing_that_counts(tmp_path: Path, cache: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    with begun(layout, 60) as process:
        process.send_signal(signal.SIGKILL)
    assert any(name.endswith(".part") for name in left(cache))

    found = root.find(layout)

    assert found.image is not None
    assert left(cache) == [found.disk.path.parent.name]


def test_two_that_want_the_same_image(tmp_path: Path, cache: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    with begun(layout, 1) as process:
        second = root.find(layout)  # waits for the first
        assert process.stdout is not None
        assert process.stdout.read().strip() == str(second.disk.path)

    assert process.returncode == 0
    assert left(cache) == [second.disk.path.parent.name]


def test_an_interrupt_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    with begun(layout, 60) as process:
        process.send_signal(signal.SIGINT)

    assert process.returncode != 0
    assert left(cache) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"id": 5}', b'{"env": 5}', b'{"env": [[1]]}'])
def test_an_entry_that_is_damaged_is_made_anew(damage: bytes, tmp_path: Path) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    entry = root.find(layout).disk.path.parent
    (entry / "config.json").write_bytes(damage)

    found = root.find(layout)

    assert found.image is not None and found.image.user == "ann:staff"


def test_the_images_used_longest_ago_go(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEEP", 2)
    layouts = [write_folder(tmp_path / f"l{number}", Image(BASE, Cmd=[str(number)]).files()) for number in range(3)]
    entries = []
    for layout in layouts[:2]:
        entries.append(root.find(layout).disk.path.parent)
        os.utime(entries[-1], (len(entries), len(entries)))
    root.find(layouts[0])  # used now

    root.find(layouts[2])

    assert entries[0].exists()
    assert not entries[1].exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_folder(tmp_path / "layout", IMAGE.files())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    with pytest.raises(kvmpy.HostError, match=r"cannot write .*file.*; make room there, or set XDG_CACHE_HOME"):
        root.find(layout)


# The command line.


def test_an_entrypoint_of_kvmpy_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Started(Exception):
        pass

    def start(self: kvmpy.Sandbox, lock: object) -> None:
        raise Started

    def argv(self: Any, words: list[str]) -> list[str]:
        started.append(words)
        return ["x"]

    monkeypatch.setattr(kvmpy.Sandbox, "start", start)
    monkeypatch.setattr("kvmpy.oci.manifest.Config.argv", argv)
    monkeypatch.setattr("kvmpy.cli.relay.starting", lambda: None)

    for words in (["--", "a", "b"], []):
        parser = run.argparse.ArgumentParser()
        run.add_arguments(parser)
        with pytest.raises(Started):
            run.run(parser.parse_args(["--root", str(path), *words]))

    assert started == [["a", "b"], []]


def test_names_in_what_docker_save_wrote(tmp_path: Path) -> None:
    other = Image(BASE)
    both = json.loads(IMAGE.docker_files()["manifest.json"]) + json.loads(other.docker_files()["manifest.json"])
    both[1]["RepoTags"] = ["other:1"]
    files = IMAGE.docker_files() | other.docker_files() | {"manifest.json": json.dumps(both).encode()}
    files |= {"1/layer.tar": IMAGE.layers[1]}
    archive = write_archive(tmp_path / "both.tar", files)

    assert root.find(f"{archive}#tiny:latest").image is not None
    with pytest.raises(ConfigError, match=r'both.tar has no image "x:1"; it has tiny:latest, other:1'):
        root.find(f"{archive}#x:1")
    with pytest.raises(ConfigError, match=r"several images \(tiny:latest, other:1\); name one: .*both.tar#NAME:TAG"):
        root.find(archive)
