"""Ranks that watch each other: who is silent is noticed, who is busy is not, and nobody waits at the end."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from m2_encoder.distributed import rank_watch
from m2_encoder.distributed.rank_watch import Place, RankWatch, connect, describe_exit, is_stopped_process, serve
from tests.support.ranks import free_port

TIMEOUT_S = 0.6


class Ranks:
    """Watches of several ranks in this process, each of which notes its end."""

    def __init__(self, count: int, *, arrive_s: float = 30.0, stopped: tuple[int, ...] = ()) -> None:
        self.endings: dict[int, str] = {}  # of processes, as the first rank sees them
        self.place = Place("127.0.0.1", free_port(), False, "m2_encoder/0")
        self.store = serve(self.place, world_size=count)
        self.ends: dict[int, list[str | None]] = {rank: [] for rank in range(count)}
        self.watches = [self._make(rank, count, arrive_s, stopped) for rank in range(count)]

    def _make(self, rank: int, count: int, arrive_s: float, stopped: tuple[int, ...]) -> RankWatch:
        return RankWatch(
            self.place, rank=rank, world_size=count, timeout_s=TIMEOUT_S, arrive_s=arrive_s,
            where=lambda: f"step {10 + rank}", is_stopped=stopped.__contains__, end=self.ends[rank].append,
            find_end=self.endings.get if rank == 0 else lambda _: None,
        )  # fmt: skip

    def wait_for(self, *ranks: int) -> None:
        """Until these have ended."""
        deadline = time.monotonic() + 20
        while not all(self.ends[rank] for rank in ranks):
            assert time.monotonic() < deadline, self.ends
            time.sleep(0.01)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "PERIOD_S", 0.05)


def test_nobody_ends_ranks_that_live_and_leave_one_after_the_other() -> None:
    ranks = Ranks(3)
    for watch in ranks.watches:
        watch.start()
    time.sleep(2 * TIMEOUT_S)  # all are busy with something
    for watch in reversed(ranks.watches):
        started = time.monotonic()
        watch.leave(wait=watch is ranks.watches[0])
        assert time.monotonic() - started < TIMEOUT_S
    assert ranks.ends == {0: [], 1: [], 2: []}


def test_a_silent_rank_ends_all_and_the_first_one_says_which() -> None:
    ranks = Ranks(3)
    for watch in ranks.watches:
        watch.start()
    time.sleep(0.3)
    ranks.watches[2].stop()  # as a process that is stopped: its thread does nothing more
    ranks.wait_for(0, 1)
    (said,) = ranks.ends[0]
    who = rf"rank 2 \(pid {os.getpid()} on \S+, last seen at step 12\)"
    assert said is not None
    assert re.match(rf"at step 10: {who} has given no sign of life for \d s\. The run ends; run\.resume=auto", said)
    assert len(said) < 400
    assert ranks.ends[1] == [None], "one of them says it"
    assert ranks.ends[2] == []


def test_the_first_rank_is_watched_by_all_others() -> None:
    ranks = Ranks(2)
    for watch in ranks.watches:
        watch.start()
    time.sleep(0.3)
    ranks.watches[0].stop()
    ranks.wait_for(1)
    assert "at step 11: rank 0 (pid " in str(ranks.ends[1])


@pytest.mark.parametrize(("arrive_s", "stopped"), [(0.6, ()), (30.0, (1,))])
def test_a_rank_that_does_not_come(arrive_s: float, stopped: tuple[int, ...]) -> None:
    ranks = Ranks(2, arrive_s=arrive_s, stopped=stopped)
    ranks.watches[0].start()
    ranks.wait_for(0)
    assert "rank 1 (not there yet) has given no sign of life" in str(ranks.ends[0])


def test_a_process_that_has_ended_ends_all_before_it_counts_as_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_watch, "_FAILING_S", 0.1)
    ranks = Ranks(3)
    for watch in ranks.watches[:2]:
        watch.start()
    ranks.endings[2] = "was killed by SIGKILL"
    ranks.wait_for(0, 1)
    (said,) = ranks.ends[0]
    assert said is not None
    assert said.startswith("at step 10: rank 2 (not there yet) was killed by SIGKILL. The run ends; run.resume=auto")
    assert "no sign" not in said


def test_a_closed_connection_is_explained_by_who_is_silent() -> None:
    ranks = Ranks(2)
    for watch in ranks.watches:
        watch.start()
    time.sleep(0.3)
    ranks.watches[1].stop()
    said = ranks.watches[0].explain_loss()
    assert said is not None
    assert re.match(r"at step 10: rank 1 \(pid \d+ on \S+, last seen at step 11\) has ended\. The run ends; ", said)
    ranks.watches[0].stop()


def test_who_does_not_leave_is_named_and_nothing_ends() -> None:
    ranks = Ranks(2)
    for watch in ranks.watches:
        watch.start()
    time.sleep(0.3)
    ranks.watches[1].stop()
    (lost,) = ranks.watches[0].leave(wait=True)
    assert re.match(
        r"rank 1 \(pid .*, last seen at step 11\) has given no sign of life for \d s, after all steps", lost
    )
    assert ranks.ends == {0: [], 1: []}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, None),
        (0, None),
        (1, "has ended with exit code 1; what it said stands above, or in its own log"),
        (-9, "was killed by SIGKILL, often for want of memory"),
        (-7, "was killed by SIGBUS"),
    ],
)
def test_an_exit_in_words(code: int | None, said: str | None) -> None:
    assert describe_exit(code) == said


def test_a_rank_that_has_longer_to_come() -> None:
    ranks = Ranks(2)
    ranks.watches[0].start()
    time.sleep(2 * TIMEOUT_S)
    assert ranks.ends == {0: [], 1: []}
    ranks.watches[0].stop()


def test_a_stopped_process_is_recognised() -> None:
    if (pid := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    try:
        assert not is_stopped_process(pid)
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert is_stopped_process(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not is_stopped_process(pid)


def test_connections_see_one_store() -> None:
    ranks = Ranks(1)
    ranks.store.set("a", "1")
    assert connect(ranks.place, timeout_s=2).get("a") == b"1"
