"""Stages that turn measured tables into decisions: rules for single pairs, verdicts of global rules, score bounds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.curation.evaluation_images import read_hash_list
from m2_encoder.curation.global_rules import RULES, Chunk, Verdicts, fallen, read_verdicts
from m2_encoder.curation.rules import apply_rules, build_rules, check_score, reject
from m2_encoder.curation.settings import CurationSettings
from m2_encoder.curation.tables import read_notes, read_table, write_table

NO_LANGUAGE: Final = "unknown"
"""In counts, the language of rows without a caption."""

COPIED: Final = "copied"
"""Column that marks rows whose image occurs more than once; only with `duplicate_images="mark"`."""

_ADDED_BY_VERDICTS = ("first_shard", "first_row")


class RulesTask(NamedTuple):
    """Rules for single pairs, for one shard."""

    output: str
    measured: str
    settings: CurationSettings
    evaluation: str | None  # hash list of the evaluation images, if any


class MergeTask(NamedTuple):
    """What all global rules decided, for one chunk of shards."""

    output: str  # a marker, written after the tables
    tables: tuple[str, ...]  # where the table of each shard goes
    chunk: Chunk
    verdicts: tuple[Verdicts, ...]


class FlagTask(NamedTuple):
    """Scores to decisions, for one shard."""

    output: str
    merged: str  # the shard's table so far
    scores: tuple[str, ...]  # the score files of its windows, in order
    settings: CurationSettings


def apply_pair_rules(task: RulesTask) -> None:
    """Apply the rules that look at one pair at a time."""
    evaluation = None if task.evaluation is None else read_hash_list(Path(task.evaluation))
    rules = build_rules(task.settings, evaluation)
    source = Path(task.measured)
    batch = to_batch(read_table(source))
    write_table(Path(task.output), pa.Table.from_batches([apply_rules(batch, rules)]), notes=read_notes(source))


def merge_verdicts(task: MergeTask) -> None:
    """Add the verdicts of the global rules, with the place of the row that a rejected one repeats."""
    verdicts = [(RULES[found.rule], read_verdicts(found, task.chunk.number)) for found in task.verdicts]
    paths = zip(task.chunk.paths, task.tables, strict=True)
    for number, (source, target) in enumerate(paths, start=task.chunk.first):
        if Path(target).exists():
            continue
        batch = to_batch(read_table(Path(source)))
        first: dict[str, Any] = {name: np.zeros(len(batch), dtype=np.uint32) for name in _ADDED_BY_VERDICTS}
        rejected = np.zeros(len(batch), dtype=bool)
        sample = batch.column("sample").to_numpy()
        marks: dict[str, pa.Array] = {}
        for rule, verdict in verdicts:
            mask, repeats = fallen(sample, number, rule, verdict)
            if not rule.rejects:
                marks[COPIED] = pa.array(mask)
                continue
            mask &= batch.column("keep").to_numpy(zero_copy_only=False)
            batch = reject(batch, pa.array(mask), rule.reason)
            first = {name: np.where(mask, repeats[name[6:]], values) for name, values in first.items()}
            rejected |= mask
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns |= marks | {name: pa.array(values, mask=~rejected) for name, values in first.items()}
        write_final(Path(target), pa.record_batch(columns), notes=read_notes(Path(source)))
    marker = Path(task.output)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text("done\n", encoding="ascii")


def flag_scores(task: FlagTask) -> None:
    """Add the scores; reject and flag rows by the bounds of the settings."""
    merged = Path(task.merged)
    batch = to_batch(read_table(merged))
    scores = [read_table(Path(path)).column("score").combine_chunks() for path in task.scores]
    score = pa.concat_arrays(scores) if scores else pa.nulls(0, pa.float32())
    columns = dict(zip(batch.schema.names, batch.columns, strict=True)) | {"score": score}
    bounds = task.settings.score
    assert bounds is not None
    flagged = check_score(pa.record_batch(columns), drop_below=bounds.drop_below, rewrite_below=bounds.rewrite_below)
    write_final(Path(task.output), flagged, notes=read_notes(merged))


def write_final(path: Path, batch: pa.RecordBatch, *, notes: dict[str, str]) -> None:
    """Write a decided table with its counts as notes, which the report reads."""
    counted = {key: value for key, value in notes.items() if key != "counts"}
    counted |= {"counts": json.dumps(count_decisions(batch)), "kept_samples": str(len(kept_samples(batch)))}
    write_table(path, pa.Table.from_batches([batch]), notes=counted)


def count_decisions(batch: pa.RecordBatch) -> dict[str, dict[str, int]]:
    """Rows by language and by reason; kept ones under "kept", those of them to be rewritten also under "rewrite"."""
    counts: dict[str, Counter[str]] = {}
    language = pc.fill_null(batch.column("language"), NO_LANGUAGE).to_pylist()
    reason = pc.fill_null(batch.column("reason"), "kept").to_pylist()
    for name, word in zip(language, reason, strict=True):
        counts.setdefault(name, Counter())[word] += 1
    if "rewrite" in batch.schema.names:
        for name, flag in zip(language, batch.column("rewrite").to_pylist(), strict=True):
            if flag:
                counts[name]["rewrite"] += 1
    return {name: dict(sorted(words.items())) for name, words in sorted(counts.items())}


def kept_samples(batch: pa.RecordBatch | pa.Table) -> np.ndarray[Any, Any]:
    """Numbers of the samples of which something is kept, in order."""
    keep = batch.column("keep").to_numpy(zero_copy_only=False)
    return np.unique(batch.column("sample").to_numpy()[keep])


def to_batch(table: pa.Table) -> pa.RecordBatch:
    """A table as one batch; rules look at all rows of a shard at once."""
    columns = [column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in table.columns]
    return pa.record_batch(columns, names=table.schema.names)
