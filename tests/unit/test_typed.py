"""What stands in for names of typing and enum at run time does what they do, as far as kvmpy uses them."""

import copy
import pickle

import pytest

from kvmpy.core.board import Reason
from kvmpy.core.bus import Slot
from kvmpy.core.typed import NamedTuple


class Pair(NamedTuple):
    """Two numbers."""

    left: int
    right: int = 2

    @property
    def total(self) -> int:
        return self.left + self.right


def test_members_are_found_by_name_and_value() -> None:
    assert Reason["HALT"] is Reason("guest halted for good") is Reason.HALT
    assert (Reason.HALT.name, Reason.HALT.value, repr(Reason.HALT)) == (
        "HALT",
        "guest halted for good",
        "<Reason.HALT: 'guest halted for good'>",
    )
    assert [reason.name for reason in Reason][:2] == ["POWEROFF", "RESET"]


def test_unknown_members_are_refused() -> None:
    with pytest.raises(ValueError, match="'bored' is not a valid Reason"):
        Reason("bored")
    with pytest.raises(KeyError):
        Reason["BORED"]


def test_members_stay_themselves_when_copied() -> None:
    assert copy.deepcopy(Reason.EXIT) is pickle.loads(pickle.dumps(Reason.EXIT)) is Reason.EXIT


def test_tuples_with_names() -> None:
    pair = Pair(5)

    assert (pair, pair.left, pair.total, pair._replace(left=1)) == ((5, 2), 5, 7, (1, 2))
    assert Slot._fields == ("read", "write", "lock", "mask")
    with pytest.raises(TypeError):
        Pair()  # type: ignore[call-arg]
