"""A curation from end to end: stages of tasks that write one file each, so that a stopped run can be continued.

    measure → rules → (spill → judge) per global rule → merge → score → flag → write → report

The intermediate files of a stage lie in a folder named after a hash of all that decides their content: shards,
settings, earlier stages. So files of other settings are never used, and what does not depend on a changed setting is
used again. All of it lies in the work folder inside the output folder, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from m2_encoder.curation.decide import FlagTask, MergeTask, RulesTask, apply_pair_rules, flag_scores, merge_verdicts
from m2_encoder.curation.evaluation_images import hash_files, join_hashes, plan_hashes, write_hash_list
from m2_encoder.curation.executors import Executor, peak_memory
from m2_encoder.curation.global_rules import RULES, Chunk, GlobalRule, JudgeTask, SpillTask, Verdicts, judge, spill
from m2_encoder.curation.measure import MeasureTask, measure_shard
from m2_encoder.curation.output_folder import OutputFolder
from m2_encoder.curation.report import Report, build_report, write_report
from m2_encoder.curation.settings import CurationSettings, fingerprint
from m2_encoder.curation.sources import Shard
from m2_encoder.curation.tables import read_notes
from m2_encoder.curation.writer import WriteTask, plan_shards, write_shard
from m2_encoder.errors import UserError

_VERSION: Final = 2  # raise it when a stage writes something else for the same input
Progress = Callable[[str, int, int], None]
"""Told the stage, how many of its tasks are done, and how many there are."""


class StageStats(NamedTuple):
    """What a stage cost."""

    stage: str
    tasks: int
    done_before: int  # how many of them an earlier run had finished
    seconds: float
    peak_bytes: int  # the most memory that one of its processes has held since it started


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """What `curate` did."""

    report: Report
    stages: tuple[StageStats, ...]  # what each stage cost; empty if everything was there already


def curate(
    shards: Sequence[Shard],
    output: Path,
    settings: CurationSettings,
    *,
    executor: Executor,
    evaluation: Sequence[str] = (),
    write: bool = True,
    overwrite: bool = False,
    keep_work: bool = False,
    accept: Callable[[Report], None] = lambda _report: None,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Curation:
    """Curate shards into new ones, or go on where an earlier call was stopped.

    Args:
        shards: of `sources.list_shards`.
        output: gets `<source>/<number>.tar`, `decisions/`, `report.json`, `report.md` and, if images of evaluation
            sets were named, `evaluation_hashes.txt`.
        settings: the rules.
        executor: who runs the tasks; the caller closes it.
        evaluation: hash lists, tars or folders of images that must not be kept.
        write: False decides and reports without writing shards, and keeps intermediate files: a later call with True
            writes what was decided, one with other settings need not read the shards again.
        overwrite: replace a finished curation with other settings or shards.
        keep_work: keep intermediate files, so that other thresholds need not read the shards again.
        accept: told what was decided before shards are written; what it raises ends the call, and another goes on.
        progress: told after every task.

    Raises:
        UserError: if the output folder holds something else, another process is at work in it, or a shard changes.
    """
    inside = [shard.path for shard in shards if Path(shard.path).is_relative_to(output.absolute())]
    if inside:
        raise UserError(f"output {output}: {inside[0]} is in there and would be read; give another folder")
    score = settings.score
    identity = {
        "version": _VERSION,
        "shards": [shard._asdict() for shard in shards],
        "settings": dataclasses.asdict(settings),
        "evaluation": _describe_files(evaluation),
        "model": _describe_files([place for place in (score.model, score.weights, score.tokenizer) if place])
        if score
        else [],
    }
    folder = OutputFolder(output, fingerprint(identity))
    if (finished := folder.open(write=write, overwrite=overwrite)) is not None:
        if finished["written"] and folder.is_untidy():
            folder.remove_work()
        return Curation(report=Report(finished), stages=())
    with folder.lock():
        run = _Run(shards, folder, settings, executor, progress, identity, accept)
        with _saying_what_stays(output):
            report = run.all_stages(evaluation, write=write)
            write_report(folder.path, report)
        if keep_work:
            folder.keep_work()
        elif write:
            folder.remove_work()
    return Curation(report=report, stages=tuple(run.stats))


@contextlib.contextmanager
def _saying_what_stays(output: Path) -> Iterator[None]:
    """What the disk refuses ends in one line."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        text = f"{error}; mend that and start again: what is done stays"
        raise UserError(" ".join(text.split()), key="output", value=output) from error


