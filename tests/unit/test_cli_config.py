"""Machines in YAML: what --config takes, what is refused, and that `kvmpy config` prints what --config takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpy import catalogue
from kvmpy.cli import config, options, settings
from kvmpy.config import Volume
from kvmpy.core.errors import ConfigError, KvmpyError, NotFoundError
from kvmpy.core.record import replace

EVERYTHING = """
kernel: bzImage
initrd: [one.img, two.img]
mem: 1G
cpus: 2
append: quiet
boot: pvh
modules: [ext4, fuse]
modules_dir: /lib/modules/6.1
console: virtio
transport: pci
disks:
  - root.img
  - data.img,ro
  - {path: "a,b.qcow2", format: qcow2, snapshot: on, queues: 2, bandwidth: 10M}
nets:
  - tap=tap0,mtu=9000
  - {mac: 52:54:00:12:34:56, pcap: net.pcap}
publish: [2222:22, 53:53/udp]
volumes: ["src:/mnt/src:ro", /a:b:/out]
devices:
  - virtio-rng
  - virtio-balloon: {target: 64M, deflate_on_oom: no, stats: 5}
  - virtio-console: {port: org.example.agent, path: agent.sock}
  - virtio-net,backend=socket,path=s
serial: file=out.txt
timeout: 10
"""
DEVICES = (
    "virtio-blk,path=root.img",
    "virtio-blk,path=data.img,ro",
    "virtio-blk,path=a,,b.qcow2,format=qcow2,snapshot=on,queues=2,bandwidth=10M",
    "virtio-net,backend=tap,name=tap0,mtu=9000",
    "virtio-net,backend=user,publish=2222:22+53:53/udp,mac=52:54:00:12:34:56,pcap=net.pcap",
    "virtio-rng",
    "virtio-balloon,target=64M,deflate_on_oom=no,stats=5",
    "virtio-console,port=org.example.agent,path=agent.sock",
    "virtio-net,backend=socket,path=s",
)


def told(*words: str | Path) -> settings.Told:
    args = options.read(list(map(str, words)), settings.OPTIONS)
    assert args is not None
    return settings.of(args)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vm.yaml"
    path.write_text(EVERYTHING)
    return path


def test_all_that_a_file_can_say(file: Path) -> None:
    said = told("--config", file)
    machine = settings.machine_config(said)

    assert machine.kernel == "bzImage"
    assert machine.initrd == ("one.img", "two.img")
    assert (machine.mem, machine.cpus, machine.boot) == (1 << 30, 2, "pvh")
    assert machine.append == ("root=/dev/vda rw", "quiet")
    assert (machine.modules, machine.modules_dir) == (("ext4", "fuse"), "/lib/modules/6.1")
    assert (machine.console, machine.transport) == ("virtio", "pci")
    assert machine.devices == DEVICES
    assert machine.volumes == (Volume("src", "/mnt/src", ro=True), Volume("/a:b", "/out"))
    assert (said["serial"], said["timeout"]) == ("file=out.txt", "10")
    assert set(said) == set(settings.KEYS) - {"cmdline", "exec"}  # with those there is no root, or no initrd


def test_options_replace_or_add(file: Path) -> None:
    said = told(
        "--config",
        file,
        "-m",
        "64M",
        "-i",
        "mine",
        "--append",
        "debug",
        "--disk",
        "x",
        "--volume",
        "v:/v",
        "--device",
        "virtio-rng",
    )
    machine = settings.machine_config(said)

    assert (machine.mem, machine.cpus, machine.initrd) == (64 << 20, 2, ("mine",))
    assert machine.append == ("root=/dev/vda rw", "quiet", "debug")
    assert machine.devices == (*DEVICES[:3], "virtio-blk,path=x", *DEVICES[3:], "virtio-rng")
    assert [volume.guest for volume in machine.volumes] == ["/mnt/src", "/out", "/v"]


def test_what_is_printed_says_the_same(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = options.read(["--config", str(file), "--cpus", "3"], config.OPTIONS)
    assert args is not None

    status = config.run(args)
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    before, after = told("--config", file, "--cpus", "3"), told("--config", tmp_path / "printed.yaml")

    assert status == 0
    assert replace(settings.machine_config(after), devices=()) == replace(settings.machine_config(before), devices=())
    assert list(map(catalogue.parse, settings.devices(after))) == list(map(catalogue.parse, settings.devices(before)))
    assert (after["serial"], after["timeout"]) == (before["serial"], before["timeout"])
    assert settings.dump(after) == printed


def test_what_is_printed_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    printed = settings.dump(told("--kernel", "k"))

    assert printed == ("kernel: k\nmem: 512M\ncpus: 1\nboot: auto\nconsole: serial\ntransport: mmio\nserial: stdio\n")


def test_no_initrd_differs_from_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "vm.yaml").write_text("initrd: []")

    said = told("--config", tmp_path / "vm.yaml", "-k", "k")

    assert settings.machine_config(said).initrd == ()
    assert "initrd: []" in settings.dump(said)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_a_file_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "vm.yaml").write_text(text)

    assert told("--config", tmp_path / "vm.yaml") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernal: x", "vm.yaml: unknown key 'kernal'; the keys are kernel, initrd, mem, "),
        ("mem: 1G\nmem: 2G", "vm.yaml, line 1: 'mem' is there twice; keep one"),
        ("mem: [1G]", "vm.yaml: mem: list instead of a text; give one text"),
        ("mem:", "vm.yaml: mem has no value; give one, or leave the key out"),
        ("append: [[a]]", "vm.yaml: append: list instead of a text"),
        ("disks: [{path: {a: b}}]", "vm.yaml: disks: virtio-blk: path: dict instead of a text"),
        ("devices: [{a: {}, b: {}}]", "vm.yaml: devices: a device with 2 names; write"),
        ("devices: [{virtio-rng: [fast]}]", "vm.yaml: devices: the options of virtio-rng are no mapping; write"),
        ("- a", "vm.yaml is no configuration; write keys with values"),
        ("just text", "vm.yaml is no configuration"),
        ("a: b: c", "vm.yaml, line 1 is no YAML: mapping values are not allowed here; mend the file"),
        ("a: [", "vm.yaml, line 1 is no YAML: "),
        ("[" * 5000, "vm.yaml is no YAML: "),
        ("? [a]\n: b", "vm.yaml, line 1 is no YAML: found unhashable key"),
        ("kernel: \x07", "vm.yaml is no YAML: "),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "vm.yaml").write_text(text)

    with pytest.raises(ConfigError) as caught:
        told("--config", tmp_path / "vm.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("disks: [{path: a, read_only: on}]", 'virtio-blk has no option "read_only"; it has path, ro, '),
        ("nets: [{speed: 1}]", 'virtio-net has no option "speed"; it has backend, '),
        ("devices: [{virtio-rng: {seed: 1}}]", 'virtio-rng has no option "seed"; it has none'),
        ("devices: [virtio-gpu]", 'unknown device "virtio-gpu"; use virtio-balloon, '),
        ("disks: [{ro: on}]", 'virtio-blk needs the option "path"'),
        ("disks: [{path: a, ro: maybe}]", 'virtio-blk: option ro: "maybe" is no switch'),
        ("mem: 1.5G", 'invalid size "1.5G"'),
        ("transport: usb", 'invalid transport "usb"'),
    ],
)
def test_machines_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "vm.yaml").write_text(text)

    with pytest.raises(KvmpyError) as caught:
        settings.dump(told("--config", tmp_path / "vm.yaml"))
    assert message in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"configuration .*none: no such file"):
        told("--config", tmp_path / "none")


def test_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "vm.yaml").write_bytes(b"#" * (1 << 21))

    with pytest.raises(ConfigError, match="more than"):
        told("--config", tmp_path / "vm.yaml")


@pytest.mark.parametrize("source", ["README.md", "kvmpy/cli/settings.py"], ids=["README", "help"])
def test_the_examples_in_the_documentation(tmp_path: Path, source: str) -> None:
    text = (Path(__file__).parents[2] / source).read_text()
    (example,) = re.findall(r"^ *kernel: bzImage\n(?:[ -]*[a-z{].+\n)+", text, re.MULTILINE)
    (tmp_path / "vm.yaml").write_text(example)

    machine = settings.machine_config(told("--config", tmp_path / "vm.yaml"))

    assert [catalogue.parse(text)[0] for text in machine.devices] == [
        *["virtio-blk"] * 2, "virtio-net", "virtio-rng", "virtio-balloon",
    ]  # fmt: skip
