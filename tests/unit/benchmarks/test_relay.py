from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks._relay import DelayLine, destination_port

_GAPS = st.lists(st.floats(0, 0.01), min_size=1, max_size=50)


def _frame(address: str) -> bytes:
    return bytes(10) + bytes.fromhex(address.replace(":", "")) + b"source and payload"


@given(_GAPS, st.floats(1e-4, 0.1))
def test_every_frame_leaves_once_in_order_and_exactly_late(gaps: list[float], latency_s: float) -> None:
    line, now, arrivals, departures = DelayLine(latency_s), 0.0, [], []
    for number, gap in enumerate(gaps):
        now += gap
        arrivals.append(now)
        line.push(now, number % 4, str(number).encode())
    clock = 0.0
    while (wait := line.wait_s(clock)) is not None:
        clock += wait
        departures += [(clock, port, int(frame)) for port, frame in line.pop_due(clock)]
    assert [number for _, _, number in departures] == list(range(len(gaps)))
    assert all(port == number % 4 for _, port, number in departures)
    assert all(abs(departed - arrivals[number] - latency_s) < 1e-9 for departed, _, number in departures)


def test_it_delays_without_throttling() -> None:
    line = DelayLine(0.02)
    for number in range(10_000):
        line.push(number * 1e-6, 0, b"")
    assert line.pop_due(0.02 - 1e-9) == []
    assert len(line.pop_due(0.02 + 5e-3)) == 5_001
    assert len(line.pop_due(0.02 + 1e-2)) == 4_999


def test_it_tells_how_late_it_was() -> None:
    line = DelayLine(0.02)
    line.push(1.0, 0, b"")
    line.push(2.0, 0, b"")
    assert len(line.pop_due(1.5)) == 1
    assert line.latest_s == pytest.approx(0.48)
    line.pop_due(2.021)
    assert line.latest_s == pytest.approx(0.48)


def test_nothing_under_way_means_no_wait() -> None:
    line = DelayLine(0.02)
    assert line.wait_s(1.0) is None
    line.push(1.0, 0, b"")
    assert line.wait_s(5.0) == 0.0


def test_frames_go_to_the_rank_they_are_addressed_to() -> None:
    assert destination_port(_frame("02:00:00:00:00:03")) == 3
    assert destination_port(_frame("ff:ff:ff:ff:ff:ff")) is None
    assert destination_port(_frame("33:33:00:00:00:01")) is None
    assert destination_port(_frame("02:00:00:00:01:03")) is None  # the hub's own end
