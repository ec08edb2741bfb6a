"""Whether a source can be trained on: findings of `m2-data check` and of the check at the start of training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.inspect.duplicates import FalseNegatives, class_sizes, expect_false_negatives
from m2_encoder.data.inspect.inspection import Fault, ShardInspection, find_captions
from m2_encoder.data.inspect.picture_advice import advise_pictures
from m2_encoder.data.inspect.survey import Survey
from m2_encoder.data.inspect.token_report import TokenReport, summarize_tokens
from m2_encoder.data.samples.language import describe_languages
from m2_encoder.data.shards.index import IMAGE_EXTENSIONS
from m2_encoder.errors import abridge, name_some
from m2_encoder.types import LANGUAGES

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
"""Of lengths and sizes, in reports."""

_MAX_NAMES, _MAX_SHOWN = 8, 120  # in a message: names, and characters of a place
_MAX_EXAMPLES = 5  # faults of one reason that a report names
_MANY_FAULTS = 0.01  # share of unusable samples that is worth a warning
_SIGMAS = 3.0  # by which a share in a part of a source must exceed its limit
_ROUNDING = 1e-9  # 4 of 80 are not more than 5 %
_LEAST_READ = 50  # samples, below which a share says nothing
_MANY_FALSE_NEGATIVES = 0.05  # share of rows
_MANY_DOUBTS = 0.1  # share of captions; English ones name a café or a Pokémon now and then


class CaptionSummary(NamedTuple):
    """Captions of one language."""

    captions: int  # how many were inspected
    samples: int  # usable inspected samples that have one
    characters: tuple[float, ...]  # `QUANTILES` of their lengths
    words: tuple[float, ...] | None  # the same in words; None if they were not counted
    tokens: tuple[float, ...] | None  # the same in tokens; None if they were not counted


class Repetition(NamedTuple):
    """How often the same caption or image occurs."""

    total: int  # things inspected
    distinct: int  # different ones
    most: int  # how often the most frequent one comes

    @property
    def share(self) -> float:
        """Share of things that came before."""
        return 1 - self.distinct / self.total if self.total else 0.0


class SourceReport(NamedTuple):
    """What is in a source.

    Attributes:
        batch_size: that was asked about, over all ranks; `false_negatives` has the possible one.
        shards: of the source.
        inspected_shards: those that were looked at.
        num_bytes: of all shards.
        samples: usable ones in the source; an estimate unless `is_whole`.
        inspected: samples that were read.
        usable: those of them that can be trained on.
        usable_share: of the source's samples, those that can be trained on; an estimate unless `is_whole`.
        is_whole: whether everything was read.
        faults: by reason, of samples and of shards that were inspected.
        examples: some faults, of each reason the first few.
        extensions: members of the inspected shards by extension.
        json_keys: inspected samples by key of their JSON.
        formats: usable images by kind.
        decoded: images that were decoded.
        effects: usable decoded ones by what the policy of pictures does to them, of `rgb.EFFECTS`.
        languages: captions by language, those that occur.
        tokens: what the tokenizer makes of the captions; None if it was not asked.
        left_out: captions that are neither Chinese nor English, by language.
        width: `QUANTILES` of widths, pixels.
        height: `QUANTILES` of heights, pixels.
        captions: repetition of exact texts.
        images: repetition of exact files.
        frequent_captions: texts that come more than once, with their number, the most frequent first.
        false_negatives: expected in a batch.
        problems: why training on it would be pointless; each with its fix.
        warnings: what is worth knowing before training.
    """

    batch_size: int
    shards: int
    inspected_shards: int
    num_bytes: int
    samples: int
    inspected: int
    usable: int
    usable_share: float
    is_whole: bool
    faults: dict[str, int]
    examples: tuple[Fault, ...]
    extensions: dict[str, int]
    json_keys: dict[str, int]
    formats: dict[str, int]
    decoded: int
    effects: dict[str, int]
    languages: dict[str, CaptionSummary]
    tokens: TokenReport | None
    left_out: dict[str, int]
    width: tuple[float, ...]
    height: tuple[float, ...]
    captions: Repetition
    images: Repetition
    frequent_captions: tuple[tuple[str, int], ...]
    false_negatives: FalseNegatives
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        named = {name: value._asdict() for name, value in self.languages.items()}
        nested = {name: getattr(self, name)._asdict() for name in ("captions", "images", "false_negatives")}
        examples = [fault._asdict() for fault in self.examples]
        return (
            self._asdict()
            | nested
            | {
                "languages": named,
                "tokens": None if self.tokens is None else self.tokens.to_dict(),
                "examples": examples,
                "quantiles": QUANTILES,
            }
        )


def check_source(
    survey: Survey, *, batch_size: int, num_frequent: int = 10, languages: Sequence[str] = LANGUAGES
) -> SourceReport:
    """Sum up a survey, with problems and warnings.

    `batch_size` counts rows contrasted with each other, over all ranks; `languages` are those that captions should
    have.
    """
    inspected = sum(item.inspected for item in survey.shards)
    share, samples = _estimate(survey)
    rows, captions = survey.rows, survey.captions
    report = SourceReport(
        batch_size=batch_size,
        shards=survey.num_shards,
        inspected_shards=len(survey.shards),
        num_bytes=survey.num_bytes,
        samples=samples,
        inspected=inspected,
        usable=len(rows),
        usable_share=share,
        is_whole=survey.is_whole,
        faults=_merge(
            c for item in survey.shards for c in (item.header_faults, item.content_faults, item.shard_faults)
        ),
        examples=_examples(survey.shards),
        extensions=_merge(item.extensions for item in survey.shards),
        json_keys=_merge(item.json_keys for item in survey.shards),
        formats=_merge(item.formats for item in survey.shards),
        decoded=sum(item.decoded for item in survey.shards),
        effects=_merge(item.effects for item in survey.shards),
        languages=_summarize_languages(captions),
        tokens=summarize_tokens(captions, survey.options.tokenizer),
        left_out=_merge(item.left_out for item in survey.shards),
        width=_quantiles(rows["width"]),
        height=_quantiles(rows["height"]),
        captions=_repetition(captions["text"]),
        images=_repetition(rows["image"]),
        frequent_captions=_frequent(survey, num_frequent),
        false_negatives=expect_false_negatives(
            row_of_caption=captions["row"],
            captions=captions["text"],
            images=rows["image"],
            identities=rows["identity"],
            batch_size=max(1, min(batch_size, samples)),
            is_whole=survey.is_whole,
        ),
        problems=(),
        warnings=(),
    )
    return report._replace(
        problems=(*_problems(report), *_one_identity(survey)),
        warnings=(*_warnings(report, languages), *_doubted(survey), *_dotted(survey), *advise_pictures(survey)),
    )


def judge_for_training(report: SourceReport, survey: Survey, *, max_bad_share: float) -> SourceReport:
    """Add what m2-train would refuse: shards that are missing, or too many samples that cannot be used.

    Too many is more than `max_bad_share`, by more than chance explains where only a part was read.
    """
    problems = list(report.problems)
    is_gone = {item.path for item in survey.shards if item.shard_faults["shard_missing"]}
    gone = list(dict.fromkeys([*survey.missing, *sorted(is_gone)]))
    if gone and report.usable:
        names = ", ".join(gone[:_MAX_EXAMPLES]) + (" and others" if len(gone) > _MAX_EXAMPLES else "")
        problems.append(
            f"{len(gone):,} of {report.shards:,} shards are not there or cannot be read ({names}): bring them back, or "
            "leave them out; training refuses such a source"
        )
    bad = 1 - survey.usable_of_indexed()
    has_damage = any(item.damaged for item in survey.shards)
    read = sum(item.decoded if has_damage else item.inspected for item in survey.shards)
    beyond_chance = 0.0 if survey.is_whole else _SIGMAS * math.sqrt(bad * (1 - bad) / max(1, read))
    if report.usable and report.inspected >= _LEAST_READ and bad - beyond_chance > max_bad_share + _ROUNDING:
        problems.append(
            f"{bad:.1%} of the samples that would be drawn cannot be used, more than max_bad_share={max_bad_share:g}, "
            "at which training ends: mend the shards, or allow more"
        )
    return report._replace(problems=tuple(problems))


def _problems(report: SourceReport) -> list[str]:
    if report.inspected_shards == 0:
        return ["it has no shards"]
    first = f", such as {_show_fault(report.examples[0])}" if report.examples else ""
    if report.usable == 0:
        members = name_some(report.extensions, _MAX_NAMES, 40) or "none"
        keys = f"; keys of its JSON: {name_some(report.json_keys, _MAX_NAMES, 40)}" if report.json_keys else ""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.faults.items()) or "it is empty"
        if set(report.faults) and set(report.faults) <= _UNREACHED:
            return [f"no usable sample ({reasons}{first}): bring the shards back, or correct their names or address"]
        wanted = f"one of {', '.join('.' + name for name in IMAGE_EXTENSIONS)} with a .json or .txt of the same name"
        return [
            f"no usable sample ({reasons}{first}): members seen: {members}{keys}; a sample is {wanted}: "
            "pack the source again with m2-data pack"
        ]
    if report.samples < 2:
        return ["one usable sample: nothing to tell apart; give more shards"]
    found = []
    if report.captions.distinct == 1:
        text = f" ({abridge(report.frequent_captions[0][0], 60)!r})" if report.frequent_captions else ""
        found.append(
            f"all captions are the same{text}: nothing to learn from; check which column was packed as caption"
        )
    if report.images.distinct == 1:
        found.append(
            "all images are the same file: nothing to learn from; check what was packed, or downloaded, as image"
        )
    return found


def _warnings(report: SourceReport, languages: Sequence[str]) -> list[str]:
    found = []
    if report.usable_share < 1 - _MANY_FAULTS and report.usable:
        found.append(f"{1 - report.usable_share:.1%} of the samples cannot be used and will be replaced by others")
    shard_faults = {reason: report.faults[reason] for reason in _SHARD_REASONS if reason in report.faults}
    found += [f"{count:,} shard(s) {_SHARD_REASONS[reason]}" for reason, count in shard_faults.items()]
    expected = report.false_negatives
    if expected.share_of_rows > _MANY_FALSE_NEGATIVES:
        found.append(
            f"{expected.share_of_rows:.1%} of the rows of a batch of {expected.batch_size:,} have a false negative "
            f"({_advise(expected)})"
        )
    if report.is_whole and 0 < report.usable < report.batch_size:
        found.append(
            f"{report.usable:,} usable samples are fewer than a batch of {report.batch_size:,}: they repeat in it; "
            f"for example data.global_batch_size={2 ** (report.usable.bit_length() - 1)}"
        )
    found += [] if report.tokens is None else report.tokens.warnings()
    if report.left_out:
        found.append(f"left out: {describe_languages(report.left_out)}, which are neither Chinese nor English")
    if any(name not in report.languages for name in languages) and report.languages:
        found.append(
            f"all captions are in {', '.join(report.languages)}: the weight of the other language in "
            "data.captions.language_weights changes nothing"
        )
    return found


def _one_identity(survey: Survey) -> list[str]:
    if survey.is_whole and len(survey.rows) > 1 and len(np.unique(survey.rows["identity"])) == 1:
        return ["all samples have one identity, as pictures of one class do: nothing to tell apart; give more classes"]
    return []


def _doubted(survey: Survey) -> list[str]:
    english = np.count_nonzero(survey.captions["language"] == LANGUAGES.index("en"))
    return [
        f"{count:,} of {english:,} captions that count as English have {doubt}: where a caption is in another "
        "language, a column `language` that says so leaves it out"
        for doubt, count in _merge(item.doubts for item in survey.shards).items()
        if count > _MANY_DOUBTS * english
    ]


def _dotted(survey: Survey) -> list[str]:
    count = sum(item.dotted for item in survey.shards)
    if not count:
        return []
    return [
        f"{count:,} of the samples read have dots in their names and are named up to the last one; other readers of "
        "WebDataset tars name them up to the first, which makes one sample of many: rename the files"
    ]


def _advise(expected: FalseNegatives) -> str:
    """What causes false negatives, the main cause first, and what mends it."""
    causes = [
        (
            expected.from_captions,
            "equal captions: m2-data curate limits how often one comes with duplicates.captions=N, and an equal "
            "identity in the .json makes positives of what shows the same",
        ),
        (
            expected.from_images,
            "equal pictures: m2-data curate drops them with duplicates.images=drop, or gives them one identity with "
            "duplicates.images=mark",
        ),
    ]
    return "; ".join(text for number, text in sorted(causes, reverse=True) if number > 0)


_SHARD_REASONS = {
    "shard_missing": "are not there or cannot be read",
    "shard_changed": "changed while they were read",
    "not_a_tar": "are no tars",
    "truncated_shard": "are cut or damaged: what lies behind that place is lost",
    "remote_timeout": "did not come in time",
    "remote_incomplete": "did not come whole",
}


_UNREACHED = frozenset({"shard_missing", "remote_timeout", "remote_incomplete"})


def _estimate(survey: Survey) -> tuple[float, int]:
    """Share of samples that are usable, and how many that are in the whole source."""
    indexed = sum(item.indexed for item in survey.shards)
    known = indexed + sum(sum(item.header_faults.values()) for item in survey.shards)
    seen_bytes = sum(item.num_bytes for item in survey.shards)
    usable_of_indexed = survey.usable_of_indexed()
    share = indexed / known * usable_of_indexed if known else 0.0
    scale = survey.num_bytes / seen_bytes if seen_bytes else 0.0
    return share, len(survey.rows) if survey.is_whole else math.ceil(indexed * usable_of_indexed * scale)


def _merge(counters: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _examples(shards: Iterable[ShardInspection]) -> tuple[Fault, ...]:
    kept: Counter[str] = Counter()
    chosen = []
    for fault in (fault for shard in shards for fault in shard.examples):
        kept[fault.reason] += 1
        if kept[fault.reason] <= _MAX_EXAMPLES:
            chosen.append(fault)
    return tuple(chosen)


def _show_fault(fault: Fault) -> str:
    place = Path(fault.shard).name if fault.key is None else f"{Path(fault.shard).name}:{fault.key}"
    return f"{abridge(place, _MAX_SHOWN)}: {abridge(fault.detail, _MAX_SHOWN)}"


def _summarize_languages(captions: npt.NDArray[np.void]) -> dict[str, CaptionSummary]:
    found = {}
    for number, language in enumerate(LANGUAGES):
        own = captions[captions["language"] == number]
        if len(own):
            lengths = {name: _quantiles(own[name]) if own[name][0] >= 0 else None for name in ("words", "tokens")}
            samples = len(np.unique(own["row"]))
            found[language] = CaptionSummary(len(own), samples, _quantiles(own["characters"]), **lengths)
    return found


def _quantiles(values: npt.NDArray[Any]) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist()) if len(values) else ()


def _repetition(keys: npt.NDArray[np.uint64]) -> Repetition:
    sizes = class_sizes(keys)
    return Repetition(len(keys), len(sizes), int(sizes.max(initial=0)))


def _frequent(survey: Survey, limit: int) -> tuple[tuple[str, int], ...]:
    """The captions that repeat most; equally frequent ones in the order of their texts."""
    keys, first, counts = np.unique(survey.captions["text"], return_index=True, return_counts=True)
    order = np.lexsort((keys, -counts))[:limit]
    chosen = [int(place) for place in order if counts[place] > 1]
    ends = np.cumsum([len(item.rows) for item in survey.shards])
    by_shard: dict[int, list[int]] = {}
    for place in chosen:
        row = survey.captions["row"][first[place]]
        by_shard.setdefault(int(np.searchsorted(ends, row, side="right")), []).append(int(keys[place]))
    texts: dict[int, str] = {}
    for shard, wanted in by_shard.items():
        texts |= find_captions(survey.shards[shard].path, wanted, survey.options, remote=survey.remote)
    named = [(texts[int(keys[place])], int(counts[place])) for place in chosen if int(keys[place]) in texts]
    return tuple(sorted(named, key=lambda item: (-item[1], item[0])))
