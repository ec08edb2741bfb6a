"""A suite: sets that are read from disk, and what is measured on them, for any model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from m2_encoder.bounds import Rule, Text, check_bounds
from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings, write_emoji_shards
from m2_encoder.errors import UserError, name_some, under
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
from m2_encoder.evaluation.tasks.suite_measures import (
    EACH,
    MEASURES,
    PICTURES_ALONE,
    Found,
    Part,
    Wishes,
    has_something,
)

_EMOJI: Final = "emoji"

_PROTOCOLS: Final = (STANDARD, M2_RELEASE)
_DIRECTIONS: Final = ("t2i", "i2t")


def _list_of(names: Collection[str]) -> Rule:
    def holds(given: Sequence[Any]) -> bool:
        return bool(given) and all(isinstance(each, str) and each in names for each in given)

    return Rule(holds, f"a list of {', '.join(names)}", f"[{next(iter(names))}]")


def _are_settings(sets: Mapping[str, Any]) -> bool:
    return bool(sets) and all(each is None or isinstance(each, Mapping) for each in sets.values())


Sets = Annotated[
    Mapping[str, Any], Rule(_are_settings, "settings of sets by name, at least one", "{mine: {path: my_pictures}}")
]
Measures = Annotated[Sequence[str], _list_of(MEASURES)]
Protocols = Annotated[Sequence[str], _list_of(_PROTOCOLS)]
Directions = Annotated[Sequence[str], _list_of(_DIRECTIONS)]


class Suite(EvaluationTask):
    """Measures models on sets that are read from disk; features of a set are encoded once for all measures.

    Args:
        sets: by name, each with `path` (by default the name, in `root`), `layout`, and settings of that layout's
            reader in `evaluation.sets`, None as if not given; `train` is another path, or settings, of pictures that
            probes learn from.
        only: names of the sets that are measured; None for all.
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
        sets: Sets,
        only: Sequence[str] | None = None,
        root: Text = "outputs/benchmarks",
        measures: Measures = tuple(MEASURES),
        protocols: Protocols = (STANDARD,),
        languages: Sequence[str] | None = None,
        templates: Sequence[Any] = ("general",),
        directions: Directions = _DIRECTIONS,
    ) -> None:
        self._settings, self._root, self._measures = dict(sets), root, tuple(measures)
        self._only = None if only is None else tuple(only)
        self._wishes = Wishes(tuple(protocols), None if languages is None else tuple(languages), tuple(directions))
        self._templates = tuple(templates)
        self._sets: dict[str, EvaluationSet] = {}
        self._train: dict[str, EvaluationSet] = {}
        self._absent: list[str] = []

    @property
    def absent_languages(self) -> Sequence[str]:
        """Languages that were asked for, and that no set has."""
        return self._absent

    @property
    def sets(self) -> Mapping[str, EvaluationSet]:
        """What was read, by name; nothing before `prepare`."""
        return self._sets

    def prepare(self, find: Callable[[str], Path] = Path) -> None:
        """Reads what is in the sets, but no picture; `find` gives the place of a path.

        Raises:
            UserError: for sets that are not there, all of them by name, or the first that is not as its layout wants.
        """
        if self._only is not None:
            if unknown := [name for name in self._only if name not in self._settings]:
                raise UserError(f"no such set; there are {', '.join(self._settings)}", key="only", value=unknown[0])
            self._settings = {name: self._settings[name] for name in self._only}
        missing = {name: paths for name, paths in self._missing(find).items() if paths}
        if missing:
            there = [name for name in self._settings if name not in missing]
            fix = f"measure what is there by only=[{','.join(there)}]" if there else "leave this suite out"
            said = name_some([path for paths in missing.values() for path in paths])
            raise UserError(
                f"no such folder or file: {said}; put them there, set root or sets.NAME.path, or {fix}", key="sets"
            )
        self._check_templates()
        for name, settings in self._settings.items():
            self._read(name, settings or {}, find)
        self._check_languages()
        both = [(each, self._train.get(name)) for name, each in self._sets.items()]
        if not any(has_something(measure, *each) for measure in self._measures for each in both):
            rule = f"nothing to measure: {', '.join(self._sets)} has nothing for {', '.join(self._measures)}"
            raise UserError(rule, key="sets")

    def _check_templates(self) -> None:
        for template in self._templates:
            for language, source in template.items() if isinstance(template, Mapping) else [("zh", template)]:
                _check_template(str(source), language)

    def _read(self, name: str, settings: Mapping[str, Any], find: Callable[[str], Path]) -> None:
        own = {key: value for key, value in settings.items() if key not in ("train", "path") and value is not None}
        own.setdefault("name", name)
        with under(f"sets.{name}"):
            self._sets[name] = read_set(self._place(name, find), **own)
            if (train := settings.get("train")) is not None:
                more = train if isinstance(train, Mapping) else {"path": train}
                other = {key: value for key, value in more.items() if key != "path"}
                place = find(str(more["path"])) if "path" in more else self._place(name, find)
                self._train[name] = read_set(place, **{**own, "name": f"{own['name']} train", **other})

    def _check_languages(self) -> None:
        """Refuses languages of which no set has one."""
        there: dict[str, None] = {}
        for each in self._sets.values():
            there |= dict.fromkeys([*each.texts, *(each.classes.names if each.classes else ())])
        wanted = self._wishes.languages
        self._absent = [each for each in wanted or () if each not in there]
        if wanted and there and len(self._absent) == len(wanted):
            rule = f"none of these is in its sets; there are {name_some(list(there), 20)}"
            raise UserError(rule, key="languages", value=f"[{', '.join(wanted)}]")

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Records of all sets."""
        return self.measure_sets(context)

    def measure_sets(self, context: EvaluationContext, names: Sequence[str] | None = None) -> TaskResult:
        """Records of some of its sets, by the names in `sets`; None for all.

        Raises:
            UserError: for a model that cannot encode files, and sets that cannot be used.
        """
        encoder = context.files
        if encoder is None:
            raise UserError("this model cannot encode files of pictures; leave the suite out")
        if not self._sets:
            self.prepare()
        records: list[Record] = []
        galleries: list[Gallery] = []
        left_out: dict[str, list[str]] = {}
        for name, dataset in self._sets.items():
            if names is not None and name not in names:
                continue
            started = time.monotonic()
            wanted = self._languages_of(dataset)
            encoded = encoder.encode_set(dataset, languages=wanted)
            train = encoder.encode_set(self._train[name], languages=()) if name in self._train else None
            for called, part in ((name, encoded), (f"{name} train", train)):
                if part is not None and part.left_out:
                    left_out[called] = [f"{each.name}: {each.reason}" for each in part.left_out]
            parts = list(self._parts(name, encoded, train, context))
            found = [each for part in parts for each in self._measure_part(part)]
            seconds = round(time.monotonic() - started, 3)
            for each in found:
                records += self._records(each, encoded, context, seconds)
                galleries += [each.gallery] if each.gallery is not None else []
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

    def _measure_part(self, part: Part) -> Iterator[Found]:
        for measure in self._measures:
            yield from MEASURES[measure](part)

    def _languages_of(self, dataset: EvaluationSet) -> list[str]:
        """Of the texts that are encoded; none if all that is asked needs pictures alone."""
        if set(self._measures) <= PICTURES_ALONE:
            return []
        return [key for key in dataset.texts if self._wishes.languages is None or key in self._wishes.languages]

    def _missing(self, find: Callable[[str], Path]) -> dict[str, list[str]]:
        """By set, the places where nothing is."""
        missing = {}
        for name, settings in self._settings.items():
            train = (settings or {}).get("train")
            places = [self._place(name, find), *([find(train)] if isinstance(train, str) else [])]
            missing[name] = [str(place) for place in places if not place.exists()]
        return missing

    def _place(self, name: str, find: Callable[[str], Path]) -> Path:
        settings = self._settings[name] or {}
        if (path := settings.get("path")) is not None:
            return find(str(path))
        if settings.get("layout") == _EMOJI:
            style = {"heldout_style": settings["heldout_style"]} if settings.get("heldout_style") else {}
            return write_emoji_shards(find(str(default_emoji_folder(emoji_settings(**style)))), **style)
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
        is_seen = dataset.style and model.heldout_style not in ("", dataset.style)
        seen = f"{model.name} was trained on drawings of {dataset.style}" if is_seen else ""
        for each in found.measurements:
            published = None
            if found.as_published and not (found.subset or found.remark or dataset.comparable):
                where = (model.name, dataset.name, found.language, each.metric)
                published = find_published(*where, protocol=found.protocol)
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
                remark="; ".join(filter(None, (dataset.comparable, found.remark, seen))),
                left_out=len(encoded.left_out),
                seconds=seconds,
                preprocessing=model.facts.preprocessing,
                checkpoint=model.fingerprint,
            )


def _check_template(source: str, language: str) -> None:
    try:
        load_templates(source.removesuffix(EACH), language)
    except UserError as error:
        raise UserError(error.text, key="templates", value=source) from error


def _numbers(found: Measurement) -> dict[str, Any]:
    return dict(found._asdict())


def _name_of(record: Record) -> str:
    """The name of a number for loggers, such as `eval/tuxpaint_zh/mean_recall`."""
    place = "_".join(filter(None, (record.dataset, record.subset, record.language)))
    more = "/".join(filter(None, (record.protocol if record.protocol != STANDARD else "", record.templates)))
    return "/".join(filter(None, ("eval", place, more, record.metric)))
