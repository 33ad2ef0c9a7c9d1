"""A program that runs one hostile guest in a locked-in process, and prints as JSON how that ended.

python locked_guest.py LEVEL FOLDER PEER    FOLDER is that of an Arena, whose file "guest" has the guest
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

from arena import REPORT_BYTES, machine, place

from kvmpy.cli.locked import Lock, leave

LEVEL, FOLDER, PEER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
GUEST, BINARIES = pickle.loads((FOLDER / "guest").read_bytes())
LOCK = Lock(LEVEL, with_json=True)
VM = machine(GUEST, FOLDER, PEER)


def lock_down() -> Callable[[str], None]:
    place(VM, GUEST, BINARIES)
    return LOCK.lock_down(VM)


VM.start(lock_down)
STOP = VM.wait(GUEST.seconds)
REPORT, FACTS = LOCK.report(VM, STOP)
VM.close()
LOCK.close()
assert REPORT, "there is no crash report"
assert len(REPORT) < REPORT_BYTES
print(json.dumps({"reason": STOP.reason.name, "status": STOP.status, "vcpus": len(json.loads(FACTS)["vcpus"])}))
leave(0)
