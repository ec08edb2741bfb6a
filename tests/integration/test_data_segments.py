"""A mixture that changes during a run: refused with the difference and the fix, or continued as a recorded segment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.errors import UserError
from tests.support.mixtures import make_mixture
from tests.support.resuming import fit, read_rows
from tests.support.shards import write_numbers
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS, MIDDLE = 8, 3
FIX = r"; bring the old one back, or start a new run with another run\.name, or go on with the new one by "
FIX += r"data\.new_segment=true: sources with the same shards continue where they were$"


def sources(shards: Path, **changed: dict[str, Any] | None) -> dict[str, Any]:
    own = {name: {"shards": f"{shards}/{name}/*.tar", "weight": 1} for name in ("a", "b")}
    values = {name: {**own.get(name, {}), **given} if given is not None else None for name, given in changed.items()}
    return {**own, **values}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_numbers(folder / "a", [20, 20, 20])
    write_numbers(folder / "b", [30], first=100)
    write_numbers(folder / "c", [16], first=200)
    return folder


def run(
    tmp_path: Path, shards: Path, name: str, *, after: str | None = None, stop: int | None = None, **data: Any
) -> Any:
    """A part of a run; the state of its loader, and its rows."""
    given = {"sources": sources(shards), **data}
    resume = None if after is None else tmp_path / after / "checkpoints" / "last.ckpt"
    fit(tmp_path / name, shards, steps=STEPS, stop=stop, resume=resume, data=given)
    state = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return loader, {step: rows for step, (rows,) in read_rows(tmp_path / name / "rows").items()}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "grown": ({"c": {"shards": "{shards}/c/*.tar", "weight": 1}}, r"\(source c added \(1 shards\)\)"),
    "weighted": ({"b": {"weight": 0.25}}, r"\(source b: weight 1 then, 0\.25 now\)"),
    "removed": ({"b": None}, r"\(source b removed\)"),
    "capped": ({"a": {"max_samples": 45}}, r"\(source a: 1 shard\(s\) changed \(.*/a/000002\.tar; .* 20 samples in"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_mixture_is_refused_or_a_recorded_segment(tmp_path: Path, shards: Path, what: str) -> None:
    change, words = CHANGES[what]
    new = {
        name: None
        if given is None
        else {k: v.format(shards=shards) if isinstance(v, str) else v for k, v in given.items()}
        for name, given in change.items()
    }
    _, whole = run(tmp_path, shards, "whole")
    _, first = run(tmp_path, shards, "first", stop=MIDDLE)
    with pytest.raises(UserError, match=f"another mixture of data {words}.*{FIX}"):
        run(tmp_path, shards, "refused", after="first", sources=sources(shards, **new))

    state, second = run(
        tmp_path, shards, "second", after="first", sources=sources(shards, **new), stop=6, new_segment=True
    )
    assert [segment["start"] for segment in state["segments"]] == [0, MIDDLE * 16]
    assert [source[0] for source in state["segments"][0]["sources"]] == ["a", "b"]
    assert first == {step: whole[step] for step in range(MIDDLE)}
    assert second[MIDDLE] != whole[MIDDLE]
    # Again, without asking for a segment, with workers; and with asking: no change, no segment.
    rests = [
        run(tmp_path, shards, name, after="second", sources=sources(shards, **new), **given)
        for name, given in (("workers", {"num_workers": 2}), ("asked", {"new_segment": True}))
    ]
    assert rests[0][1] == rests[1][1]
    for state, _ in rests:
        assert [segment["start"] for segment in state["segments"]] == [0, MIDDLE * 16]
        assert state["position"] == STEPS * 16
    # The old mixture is another one by now.
    with pytest.raises(UserError, match="another mixture"):
        run(tmp_path, shards, "back", after="second")


def test_asking_for_a_segment_without_a_change_is_harmless(tmp_path: Path, shards: Path) -> None:
    state, whole = run(tmp_path, shards, "whole", new_segment=True)
    assert [segment["start"] for segment in state["segments"]] == [0]
    run(tmp_path, shards, "first", stop=MIDDLE)
    state, rest = run(tmp_path, shards, "rest", after="first", new_segment=True)
    assert [segment["start"] for segment in state["segments"]] == [0]
    assert rest == {step: whole[step] for step in range(MIDDLE, STEPS)}


def test_a_shard_with_another_content_is_another_mixture(tmp_path: Path, shards: Path) -> None:
    run(tmp_path, shards, "first", stop=MIDDLE)
    (shards / "b" / "000000.tar").unlink()
    write_numbers(shards / "b", [31], first=100)
    with pytest.raises(UserError, match=r"b: 1 shard\(s\) changed .*30 samples in \d+ bytes then, 31 in \d+ now"):
        run(tmp_path, shards, "second", after="first")
    state, rows = run(tmp_path, shards, "third", after="first", new_segment=True)
    assert len(state["segments"]) == 2
    assert sorted(rows) == list(range(MIDDLE, STEPS))


def test_the_most_epochs_of_a_source_count_from_where_it_was_added(tmp_path: Path, shards: Path) -> None:
    one = {"max_epochs": 1, "shards": f"{shards}/c/*.tar"}
    run(tmp_path, shards, "first", stop=MIDDLE, lanes=1)
    # A share of 0.15 is 12 samples of the rest of the run, but 19 of a whole one.
    new = {"sources": sources(shards, c={**one, "weight": 0.35}), "lanes": 1}
    with pytest.raises(UserError, match="more than max_epochs=1"):
        next(iter(make_mixture(shards, max_steps=STEPS, **new).train_dataloader()))
    _, rows = run(tmp_path, shards, "enough", after="first", new_segment=True, **new)
    drawn = [row for batch in rows.values() for row in batch if row.startswith("c/")]
    assert len({row.split("/")[1] for row in drawn}) == len(drawn) > 5
    new = {"sources": sources(shards, c={**one, "weight": 2}), "lanes": 1}
    with pytest.raises(
        UserError, match=r"data\.sources\.c: the run draws \d+ samples of its 16, more than max_epochs=1"
    ):
        run(tmp_path, shards, "too much", after="first", new_segment=True, **new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "seed: 5 then, 6 now"),
        ({"lanes": 8}, "lanes: 4 then, 8 now"),
        ({"window": 17}, "window: 16 then, 17 now"),
        ({"global_batch_size": 8}, "global_batch_size: 16 then, 8 now"),
    ],
)
def test_settings_of_the_order_are_never_a_segment(shards: Path, change: dict[str, int], words: str) -> None:
    values = {"sources": sources(shards), "max_steps": STEPS}
    state = make_mixture(shards, **values).train_dataloader().state_dict()
    with pytest.raises(UserError, match=rf"another order of data \({words}\); give these settings their old values"):
        make_mixture(shards, **values, new_segment=True, **change).train_dataloader().load_state_dict(state)


def test_a_longer_run_goes_on_and_a_shorter_one_says_why_not(shards: Path) -> None:
    values = {"sources": sources(shards)}
    loader = make_mixture(shards, max_steps=STEPS, **values).train_dataloader()
    whole = [batch.keys for batch in loader]
    state = {**loader.state_dict(), "position": 16 * MIDDLE}
    longer = make_mixture(shards, max_steps=STEPS + 2, **values).train_dataloader()
    longer.load_state_dict(state)
    keys = [batch.keys for batch in longer]
    assert keys[: STEPS - MIDDLE] == whole[MIDDLE:]
    assert len(keys) == STEPS + 2 - MIDDLE
    with pytest.raises(UserError, match=r"position 48, which must be .* in 0\.\.32 \(2 steps\)"):
        make_mixture(shards, max_steps=2, **values).train_dataloader().load_state_dict(state)
