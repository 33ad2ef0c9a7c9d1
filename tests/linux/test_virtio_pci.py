"""Linux finds virtio devices on the PCI bus, and their interrupts are messages."""

from __future__ import annotations

import re
from pathlib import Path

import kvmpy
from kvmpy.virtio.rng import Rng

LIMIT = 150.0  # seconds, for all that the guest does
DEVICES = 40  # more than a bus has device numbers

SCRIPT = """
for d in /sys/bus/pci/devices/*; do echo "pci ${d##*/} $(cat $d/vendor) $(cat $d/device) $(cat $d/revision)"; done
for d in /sys/bus/virtio/devices/*; do echo "virtio ${d##*/} $(cat $d/device) $(cat $d/status)"; done
for n in 0 39; do
    echo virtio_rng.$n > /sys/class/misc/hw_random/rng_current
    dd if=/dev/hwrng bs=4096 count=4 2>/dev/null | sha256sum | sed 's/^/random /'
done
irq=$(sed -n 's/^ *\\([0-9]*\\):.*virtio0-input/\\1/p' /proc/interrupts)
echo virtio_rng.0 > /sys/class/misc/hw_random/rng_current
for cpu in 0 1; do echo $cpu > /proc/irq/$irq/smp_affinity_list; dd if=/dev/hwrng of=/dev/null bs=4k count=4; done
grep virtio /proc/interrupts
cat /proc/cmdline
"""


def interrupts(text: str, name: str) -> list[str]:
    """How many a vector had on each CPU, from /proc/interrupts."""
    (counts,) = re.findall(rf"^ *\d+: ([ \d]+)PCI-MSI.*\b{name}\b", text, re.MULTILINE)
    return counts.split()


def test_forty_devices(cloud: Path) -> None:
    machine = kvmpy.Machine(kernel=cloud, cpus=2, transport="pci", exec=SCRIPT)
    for _ in range(DEVICES):
        machine.add(Rng())

    with machine:
        stop = machine.wait(LIMIT)
    text = machine.console.text

    assert (stop.reason, stop.status) == (kvmpy.Reason.EXIT, 0), text
    functions = [f"0000:00:{1 + n // 8:02x}.{n % 8}" for n in range(DEVICES)]
    assert re.findall(r"^pci (\S+) 0x1af4 0x1044 0x01", text, re.MULTILINE) == functions
    assert len(re.findall(r"^virtio virtio\d+ 0x0004 0x0000000f", text, re.MULTILINE)) == DEVICES
    assert len(set(re.findall(r"^random (\S+)", text, re.MULTILINE))) == 2
    vectors = re.findall(r"PCI-MSI\S* .*(virtio\d+-(?:config|input))", text)
    assert len(vectors) == 2 * DEVICES
    assert all(int(count) for count in interrupts(text, "virtio0-input"))  # on both CPUs, one after the other
    assert any(int(count) for count in interrupts(text, "virtio39-input"))
    assert "pci=off" not in text
