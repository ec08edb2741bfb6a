"""A suite: sets that are read from disk, and what is measured on them, for any model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from m2_encoder.bounds import Rule, Text, check_bounds
from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings, write_emoji_shards
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.features import EncodedSet
from m2_encoder.evaluation.measures.protocols import M2_RELEASE, STANDARD
from m2_encoder.evaluation.measures.result import Measurement
from m2_encoder.evaluation.prompts import load_templates
from m2_encoder.evaluation.records import Record, find_published
from m2_encoder.evaluation.report.page import Gallery
from m2_encoder.evaluation.report.terminal import record_tables
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.reading import read_set
from m2_encoder.evaluation.tables import cells_to_markdown
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.evaluation.tasks.suite_measures import EACH, MEASURES, Found, Part, Wishes

_EMOJI: Final = "emoji"

Measures = Annotated[Sequence[str], Rule(bool, f"a list of {', '.join(MEASURES)}", "[retrieval]")]
Protocols = Annotated[Sequence[str], Rule(bool, f"a list of {STANDARD}, {M2_RELEASE}", f"[{STANDARD}]")]


class Suite(EvaluationTask):
    """Measures models on sets that are read from disk; features of a set are encoded once for all measures.

    Args:
        sets: by name, each with `path` (by default the name, in `root`), `layout`, and settings of that layout's
            reader in `evaluation.sets`; `train` is another path, or settings, of pictures that probes learn from.
        root: folder of sets without a path of their own.
        measures: names in `suite_measures.MEASURES`; one that a set has nothing for is left out there.
        protocols: of retrieval.
        languages: of texts and class names; None for all of a set.
        templates: families of `evaluation.prompts`, or files; files by language as a mapping; `general/each` for each
            template alone.
        directions: of retrieval, such as [t2i] where a benchmark has one.
    """

    @check_bounds
    def __init__(
        self,
        *,
        sets: Mapping[str, Any],
        root: Text = "outputs/benchmarks",
        measures: Measures = tuple(MEASURES),
        protocols: Protocols = (STANDARD,),
        languages: Sequence[str] | None = None,
        templates: Sequence[Any] = ("general",),
        directions: Sequence[str] = ("t2i", "i2t"),
    ) -> None:
        if unknown := [name for name in measures if name not in MEASURES]:
            raise UserError(f"{unknown[0]!r} is no measure; choose from {', '.join(MEASURES)}", key="measures")
        if unknown := [name for name in protocols if name not in (STANDARD, M2_RELEASE)]:
            raise UserError(f"{unknown[0]!r} is no protocol; choose {STANDARD} or {M2_RELEASE}", key="protocols")
        self._settings, self._root, self._measures = dict(sets), root, tuple(measures)
        self._wishes = Wishes(tuple(protocols), None if languages is None else tuple(languages), tuple(directions))
        self._templates = tuple(templates)
        self._sets: dict[str, EvaluationSet] = {}
        self._train: dict[str, EvaluationSet] = {}

    @property
    def sets(self) -> Mapping[str, EvaluationSet]:
        """What was read, by name; nothing before `prepare`."""
        return self._sets

    def prepare(self, find: Callable[[str], Path] = Path) -> None:
        """Reads what is in the sets, but no picture; `find` gives the place of a path.

        Raises:
            UserError: for sets that are not there, all of them by name, or the first that is not as its layout wants.
        """
        missing = [str(path) for path in self._places(find) if not path.exists()]
        if missing:
            fix = "put them there, give evaluation.SUITE.root or sets.NAME.path, or leave a set out with ~"
            raise UserError(f"no such folder or file: {name_some(missing)}; {fix}", key="sets")
        for template in self._templates:
            for language, source in template.items() if isinstance(template, Mapping) else [("zh", template)]:
                load_templates(str(source).removesuffix(EACH), language)
        for name, settings in self._settings.items():
            own = {key: value for key, value in (settings or {}).items() if key not in ("train", "path")}
            self._sets[name] = read_set(self._place(name, find), name=name, **own)
            if (train := (settings or {}).get("train")) is not None:
                more = train if isinstance(train, Mapping) else {"path": train}
                other = {key: value for key, value in more.items() if key != "path"}
                place = find(str(more["path"])) if "path" in more else self._place(name, find)
                self._train[name] = read_set(place, name=f"{name} train", **{**own, **other})

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Records of all sets."""
        encoder = context.files
        if encoder is None:
            raise UserError("this model cannot encode files of pictures; leave the suite out")
        if not self._sets:
            self.prepare()
        records: list[Record] = []
        galleries: list[Gallery] = []
        left_out: dict[str, list[str]] = {}
        for name, dataset in self._sets.items():
            started = time.monotonic()
            wanted = [key for key in dataset.texts if self._wishes.languages is None or key in self._wishes.languages]
            encoded = encoder.encode_set(dataset, languages=wanted)
            train = encoder.encode_set(self._train[name], languages=()) if name in self._train else None
            if encoded.left_out:
                left_out[name] = [f"{each.name}: {each.reason}" for each in encoded.left_out]
            parts = list(self._parts(name, encoded, train, context))
            found = [each for part in parts for measure in self._measures for each in MEASURES[measure](part)]
            seconds = round(time.monotonic() - started, 3)
            for each in found:
                records += self._records(each, encoded, context, seconds)
                galleries += [each.gallery] if each.gallery is not None else []
        if not records:
            raise UserError(f"nothing to measure: {', '.join(self._sets)} has nothing for {', '.join(self._measures)}")
        metrics = {_name_of(each): each.value for each in records}
        tables = record_tables(records)
        return TaskResult(
            metrics,
            rows=tables,
            markdown="\n\n".join(map(cells_to_markdown, tables)),
            records=records,
            galleries=galleries,
            left_out=left_out,
        )

    def _places(self, find: Callable[[str], Path]) -> Iterator[Path]:
        for name, settings in self._settings.items():
            yield self._place(name, find)
            train = (settings or {}).get("train")
            if isinstance(train, str):
                yield find(train)

    def _place(self, name: str, find: Callable[[str], Path]) -> Path:
        settings = self._settings[name] or {}
        if (path := settings.get("path")) is not None:
            return find(str(path))
        if settings.get("layout") == _EMOJI:
            return write_emoji_shards(find(str(default_emoji_folder(emoji_settings()))))
        return find(str(Path(self._root) / name))

    def _parts(
        self, name: str, encoded: EncodedSet, train: EncodedSet | None, context: EvaluationContext
    ) -> Iterator[Part]:
        assert context.files is not None
        whole = Part(context.files, encoded, self._wishes, self._templates, train, len(self._sets[name].pictures))
        yield whole
        for subset in encoded.dataset.subsets:
            yield from whole.of_subset(subset)

    def _records(
        self, found: Found, encoded: EncodedSet, context: EvaluationContext, seconds: float
    ) -> Iterator[Record]:
        assert context.files is not None
        model, dataset = context.files.model, encoded.dataset
        for each in found.measurements:
            said = find_published(model.name, dataset.name, found.language, each.metric) if not found.subset else None
            published = said if not found.remark and not dataset.comparable else None
            yield Record(
                model=model.name,
                dataset=dataset.name,
                **_numbers(each),
                task=found.task,
                language=found.language,
                protocol=found.protocol,
                subset=found.subset,
                label_set=found.label_set,
                templates=found.templates,
                published=None if published is None else published.value,
                source="" if published is None else published.source,
                remark="; ".join(filter(None, (dataset.comparable, found.remark))),
                left_out=len(encoded.left_out),
                seconds=seconds,
                preprocessing=model.facts.preprocessing,
                checkpoint=model.fingerprint,
            )


def _numbers(found: Measurement) -> dict[str, Any]:
    return dict(found._asdict())


def _name_of(record: Record) -> str:
    """The name of a number for loggers, such as `eval/tuxpaint_zh/mean_recall`."""
    place = "_".join(filter(None, (record.dataset, record.subset, record.language)))
    more = "/".join(filter(None, (record.protocol if record.protocol != STANDARD else "", record.templates)))
    return "/".join(filter(None, ("eval", place, more, record.metric)))
