from __future__ import annotations

import pytest

from m2_encoder.config.numbers import divide, multiply


def test_whole_numbers() -> None:
    assert divide(24000, 16, 5) == 300
    assert divide(1600, 256) == 6
    assert multiply(64, 4) == 256


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((100, 0), "${div:100,0}: 0 is no whole number above 0"),
        (("x", 2), "${div:x,2}: 'x' is no whole number above 0"),
        ((1.5, 2), "${div:1.5,2}: 1.5 is no whole number above 0"),
        ((True, 2), "${div:True,2}: True is no whole number above 0"),
        ((None, 2), "${div:None,2}: None is no whole number above 0"),
        ((2,), "${div:2}: needs two whole numbers, as in ${div:A,B}"),
    ],
)
def test_anything_else_is_refused(values: tuple[object, ...], said: str) -> None:
    with pytest.raises(ValueError, match="whole number") as refused:
        divide(*values)
    assert str(refused.value) == said
