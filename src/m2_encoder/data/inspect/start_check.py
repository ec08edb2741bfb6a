"""Checks of each source at the start of training: `m2-data check` on a small part of it, with the run's settings.

A run that could learn nothing, or that would end for its unusable samples, is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m2_encoder.bounds import Count, check_fields
from m2_encoder.data.images.limits import ImageLimits
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import SourceReport, check_source
from m2_encoder.data.inspect.survey import Survey, survey_source
from m2_encoder.data.order.manifest import Manifest, Source
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.worker_pool import STALL_TIMEOUT_S, map_watched
from m2_encoder.pictures import STANDARD, PicturePolicy
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.types import LANGUAGES

_DECODED_SHARE = 8  # of 8 samples that are read, one image is decoded, which takes most of the time
_SIGMAS = 3.0  # by which a share must exceed its limit: a part of a source tells it with an error
_LEAST_READ = 50  # samples, below which a share says nothing about the source


@dataclasses.dataclass(frozen=True)
class StartCheck:
    """How much of each source is looked at.

    Attributes:
        shards: of each source, evenly spread; of a remote one a single shard, because it has to be downloaded.
        samples: of each source, evenly spread over those shards.
    """

    shards: Count = 4
    samples: Count = 2000

    def __post_init__(self) -> None:
        check_fields(self)


class TrainingNeeds(NamedTuple):
    """What a run requires of its sources."""

    global_batch_size: int  # rows of a step over all ranks
    languages: tuple[str, ...]  # those with a weight; a sample needs a caption in one of them
    limits: ImageLimits  # images outside are not used
    max_bad_share: float  # of unusable samples, above which the run ends
    tokenizer: Any = None  # of the model; tokens are counted by a SentencePiece one
    pictures: PicturePolicy = STANDARD  # what the pixels of its images are
    held_out: Mapping[str, frozenset[int]] = {}  # by validation set, hashes of images that no source should have


def check_manifest(
    manifest: Manifest,
    check: StartCheck,
    needs: TrainingNeeds,
    *,
    remote: RemoteShards | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> dict[str, SourceReport]:
    """Look at a part of each source that the mixture uses, and judge it for this run.

    After `stall_timeout_s` a source on local disks counts as stuck.

    Returns:
        By name of the source; problems say why the run is pointless, warnings what to know. The false negatives are
        those among the rows that a source has in a batch.

    Raises:
        UserError: for a source that is stuck, with its name.
    """
    total = sum(manifest.weights)
    reports: dict[str, SourceReport] = {}
    bad_share, variance = 0.0, 0.0
    for source, weight in zip(manifest.sources, manifest.weights, strict=True):
        if not weight:
            continue
        share = weight / total
        (survey,) = map_watched(
            lambda each: _survey(each, check, needs, remote),
            [source],
            threads=1,
            timeout_s=stall_timeout_s,
            describe=_describe_local,
        )
        rows = max(2, round(share * needs.global_batch_size))
        report = check_source(survey, batch_size=rows, num_frequent=1, languages=source.spec.languages)
        report = _judge_languages(report, survey, needs.languages)
        report = _with(report, warnings=list(_find_held_out(survey, needs.held_out)))
        reports[source.name] = report
        if not report.problems and report.inspected >= _LEAST_READ:
            # Of the samples that the plan knows: what headers exclude is never drawn.
            unusable = 1 - survey.usable_of_indexed() * _share_in(survey, needs.languages)
            bad_share += share * unusable
            variance += share**2 * unusable * (1 - unusable) / _evidence(survey)
    if reports and bad_share - _SIGMAS * math.sqrt(variance) > needs.max_bad_share:
        worst = min(reports, key=lambda name: reports[name].usable_share)
        reasons = ", ".join(f"{reason} {count}" for reason, count in reports[worst].faults.items())
        problem = (
            f"about {bad_share:.1%} of the samples that the run would draw cannot be used, more than "
            f"data.max_bad_share={needs.max_bad_share:g} ({reasons}): mend the shards, or allow more"
        )
        reports[worst] = _with(reports[worst], problems=[problem])
    return reports


def describe_problems(reports: Mapping[str, SourceReport]) -> list[str]:
    """One line for each reason not to train, with the source and the way out."""
    return [
        f"data.sources.{name}: {problem}; or train without it: ~data.sources.{name}"
        if len(reports) > 1
        else f"data.sources.{name}: {problem}"
        for name, report in reports.items()
        for problem in report.problems
    ]


def _describe_local(source: Source) -> str | None:
    if any(map(is_remote, source.shards)):
        return None  # downloads have time-outs of their own
    return f"the check of source {source.name}, which data.check=null leaves out"


def _survey(source: Source, check: StartCheck, needs: TrainingNeeds, remote: RemoteShards | None) -> Survey:
    count = 1 if any(map(is_remote, source.shards)) else min(check.shards, len(source.shards))
    languages = source.spec.languages
    per_shard = max(1, check.samples // count)
    options = InspectionOptions(
        samples_per_shard=per_shard,
        num_decoded=max(1, per_shard // _DECODED_SHARE),
        limits=needs.limits,
        tokenizer=needs.tokenizer if isinstance(needs.tokenizer, SentencePieceTokenizer) else None,
        pictures=needs.pictures,
        language=languages[0] if len(languages) == 1 else None,
    )
    return survey_source(source.shards, options, max_shards=count, workers=0, remote=remote)


def _judge_languages(report: SourceReport, survey: Survey, languages: Sequence[str]) -> SourceReport:
    if not report.usable:
        return report
    wanted = f"{' or '.join(languages)}, the languages with a weight in data.captions.language_weights"
    missing = 1 - _share_in(survey, languages)
    found = ", ".join(report.languages)
    if missing == 1:
        return _with(report, problems=[f"no caption in {wanted}; its captions are in {found}: give {found} a weight"])
    if missing:
        return _with(report, warnings=[f"{missing:.1%} of the samples have no caption in {wanted}, and are replaced"])
    return report


def _find_held_out(survey: Survey, held_out: Mapping[str, frozenset[int]]) -> Iterator[str]:
    seen = set(survey.rows["image"].tolist())
    for name, images in held_out.items():
        if shared := len(images & seen):
            yield (
                f"{shared:,} of the {len(images):,} pictures of data.validation.{name} are also here: its numbers say "
                "little about new pictures; m2-data split keeps both apart"
            )


def _share_in(survey: Survey, languages: Sequence[str]) -> float:
    """Share of the usable samples with a caption in one of these languages."""
    numbers = [LANGUAGES.index(language) for language in languages]
    rows = survey.captions["row"][np.isin(survey.captions["language"], numbers)]
    return len(np.unique(rows)) / max(1, len(survey.rows))


def _evidence(survey: Survey) -> int:
    """Samples that the share of unusable ones rests on: where images are damaged, those that were decoded."""
    name = "decoded" if any(item.damaged for item in survey.shards) else "inspected"
    return max(1, sum(getattr(item, name) for item in survey.shards))


def _with(report: SourceReport, *, problems: Sequence[str] = (), warnings: Sequence[str] = ()) -> SourceReport:
    return report._replace(problems=(*report.problems, *problems), warnings=(*report.warnings, *warnings))


def to_plain(reports: Mapping[str, SourceReport]) -> dict[str, Any]:
    """Plain containers, for JSON."""
    return {name: report.to_dict() for name, report in reports.items()}
