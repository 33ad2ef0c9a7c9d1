"""Records behave as dataclasses do."""

from __future__ import annotations

from typing import ClassVar

import pytest

from kvmpy.core.record import Record, fresh, replace


class Point(Record):
    ORIGIN: ClassVar[int] = 0
    x: int
    y: int = 5
    seen: list[int] = fresh(default_factory=list)


class Fixed(Record, frozen=True):
    name: str
    size: int = 1


def test_fields_by_place_and_by_name() -> None:
    point = Point(1, seen=[2])

    assert (point.x, point.y, point.seen) == (1, 5, [2])
    assert repr(point) == "Point(x=1, y=5, seen=[2])"


def test_each_gets_its_own_default() -> None:
    first, second = Point(1), Point(1)
    first.seen.append(3)

    assert second.seen == []
    assert first != second


@pytest.mark.parametrize(
    ("values", "named", "why"),
    [
        ((), {}, "'x' is missing"),
        ((1, 2, [], 4), {}, "has 3 fields, not 4"),
        ((1,), {"x": 2}, "'x' is given twice"),
        ((1,), {"z": 2}, "'z' is no field"),
    ],
)
def test_what_does_not_fit(values: tuple[int, ...], named: dict[str, int], why: str) -> None:
    with pytest.raises(TypeError, match=why):
        Point(*values, **named)  # type: ignore[arg-type]


def test_equal_ones_and_others() -> None:
    assert Fixed("a") == Fixed("a", 1)
    assert Fixed("a") != Fixed("b")
    assert Fixed("a") != Point(1)


def test_frozen_ones_are_hashed_and_cannot_be_changed() -> None:
    one = Fixed("a")

    with pytest.raises(AttributeError, match=r"Fixed\.size cannot be changed"):
        one.size = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match=r"Fixed\.size cannot be changed"):
        del one.size
    assert {one, Fixed("a")} == {one}


def test_others_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(1))


def test_a_copy_with_changes() -> None:
    assert replace(Fixed("a"), size=9) == Fixed("a", 9)
