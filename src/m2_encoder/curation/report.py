"""The report of a curation: kept and rejected pairs by source, language and reason, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.curation.decide import NO_LANGUAGE
from m2_encoder.curation.output_folder import REPORT
from m2_encoder.curation.sources import Shard
from m2_encoder.curation.tables import read_notes
from m2_encoder.data.samples.language import describe_languages
from m2_encoder.errors import abridge_list
from m2_encoder.files import write_text
from m2_encoder.types import LANGUAGES

KEPT = "kept"
REWRITE = "rewrite"
"""In counts beside the reasons: kept pairs, and those of them whose caption should be written anew."""


class Report(NamedTuple):
    """The report as plain containers; it does not depend on the executor.

    `content` has `fingerprint`, `written`, `settings`, `total` and `sources` {name: {samples, kept_samples, pairs,
    faults, shards, languages {language: {reason: pairs}}}}.
    """

    content: dict[str, Any]

    @property
    def total(self) -> dict[str, Any]:
        """Sums over all sources: `samples`, `kept_samples`, `pairs`, `kept_pairs`, `rewrite`, `reasons`."""
        total: dict[str, Any] = self.content["total"]
        return total


def build_report(
    shards: Sequence[Shard],
    decided: Sequence[Path],
    written: Mapping[str, Mapping[str, int]],
    identity: Mapping[str, Any],
    fingerprint: str,
    *,
    is_written: bool,
) -> Report:
    """Sum up the counts that the tables of decisions carry.

    `written` maps `<source>/<number>.tar` to its `samples`, `pairs` and `bytes`.
    """
    sources: dict[str, dict[str, Any]] = {}
    for shard, path in zip(shards, decided, strict=True):
        notes = read_notes(path)
        empty = {"samples": 0, "kept_samples": 0, "pairs": 0, "languages": {}, "faults": [], "shards": {}}
        source = sources.setdefault(shard.source, empty)
        source["samples"] += int(notes["samples"])
        source["kept_samples"] += int(notes["kept_samples"])
        source["pairs"] += int(notes["rows"])
        for language, words in json.loads(notes["counts"]).items():
            source["languages"].setdefault(language, Counter()).update(words)
        if notes["fault"]:
            source["faults"].append({"shard": shard.path, "reason": notes["fault"]})
    for name, counts in written.items():
        sources[name.partition("/")[0]]["shards"][name] = dict(counts)
    for source in sources.values():
        source["languages"] = {name: dict(sorted(words.items())) for name, words in sorted(source["languages"].items())}
    reasons = _sum(words for source in sources.values() for words in source["languages"].values())
    total: dict[str, Any] = {
        name: sum(source[name] for source in sources.values()) for name in ("samples", "kept_samples", "pairs")
    }
    total |= {"kept_pairs": reasons.pop(KEPT, 0), "rewrite": reasons.pop(REWRITE, 0), "reasons": reasons}
    content = {
        "fingerprint": fingerprint,
        "written": is_written,
        "total": total,
        "sources": sources,
        "settings": identity["settings"],
    }
    return Report(json.loads(json.dumps(content)))  # as it will be read again: lists, no tuples


def write_report(folder: Path, report: Report) -> None:
    """Write `report.md`, then `report.json`, whose presence says that the curation is finished."""
    write_text(folder / "report.md", "\n".join(format_report(report)) + "\n")
    write_text(folder / REPORT, json.dumps(report.content, ensure_ascii=False, indent=1) + "\n")


def format_report(report: Report, *, limit: int | None = None) -> list[str]:
    """The report as lines of Markdown that are readable as they are; with a `limit`, at most so many of a kind."""
    total = report.total
    lines = [
        f"kept {total['kept_pairs']:,} of {total['pairs']:,} pairs ({_share(total['kept_pairs'], total['pairs'])}), "
        f"{total['kept_samples']:,} of {total['samples']:,} samples",
    ]
    if total["rewrite"]:
        lines.append(f"{total['rewrite']:,} of the kept captions score low and are flagged for rewriting")
    sources = report.content["sources"]
    for name, source in list(sources.items())[:limit]:
        lines += ["", f"### {name}", "", *_table(_merge_others(source["languages"]), limit)]
        others = {
            language: sum(words.values()) for language, words in source["languages"].items() if _is_other(language)
        }
        if others:
            lines += ["", f"left out: {describe_languages(others)}, which are neither Chinese nor English", ""]
        faults = [f"- {fault['reason']}: {fault['shard']}" for fault in source["faults"]]
        lines += faults if limit is None else abridge_list(faults)
    if limit is not None and len(sources) > limit:
        lines += ["", f"… and {len(sources) - limit:,} more sources in report.md"]
    return lines


def _is_other(language: str) -> bool:
    return language not in (*LANGUAGES, NO_LANGUAGE)


def _merge_others(languages: Mapping[str, Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """The languages of training, and all others in one column."""
    others = [words for language, words in languages.items() if _is_other(language)]
    known = {language: words for language, words in languages.items() if not _is_other(language)}
    return {**known, "others": _sum(others)} if others else known


def _table(languages: Mapping[str, Mapping[str, int]], limit: int | None) -> list[str]:
    """Reasons by language, the most frequent first; kept ones on top, the sum at the bottom."""
    sums = _sum(languages.values())
    flagged = sums.pop(REWRITE, 0)
    rejected = sorted((word for word in sums if word != KEPT), key=lambda word: (-sums[word], word))
    pairs = sum(sums.values())
    if limit is not None and len(rejected) > limit - 3:
        rest, rejected = rejected[limit - 4 :], rejected[: limit - 4]
        more = f"{len(rest):,} more reasons"
        languages = {
            language: {**own, more: sum(own.get(word, 0) for word in rest)} for language, own in languages.items()
        }
        sums[more] = sum(sums.pop(word) for word in rest)
        rejected.append(more)
    header = ["pairs", *languages, "all", "share"]
    rows = []
    for word in [KEPT, *([REWRITE] if flagged else []), *rejected]:
        count = flagged if word == REWRITE else sums[word]
        rows.append(
            [word, *(f"{own.get(word, 0):,}" for own in languages.values()), f"{count:,}", _share(count, pairs)]
        )
    shown = (KEPT, *rejected)
    per_language = [sum(counts.get(word, 0) for word in shown) for counts in languages.values()]
    rows.append(["*all*", *(f"{count:,}" for count in per_language), f"{pairs:,}", _share(pairs, pairs)])
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])} |"

    rule = f"| {'-' * widths[0]} | {' | '.join('-' * (width - 1) + ':' for width in widths[1:])} |"
    return [line(header), rule, *map(line, rows)]


def _sum(counts: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for words in counts:
        total.update(words)
    return total


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
