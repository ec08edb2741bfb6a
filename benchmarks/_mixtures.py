"""What runs with different objectives reached: from their summaries to means, paired differences and Markdown.

A number's name is `<set>/<what>`; differences are those of one seed to the run of the same seed without the objectives
in question, so that what a seed makes of weights, order and captions is in both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2_encoder.evaluation.tables import to_markdown

BASE = "itc"
SETS = {
    "val": "validation: unseen concepts",
    "heldout_style": "unseen style",
    "heldout_families": "unseen concepts and style",
}
LANGUAGES = ("zh", "en")
SECONDS = "seconds_per_step"
SECTION = "mixtures"
"""Of docs/objectives.md."""
NOT_YET = "No result is committed yet; the command above measures on your machine."

_WORDS = {"right": "accuracy", "other": "other_accuracy", "blind": "commonest_accuracy"}
_PATCHES = {"right": "loss", "other": "other_loss", "blind": "mean_loss"}


def collect(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run.

    Args:
        summary: its `summary.json`.

    Returns:
        Recalls and accuracies in percent, losses, and seconds per step, by name.
    """
    done = summary["throughput"]
    found: dict[str, float] = {SECONDS: done["samples_seen"] / done["step"] / done["samples_per_s"]}
    for split in SETS:
        of = summary["evaluation"][split]
        found |= {f"{split}/{language} R@10": of[language]["t2i_r@10"] for language in LANGUAGES}
        found[f"{split}/mean recall"] = statistics.fmean(of[language]["mean_recall"] for language in LANGUAGES)
        masked = summary.get("masked", {}).get(split, {})
        for language in LANGUAGES:
            for objective, unit, names in (("cmlm", 100.0, _WORDS), ("cmim", 1.0, _PATCHES)):
                if objective in masked:
                    numbers = masked[objective][language]
                    found |= {
                        f"{split}/{objective} {language} {name}": unit * numbers[key] for name, key in names.items()
                    }
    return found


def summarize(runs: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Means over seeds, and differences to `BASE`.

    Args:
        runs: by mixture and seed, numbers by name; the same seeds for every mixture.

    Returns:
        `mixtures` and `differences`, by mixture and name: mean, spread (sample standard deviation, None for one seed)
        and values in the order of the seeds.
    """
    found: dict[str, Any] = {"mixtures": {}, "differences": {}}
    for mixture, seeds in runs.items():
        numbers = list(seeds.values())
        found["mixtures"][mixture] = {name: _describe([each[name] for each in numbers]) for name in numbers[0]}
        if mixture != BASE:
            pairs = [(own, runs[BASE][seed]) for seed, own in seeds.items()]
            found["differences"][mixture] = {
                name: _describe([own[name] - base[name] for own, base in pairs])
                for name in numbers[0]
                if name in pairs[0][1]
            }
    return found


def render(report: Mapping[str, Any], source: str) -> str:
    """Tables of a report, as Markdown.

    Args:
        report: what the benchmark wrote.
        source: path of its file, to be named.
    """
    figures, machine = report["figures"], report["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    seeds = ", ".join(map(str, figures["seeds"]))
    head = (
        f"{figures['steps']:,} steps of `+experiment=emoji_full` with each mixture, a batch of {figures['batch']:,} "
        f"images, seeds {seeds}; mean ± sample standard deviation over seeds, in percent. {where}. "
        f"Source: `{source}`, which holds every single value; `{report['command']}`."
    )
    parts = [head, _retrieval_table(figures["mixtures"], signed=False)]
    parts += ["Paired differences to `[itc]`, seed by seed:", _retrieval_table(figures["differences"], signed=True)]
    parts += [
        "Hidden words said right, percent, beside the own image / another image / always the commonest token:",
        _masked_table(figures["mixtures"], "cmlm"),
        "Loss of hidden patches beside the image's own caption / another image's / answering each patch's mean:",
        _masked_table(figures["mixtures"], "cmim"),
    ]
    return "\n\n".join(parts)


def render_committed(root: Path) -> str:
    """The section of all committed results, in the order of their names.

    Args:
        root: the checkout.
    """
    files = sorted((root / "benchmarks" / "results").glob("objective_mixtures-*.json"))
    rendered = [
        render(json.loads(path.read_text(encoding="utf-8")), path.relative_to(root).as_posix()) for path in files
    ]
    return "\n\n".join(rendered) or NOT_YET


def _describe(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.fmean(values), 6),
        "spread": round(statistics.stdev(values), 6) if len(values) > 1 else None,
        "values": [round(value, 6) for value in values],
    }


def _retrieval_table(mixtures: Mapping[str, Any], *, signed: bool) -> str:
    heads = [
        f"{title}: {what}" for title in SETS.values() for what in ("T→I R@10 " + " / ".join(LANGUAGES), "mean recall")
    ]
    lines = [["objectives", *heads, "s/step"], ["---", *["--:"] * (len(heads) + 1)]]
    for mixture, numbers in mixtures.items():
        cells = []
        for split in SETS:
            recalls = [_cell(numbers[f"{split}/{code} R@10"], digits=1, signed=signed) for code in LANGUAGES]
            cells += [" / ".join(recalls), _cell(numbers[f"{split}/mean recall"], digits=1, signed=signed)]
        lines.append([f"`[{mixture}]`", *cells, _cell(numbers[SECONDS], digits=2, signed=signed)])
    return to_markdown(lines)


def _masked_table(mixtures: Mapping[str, Any], objective: str) -> str:
    columns = [f"{split}/{objective} {language}" for split in SETS for language in LANGUAGES]
    heads = [f"{title}: {what.removeprefix(f'{objective} ')}" for title, what in _titles(columns)]
    lines = [["objectives", *heads], ["---", *["--:"] * len(columns)]]
    for mixture, numbers in mixtures.items():
        if f"{columns[0]} right" in numbers:
            digits = 1 if objective == "cmlm" else 3
            cells = [
                " / ".join(_cell(numbers[f"{name} {which}"], digits=digits) for which in ("right", "other", "blind"))
                for name in columns
            ]
            lines.append([f"`[{mixture}]`", *cells])
    return to_markdown(lines)


def _titles(columns: Sequence[str]) -> list[tuple[str, str]]:
    return [(SETS[split], what) for split, _, what in (column.partition("/") for column in columns)]


def _cell(number: Mapping[str, Any], *, digits: int, signed: bool = False) -> str:
    """Mean and spread; a spread that is 0, as of what no training decides, is left out."""
    mean = f"{number['mean']:{'+' if signed else ''}.{digits}f}"
    return f"{mean} ± {number['spread']:.{digits}f}" if number["spread"] else mean