class _Run:
    """One call of `curate`: the stages, in order, with what they cost."""

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: OutputFolder,
        settings: CurationSettings,
        executor: Executor,
        progress: Progress,
        identity: Mapping[str, Any],
        accept: Callable[[Report], None],
    ) -> None:
        self._shards, self._folder, self._settings = list(shards), folder, settings
        self._executor, self._progress = executor, progress
        self._identity, self._accept = identity, accept
        later = ("score", "samples_per_shard")  # what pairs are decided without
        early = {name: value for name, value in identity["settings"].items() if name not in later}
        self._pairs_key = fingerprint([identity["version"], identity["shards"], early, identity["evaluation"]])
        self.stats: list[StageStats] = []

    def all_stages(self, evaluation: Sequence[str], *, write: bool) -> Report:
        measured = self._measure()
        hash_list = self._hash_evaluation(evaluation)
        ruled = self._rules(measured, hash_list)
        merged = self._global_rules(ruled)
        decided = merged if self._settings.score is None else self._score(merged)
        return self._write(decided, write=write)

    def _measure(self) -> list[Path]:
        most = self._settings.max_pixels
        folder = self._folder.stage("measure", fingerprint([_VERSION, most]))
        # Named after the shard alone: beside new or changed ones, those that were read need not be read again.
        paths = [folder / f"{fingerprint(shard._replace(number=0)._asdict())}.arrow" for shard in self._shards]
        tasks = [MeasureTask(str(path), shard, most) for path, shard in zip(paths, self._shards, strict=True)]
        self._run_stage("measure", measure_shard, tasks)
        return paths

    def _hash_evaluation(self, places: Sequence[str]) -> str | None:
        published = self._folder.path / "evaluation_hashes.txt"
        if not places:
            published.unlink(missing_ok=True)  # of an unfinished run
            return None
        most = self._settings.max_pixels
        folder = self._folder.stage("evaluation", fingerprint([self._identity["evaluation"], most]))
        tasks = plan_hashes(places, folder, max_pixels=most)
        self._run_stage("evaluation", hash_files, tasks)
        path = folder / "all.txt"
        lines = join_hashes(tasks)
        for target in (path, published):
            write_hash_list(target, lines)
        return str(path)

    def _rules(self, measured: Sequence[Path], hash_list: str | None) -> list[Path]:
        folder = self._folder.stage("rules", self._pairs_key)
        paths = [folder / f"{shard.stem}.arrow" for shard in self._shards]
        tasks = [
            RulesTask(str(path), str(source), self._settings, hash_list)
            for path, source in zip(paths, measured, strict=True)
        ]
        self._run_stage("rules", apply_pair_rules, tasks)
        return paths

    def _global_rules(self, ruled: Sequence[Path]) -> list[Path]:
        counts = [int(read_notes(path)["rows"]) for path in ruled]
        chunks = make_chunks(ruled, counts, self._settings.partition_rows)
        verdicts: list[Verdicts] = []
        for rule in RULES.values():
            if rule.is_on(self._settings):
                verdicts.append(self._global_rule(rule, chunks, sum(counts), tuple(verdicts)))
        folder = self._folder.stage("merge", self._pairs_key)
        paths = [folder / path.name for path in ruled]
        tasks = [
            MergeTask(
                str(folder / f"chunk-{chunk.number:06d}.done"),
                tuple(str(folder / Path(path).name) for path in chunk.paths),
                chunk,
                tuple(verdicts),
            )
            for chunk in chunks
        ]
        self._run_stage("merge", merge_verdicts, tasks)
        return paths

    def _global_rule(
        self, rule: GlobalRule, chunks: Sequence[Chunk], rows: int, earlier: tuple[Verdicts, ...]
    ) -> Verdicts:
        settings = self._settings
        partitions = max(1, -(-rows * rule.tables(settings, rows) // settings.partition_rows))
        folder = self._folder.stage(rule.reason, self._pairs_key)
        spills = tuple(str(folder / f"spill-{chunk.number:06d}.arrow") for chunk in chunks)
        outputs = tuple(str(folder / f"verdict-{number:06d}.arrow") for number in range(partitions))
        starts = tuple(chunk.first for chunk in chunks)
        self._run_stage(
            f"{rule.reason}: spill",
            spill,
            [
                SpillTask(path, rule.reason, chunk, earlier, partitions, rows, settings)
                for path, chunk in zip(spills, chunks, strict=True)
            ],
        )
        self._run_stage(
            f"{rule.reason}: judge",
            judge,
            [JudgeTask(path, rule.reason, spills, number, starts, settings) for number, path in enumerate(outputs)],
        )
        return Verdicts(rule.reason, outputs)

    def _score(self, merged: Sequence[Path]) -> list[Path]:
        # Here, because it loads torch's models, which no other stage needs.
        from m2_encoder.curation.scoring import Scorer, ScoreTask, inputs_of, prepare_window

        settings = self._settings.score
        assert settings is not None
        size, pictures = inputs_of(settings)
        model = dataclasses.replace(settings, rewrite_below=None, drop_below=None)  # other bounds need no new scores
        key = fingerprint([self._pairs_key, dataclasses.asdict(model), self._identity["model"], pictures.to_dict()])
        folder = self._folder.stage("score", key)
        by_shard: list[list[ScoreTask]] = []
        for path, shard in zip(merged, self._shards, strict=True):
            rows = int(read_notes(path)["rows"])
            by_shard.append(
                [
                    ScoreTask(
                        str(folder / f"{path.stem}-{start:08d}.arrow"),
                        str(path),
                        shard,
                        start,
                        min(start + settings.rows, rows),
                        size,
                        pictures,
                        self._settings.max_pixels,
                    )
                    for start in range(0, rows, settings.rows)
                ]
            )
        tasks = [task for own in by_shard for task in own]
        self._run_stage("score", prepare_window, tasks, consumer=Scorer, consumer_settings=settings)
        folder = self._folder.stage("flag", fingerprint([key, dataclasses.asdict(settings)]))
        paths = [folder / path.name for path in merged]
        flags = [
            FlagTask(str(path), str(source), tuple(task.output for task in own), self._settings)
            for path, source, own in zip(paths, merged, by_shard, strict=True)
        ]
        self._run_stage("flag", flag_scores, flags)
        return paths

    def _write(self, decided: Sequence[Path], *, write: bool) -> Report:
        settings = self._settings
        if write:
            self._accept(self._report(decided, {}, is_written=False))
        kept = [
            (shard, str(path), int(read_notes(path)["kept_samples"]))
            for shard, path in zip(self._shards, decided, strict=True)
        ]
        planned = plan_shards(kept if write else [], samples_per_shard=settings.samples_per_shard)
        folder = self._folder.stage("write", self._folder.fingerprint)
        tasks = [
            WriteTask(str(folder / f"{name.replace('/', '-')}.json"), str(self._folder.path / name), parts)
            for name, parts in planned
        ]
        self._folder.keep_only([name for name, _ in planned], [Path(task.output) for task in tasks])
        self._run_stage("write", write_shard, tasks)
        with self._timed("report", 1, 0):
            for path in decided:
                self._folder.publish(path)
            written = {
                name: json.loads(Path(task.output).read_text()) for (name, _), task in zip(planned, tasks, strict=True)
            }
            return self._report(decided, written, is_written=write)

    def _report(self, decided: Sequence[Path], written: Mapping[str, Mapping[str, int]], *, is_written: bool) -> Report:
        found = self._folder.fingerprint
        return build_report(self._shards, decided, written, self._identity, found, is_written=is_written)

    def _run_stage(
        self,
        stage: str,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        *,
        consumer: Callable[[Any], Callable[[Any], None]] | None = None,
        consumer_settings: Any = None,
    ) -> None:
        """Run the tasks whose output is not there yet."""
        present = _present({Path(task.output).parent for task in tasks})
        pending = [task for task in tasks if task.output not in present]
        done = len(tasks) - len(pending)
        with self._timed(stage, len(tasks), done) as note_peak:
            self._progress(stage, done, len(tasks))
            results = (
                self._executor.run(function, pending)
                if consumer is None
                else self._executor.run_model(function, consumer, consumer_settings, pending)
            )
            for peak in results:
                note_peak(peak)
                done += 1
                self._progress(stage, done, len(tasks))

    @contextlib.contextmanager
    def _timed(self, stage: str, tasks: int, done_before: int) -> Iterator[Callable[[int], None]]:
        peaks = [peak_memory()]
        started = time.perf_counter()
        yield peaks.append
        self.stats.append(StageStats(stage, tasks, done_before, time.perf_counter() - started, max(peaks)))


def make_chunks(paths: Sequence[Path], rows: Sequence[int], most: int) -> list[Chunk]:
    """Cut the shards into runs of at most so many rows; a larger shard is a chunk of its own."""
    starts, held = [0], 0
    for number, count in enumerate(rows):
        if held and held + count > most:
            starts.append(number)
            held = 0
        held += count
    edges = [*starts, len(paths)]
    return [
        Chunk(place, low, tuple(str(path) for path in paths[low:high]))
        for place, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def _present(folders: set[Path]) -> set[str]:
    """Files of folders; one listing is quicker than a question for each."""
    return {entry.path for folder in folders if folder.is_dir() for entry in os.scandir(folder)}


def _describe_files(places: Sequence[str]) -> list[Any]:
    """Names with sizes and times, so that a changed file is another one."""
    described: list[Any] = []
    for place in places:
        path = Path(place).expanduser()
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file()]
        described.append([place, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]])
    return described
