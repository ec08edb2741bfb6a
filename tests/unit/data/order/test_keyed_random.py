from __future__ import annotations

import numpy as np
import pytest

from m2_encoder.data.order.keyed_random import mix, uniforms


def test_uniforms_are_splitmix64() -> None:
    # The published first outputs for the seeds 0 and 1234567.
    published = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    numbers = uniforms(list(published), 3)
    assert numbers.tolist() == [[(value >> 11) / 2**53 for value in values] for values in published.values()]


def test_uniforms_begin_alike_and_fill_the_interval() -> None:
    keys = [mix(7, index) for index in range(500)] + [2**64 - 1]
    numbers = uniforms(keys, 40)
    assert np.array_equal(numbers[:, :7], uniforms(keys, 7))
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / numbers.size) ** 0.5)
    # Neighbours in either direction have nothing to do with each other.
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / one.size**0.5
    assert uniforms([], 3).shape == (0, 3)
    assert uniforms([1], 0).shape == (1, 0)
