"""Runs on real ranks that are interrupted and go on with others: every later global batch is the uninterrupted run's.

To the pixel: sources, keys, identities, token ids, languages and augmented images of every row, in the order of the
global batch, from two weighted sources that both come to a second epoch and both hold unusable samples.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import UserError
from tests.support.mixtures import make_mixture, write_mixture
from tests.support.ranks import run_lightning_ranks, run_ranks
from tests.support.resuming import fit, furthest, read_rows
from tests.support.shards import write_numbers
from tests.support.slow_parts import choose_parts, mark_parts
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 12
EARLY, LATE = 4, 9  # in the first epoch of both sources, and in the second one
CLOSE = 1e-5  # of weights that move by 2e-4 in a step: Adam's first ones make much of the rounding of sums

# part: (world, arguments). A part goes on where another one stopped: "resume" names it. Parts run from left to right.
PARTS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole one": (1, {}),
    "whole noisy": (1, {"drop_path_rate": 0.4}),
    "early one": (1, {"stop": EARLY, "workers": 2}),
    "terminated one": (1, {"terminate": (EARLY, 0), "workers": 2, "drop_path_rate": 0.4}),
    "one, more workers": (1, {"resume": "terminated one", "workers": 3, "drop_path_rate": 0.4}),
    "segment one": (1, {"resume": "early one", "stop": LATE, "mixture": "new"}),
    "segments whole": (1, {"resume": "segment one", "mixture": "new", "workers": 2}),
    "whole two": (2, {"strategy": "ddp", "drop_path_rate": 0.4}),
    "one to two": (2, {"strategy": "ddp", "resume": "early one"}),
    "one to two split": (2, {"strategy": "fsdp", "resume": "early one", "workers": 1}),
    "terminated two": (2, {"strategy": "ddp", "terminate": (LATE, 1), "workers": 2, "drop_path_rate": 0.4}),
    "segment two": (2, {"resume": "segment one", "strategy": "ddp", "workers": 1, "mixture": "kept"}),
    "two to two": (2, {"strategy": "ddp", "resume": "terminated two", "drop_path_rate": 0.4}),
    "late two": (2, {"strategy": "ddp", "stop": LATE, "workers": 1}),
    "late split": (2, {"strategy": "fsdp", "terminate": (LATE, 0), "workers": 2}),
    "two to one": (1, {"resume": "late two", "workers": 3}),
    "two split to one": (1, {"resume": "late split", "workers": 2}),
    "one to four": (4, {"strategy": "ddp", "resume": "early one", "stop": 7}),
}
FEW = ("whole one", "early one", "one to two split", "late split", "two split to one")
"""More ranks and fewer; stopped and terminated; each with workers. The others are slow."""


def train(rank: int, world_size: int, parts: dict[str, dict[str, Any]], folder: str) -> dict[str, Any]:
    """Several parts on the same ranks, since starting processes takes longer than they do."""
    warnings.simplefilter("ignore")
    results = {}
    for name, settings in parts.items():
        given = dict(settings)
        workers, source, mixture = given.pop("workers", 0), given.pop("resume", None), given.pop("mixture", None)
        data: dict[str, Any] = {"num_workers": workers}
        if mixture is not None:
            shards = Path(folder) / "shards"
            sources = {"a": 1, "b": 1.5, "more": 2}
            data["sources"] = {name: {"shards": f"{shards}/{name}/*.tar", "weight": sources[name]} for name in sources}
            data["new_segment"] = mixture == "new"
        results[name] = fit(
            Path(folder) / name,
            Path(folder) / "shards",
            world_size=world_size,
            steps=STEPS,
            resume=None if source is None else Path(folder) / source / "checkpoints" / "last.ckpt",
            data=data,
            **given,
        )
    return results


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the first rank of every part ends with, and their folder."""
    folder = tmp_path_factory.mktemp("resume")
    write_mixture(folder / "shards")
    write_numbers(folder / "shards" / "more", [20, 30], first=700)
    found: dict[str, Any] = {}
    waiting = choose_parts(request, PARTS, FEW)
    while waiting:
        world_size = next(iter(waiting.values()))[0]
        now = {}
        for name, (size, settings) in waiting.items():
            if size != world_size:
                break
            now[name] = settings
        ranks = run_lightning_ranks(train, world_size, world_size, now, str(folder))
        found |= ranks[0]
        waiting = {name: part for name, part in waiting.items() if name not in now}
    return found, folder


def rows_of(folder: Path, part: str) -> dict[int, list[str]]:
    batches = read_rows(folder / part / "rows")
    assert all(len(times) == 1 for times in batches.values()), "a step came twice"
    return {step: rows for step, (rows,) in batches.items()}


