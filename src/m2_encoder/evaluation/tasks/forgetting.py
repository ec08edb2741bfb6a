"""What training from given weights gained and forgot: numbers before and after it, and on the line between both.

Reference: WiSE-FT (arXiv:2109.01903), weights between a start and what was fine-tuned from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Final, TypeAlias, cast

import torch

from m2_encoder.bounds import Fraction, Rule, check_bounds
from m2_encoder.checkpoints.mixing import mix_models
from m2_encoder.evaluation.encode import FeatureModel
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.measures.retrieval import measure_retrieval
from m2_encoder.evaluation.records import Record
from m2_encoder.evaluation.report.page import number
from m2_encoder.evaluation.retrieval import SetFeatures, encode_set
from m2_encoder.evaluation.tables import CellTable, cells_to_markdown
from m2_encoder.evaluation.tasks.base import EvaluationContext, TaskResult
from m2_encoder.evaluation.tasks.suite import Measures, Sets, Suite
from m2_encoder.models.m2_encoder import M2Encoder

BEFORE: Final = "before"
AFTER: Final = "after"

_MAIN: Final = ("mean_recall", "top1", "map")
"""The number of each task that the table shows."""


def _are_shares(shares: Sequence[float]) -> bool:
    return [*shares] == sorted(set(shares)) and {0, 1} <= set(shares)


Shares: TypeAlias = Annotated[
    Sequence[Fraction], Rule(_are_shares, "numbers from 0 to 1 in ascending order, both ends included", "[0, 0.5, 1]")
]


class Forgetting(Suite):
    """Measures the model that a run started from, what came out, and weights in between.

    The sets of the suite stand for what the model knew before; the validation sets of the run for what it was to learn.
    It applies to runs with `model.weights`. Where training gave the model other parameters, there is no line between.

    Args:
        sets: as in `Suite`.
        shares: of the trained weights, in ascending order, with 0 and 1.
        measures: as in `Suite`.
        languages: as in `Suite`.
        templates: as in `Suite`.
    """

    @check_bounds
    def __init__(
        self,
        *,
        sets: Sets,
        shares: Shares = (0.0, 0.25, 0.5, 0.75, 1.0),
        measures: Measures = ("retrieval", "zero_shot"),
        languages: Sequence[str] | None = None,
        templates: Sequence[Any] = ("general",),
    ) -> None:
        super().__init__(sets=sets, measures=measures, languages=languages, templates=templates)
        self._shares = tuple(float(share) for share in shares)

    def applies(self, context: EvaluationContext) -> bool:
        """Whether there is a start to compare with."""
        return isinstance(context.model, M2Encoder) and context.start is not None

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Records of every share, and a table of their main numbers."""
        assert context.start is not None
        start = context.start()
        has_line = _shapes(start) == _shapes(context.encoder)
        shares = self._shares if has_line else (0.0, 1.0)
        records = [each for share in shares for each in self._measure_share(context, start, share)]
        line = "a percentage: so much of the trained weights, the rest of those before (WiSE-FT)"
        notes = [line] if len(shares) > 2 else []
        if not has_line:
            notes.append("training gave the model other parameters: there is no line between before and after")
        table, changes = _table(records, [_label(share) for share in shares], {each.name for each in _own(context)})
        table = table._replace(notes=(*table.notes, *notes))
        return TaskResult(changes, rows=[table], markdown=cells_to_markdown(table), records=records)

    def _measure_share(self, context: EvaluationContext, start: M2Encoder, share: float) -> list[Record]:
        model = {0.0: start, 1.0: context.encoder}.get(share)
        if model is None:
            with torch.random.fork_rng(devices=[]):
                model = mix_models([start, context.encoder], [1 - share, share])
        assert context.files is not None
        files, label = context.files, _label(share)
        evaluated = dataclasses.replace(files.model, name=label, model=cast("FeatureModel", model))
        with FeatureEncoder(evaluated, batch_size=files.batch_size, num_workers=files.num_workers) as encoder:
            own = dataclasses.replace(context, model=model, files=encoder)
            known = [name for name, each in self.sets.items() if each.name not in {one.name for one in _own(context)}]
            return [*_measure_own(own, label), *self.measure_sets(own, known).records]


def _own(context: EvaluationContext) -> list[Any]:
    return list(context.sets.values())


def _label(share: float) -> str:
    return {0.0: BEFORE, 1.0: AFTER}.get(share, f"{number(100 * share, 0)} %")


def _shapes(model: M2Encoder) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _measure_own(context: EvaluationContext, label: str) -> list[Record]:
    """Recalls of the run's own sets, with intervals."""
    records = []
    for dataset in context.sets.values():
        features = encode_set(context.feature_model, dataset, context.tokenizer, batch_size=context.batch_size)
        for language, texts in features.texts.items():
            found = measure_retrieval(features.image_features, texts.features, _pairs(features, language))
            for each in found.measurements:
                about: dict[str, Any] = {"task": "retrieval", "language": language, "protocol": "standard"}
                records.append(Record(model=label, dataset=dataset.name, **about, **each._asdict()))
    return records


def _pairs(features: SetFeatures, language: str) -> torch.Tensor:
    """Rows of a text and of a picture of the same key, (P, 2)."""
    return (features.texts[language].ids[:, None] == features.image_ids[None, :]).nonzero()


def _table(records: Sequence[Record], labels: Sequence[str], own: set[str]) -> tuple[CellTable, dict[str, float]]:
    """The main numbers, a column for each share, and how much each changed, by its name for loggers."""
    groups: dict[tuple[str, ...], dict[str, Record]] = {}
    for each in records:
        if each.metric in _MAIN:
            place = f"{each.dataset} · {each.subset}" if each.subset else each.dataset
            groups.setdefault((place, each.language, each.metric, each.templates), {})[each.model] = each
    rows, changes = [], {}
    for (place, language, metric, templates), found in groups.items():
        before, after = found[BEFORE], found[AFTER]
        change = after.value - before.value
        name = "/".join(filter(None, ("forgetting", f"{place.replace(' · ', '_')}_{language}", templates, metric)))
        changes[name] = change
        said = f"{change:+.1f}"
        rows.append(
            [
                f"{place} (yours)" if before.dataset in own else place,
                language,
                "zero-shot top1" if metric == "top1" else metric.replace("_", " "),
                *(number(found[label].value) for label in labels),
                f"({said})" if _overlap(before, after) else said,
                f"{_interval(before)} → {_interval(after)}",
            ]
        )
    headings = ["set", "language", "percent", *labels, "change", "95 % before → after"]
    note = "a change in parentheses: the intervals overlap, chance may have made it"
    return CellTable("Gained and forgotten", headings, rows, 3, (note,)), changes


def _overlap(first: Record, second: Record) -> bool:
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return False
    return first.low <= second.high and second.low <= first.high


def _interval(record: Record) -> str:
    return "–" if record.low is None else f"{number(record.low)}–{number(record.high)}"
