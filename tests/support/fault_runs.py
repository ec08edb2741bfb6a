"""Runs over damaged shards: what is delivered, counted and listed, and what should be, found without the reader."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from m2_encoder.data.order.plan import PositionPlan
from m2_encoder.data.shards.index import open_index
from m2_encoder.data.webdataset_module import BAD_SAMPLES_FILE, WebDatasetModule
from tests.support.faults import DAMAGED, PER_SHARD, Fault, write_set
from tests.support.mixtures import make_module_over
from tests.support.resuming import digest_rows
from tests.support.shard_server import ShardServer, serve_shards

STEPS = 12
BATCH = 8


class Outcome(NamedTuple):
    """What a run over some ranks gave.

    Attributes:
        keys: of the samples of each global batch, in the order of positions.
        digests: of everything that a model sees of them.
        drawn: unusable samples met while drawing, by reason, over all ranks.
        at_start: found in headers, by reason, over all ranks.
        listed: entries of the list: shard, key, reason, detail.
        plan: of its order, made when it started.
    """

    keys: list[list[str]]
    digests: list[list[str]]
    drawn: Counter[str]
    at_start: Counter[str]
    listed: list[dict[str, Any]]
    plan: PositionPlan


class Expected(NamedTuple):
    """What the fault says a run must give; as in `Outcome`."""

    keys: list[list[str]]
    drawn: Counter[str]
    at_start: Counter[str]
    listed: set[tuple[str, str | None, str]]


@contextmanager
def damaged_set(folder: Path, fault: Fault) -> Iterator[tuple[dict[str, Any], ShardServer | None]]:
    """Source settings over a set with the fault, and the server behind them where the shards are remote."""
    shards = write_set(folder, fault)
    if fault.server is None:
        yield settings(str(shards / "a" / "*.tar"), shards), None
        return
    for path in shards.rglob("*.tar"):
        open_index(path)  # beside the shards, as whoever publishes them leaves it: nothing is downloaded at the start
    with serve_shards(shards / "a") as server:
        values = settings(server.url("{0..2}.tar"), shards)
        cache = {"folder": str(folder / "cache"), "max_bytes": 1 << 30, "timeout_s": 30, "attempts": 1}
        yield {**values, "cache": cache}, server


def settings(shards_of_a: str, folder: Path) -> dict[str, Any]:
    """Sources a and b, two to one."""
    b = {"shards": str(folder / "b" / "*.tar"), "weight": 1}
    return {"sources": {"a": {"shards": shards_of_a, "weight": 2}, "b": b}}


def make_rank(values: Mapping[str, Any], folder: Path, *, rank: int = 0, world: int = 1) -> WebDatasetModule:
    """The data module of one rank of a run in a folder."""
    defaults = {"max_steps": STEPS, "global_batch_size": BATCH, "max_bad_share": 0.9}
    module = make_module_over(**{**defaults, **values})
    module.trainer = cast(
        Any,
        SimpleNamespace(
            default_root_dir=str(folder),
            global_rank=rank,
            local_rank=rank,
            world_size=world,
            num_devices=world,
            accumulate_grad_batches=1,
            max_steps=STEPS,
        ),
    )
    return module


def run_ranks(
    values: Mapping[str, Any],
    shards: Path,
    folder: Path,
    fault: Fault | None = None,
    *,
    server: ShardServer | None = None,
    world: int = 1,
) -> Outcome:
    """All batches of all ranks; what happens in the run happens when all of them have started."""
    modules = [make_rank(values, folder, rank=rank, world=world) for rank in range(world)]
    loaders = [module.train_dataloader() for module in modules]
    plan = modules[0]._plan((), 0)
    if fault is not None and fault.during is not None:
        fault.during(shards / "a" / DAMAGED)
    if fault is not None and fault.server is not None and server is not None:
        for module in modules:
            _become_impatient(module, server)
        server.always = {DAMAGED: fault.server, f"{DAMAGED}.index": fault.server}
    keys = [[""] * BATCH for _ in range(STEPS)]
    digests = [[""] * BATCH for _ in range(STEPS)]
    for rank, loader in enumerate(loaders):
        for step, batch in enumerate(loader):
            keys[step][rank::world] = batch.keys
            digests[step][rank::world] = digest_rows(batch)
    logs = [module.fault_log for module in modules]
    drawn, at_start = (sum((getattr(log, name) for log in logs), Counter[str]()) for name in ("counts", "at_start"))
    return Outcome(keys, digests, drawn, at_start, read_list(folder), plan)


def _become_impatient(module: WebDatasetModule, server: ShardServer) -> None:
    """Short time-outs, once the sound shards are there: on a busy machine they would fail, too."""
    remote = module._remote
    assert remote is not None
    for name in ("0.tar", "2.tar"):
        remote.fetch(server.url(name))
    remote._timeout_s = 0.5


def read_list(folder: Path) -> list[dict[str, Any]]:
    """The list of unusable samples of a run."""
    path = folder / BAD_SAMPLES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def expect(plan: PositionPlan, fault: Fault) -> Expected:
    """Walk the order of samples, with what the fault says about each of them instead of a reader."""
    drawn: Counter[str] = Counter()
    batches: list[list[str]] = [[] for _ in range(STEPS)]
    for position in range(STEPS * BATCH):
        for attempt in range(99):
            place = plan.locate(position, attempt=attempt)
            source = plan.manifest.sources[place.source]
            name = source.shards[place.shard].rpartition("/")[2]
            shard = int(name.partition(".")[0]) + (3 if source.name == "b" else 0)
            is_damaged = (source.name, name) == ("a", DAMAGED)
            key = fault.usable[place.number] if is_damaged else f"{shard * PER_SHARD + place.number:06d}"
            reason = fault.reason_of(key) if is_damaged else None
            if reason is None:
                batches[position // BATCH].append(key)
                break
            drawn[reason] += 1
    at_start = Counter(reason for _, reason in fault.entries) if fault.in_headers else Counter[str]()
    return Expected(batches, drawn, at_start, {(DAMAGED, key, reason) for key, reason in fault.entries})