def test_the_uninterrupted_run_meets_everything(results: tuple[dict[str, Any], Path]) -> None:
    found, folder = results
    whole = rows_of(folder, "whole one")
    assert sorted(whole) == list(range(STEPS))
    for first, last in ((0, EARLY), (EARLY, LATE), (LATE, STEPS)):
        keys = [row.rpartition("/")[0] for step in range(first, last) for row in whole[step]]
        assert {key[0] for key in keys} == {"a", "b"}
    for source, samples in (("a", 90), ("b", 40)):
        drawn = {
            stop: sum(row.startswith(source) for step in range(stop) for row in whole[step]) for stop in (EARLY, LATE)
        }
        assert drawn[EARLY] < samples < drawn[LATE]
    assert found["whole one"]["skipped"]["undecodable_image"] > 5


@pytest.mark.parametrize("part", mark_parts([name for name in PARTS if "mixture" not in PARTS[name][1]], FEW))
def test_every_global_batch_is_the_uninterrupted_runs(results: tuple[dict[str, Any], Path], part: str) -> None:
    found, folder = results
    whole, own = rows_of(folder, "whole one"), rows_of(folder, part)
    settings = PARTS[part][1]
    first = {None: 0, "early one": EARLY, "terminated one": EARLY}.get(settings.get("resume"), LATE)
    last = settings.get("stop") or settings.get("terminate", (STEPS,))[0]
    assert found[part]["step"] == last
    assert found[part]["exit"] == (143 if "terminate" in settings else None)
    assert own == {step: rows for step, rows in whole.items() if first <= step < last}


@pytest.mark.slow
@pytest.mark.parametrize(("part", "whole"), [("one, more workers", "whole noisy"), ("two to two", "whole two")])
def test_with_as_many_ranks_the_weights_are_the_same_bits(
    results: tuple[dict[str, Any], Path], part: str, whole: str
) -> None:
    assert furthest(results[0][part]["weights"], results[0][whole]["weights"]) == 0
    assert furthest(results[0]["whole one"]["weights"], results[0][whole]["weights"]) > 1e-4, "nothing was drawn"


@pytest.mark.parametrize("part", mark_parts(["one to two", "one to two split", "two to one", "two split to one"], FEW))
def test_with_other_ranks_the_weights_are_as_near_as_sums_in_another_order(
    results: tuple[dict[str, Any], Path], part: str
) -> None:
    assert furthest(results[0][part]["weights"], results[0]["whole one"]["weights"]) < CLOSE
    assert furthest(results[0]["early one"]["weights"], results[0]["whole one"]["weights"]) > 10 * CLOSE


@pytest.mark.slow
def test_a_segment_goes_on_on_other_ranks(results: tuple[dict[str, Any], Path]) -> None:
    """A source more, and other weights, from the early stop on; the rest of it with as many ranks, and with more."""
    _, folder = results
    middle, rest, other = (rows_of(folder, part) for part in ("segment one", "segments whole", "segment two"))
    assert (sorted(middle), sorted(rest)) == (list(range(EARLY, LATE)), list(range(LATE, STEPS)))
    assert rest == other
    old = rows_of(folder, "whole one")
    assert {row.split("/")[0] for rows in old.values() for row in rows} == {"a", "b"}
    new = [row for rows in (middle | rest).values() for row in rows]
    assert {row.split("/")[0] for row in new} == {"a", "b", "more"}
    # What is left of b's first epoch comes first, lane by lane; none of the samples that it had already.
    before = [row.split("/")[1] for step in range(EARLY) for row in old[step] if row.startswith("b/")]
    after = [row.split("/")[1] for row in new if row.startswith("b/")]
    assert len(set(before)) == len(before) < 40
    assert not set(before) & set(after[: (40 - len(before)) // 2])


def test_unusable_samples_are_counted_as_if_nothing_had_happened(results: tuple[dict[str, Any], Path]) -> None:
    whole = results[0]["whole one"]["skipped"]
    ended = {"one, more workers", "two to two", "one to two split", "two to one", "two split to one"} & set(results[0])
    assert len(ended) >= 2
    for part in ended:
        assert results[0][part]["skipped"] == whole, part


def open_own(rank: int, folder: str) -> str:
    """The same configuration on two machines, the second of which has a shard more."""
    module = make_mixture(Path(folder) / f"machine{rank}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.train_dataloader()
        except UserError as error:
            return str(error)
    return ""


def test_ranks_that_see_other_shards_all_say_so(tmp_path: Path) -> None:
    shards, ranks = tmp_path / "shards", tmp_path / "ranks"
    for rank in range(2):
        write_mixture(shards / f"machine{rank}")
    ranks.mkdir()
    assert run_ranks(open_own, 2, str(shards), folder=ranks) == ["", ""], "folders may differ"
    write_numbers(shards / "machine1" / "b" / "more", [3])[0].rename(shards / "machine1" / "b" / "1.tar")
    (tmp_path / "again").mkdir()
    for message in run_ranks(open_own, 2, str(shards), folder=tmp_path / "again"):
        assert message.startswith(
            "data.sources: the ranks see other shards; source b: 40 samples in 1 shards, weight 1"
        )
        assert "on rank 0, 43 samples in 2 shards" in message
