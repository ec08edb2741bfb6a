"""The emoji model and its siblings, compared on the built-in drawings and on Tux Paint's stamps.

Five models: `m2-train +experiment=emoji` with each of the four drawing styles left out, and `+experiment=emoji_full`.
What is not trained yet is trained (about 12 minutes each on two cores). Then one `m2-evaluate` measures all of them on
the suites `emoji_styles` and `tuxpaint`; its page is in outputs/siblings.html. The stamps are Debian's package
`tuxpaint-stamps-default`, read where they are installed; their licence is the GPL, no part of them is here.

    python benchmarks/siblings.py --json benchmarks/results/siblings-MACHINE.json --document docs/siblings.md

Rows are recalls at 1, 5, 10 in both directions and their mean, percent, with 95 % intervals of the mean and chance.
`--document` writes the tables between the markers of a document.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import Report, parse_arguments

from m2_encoder.evaluation.tables import replace_section, to_markdown

ROOT = Path(__file__).resolve().parents[1]
STYLES = ("twemoji", "noto", "fluent", "openmoji")
MODELS = {
    "emoji": ("+experiment=emoji",),
    **{f"emoji_{style}": ("+experiment=emoji", f"data.heldout_style={style}") for style in STYLES[1:]},
    "emoji_full": ("+experiment=emoji_full",),
}
LEFT_OUT = {"emoji": "Twemoji", "emoji_noto": "Noto", "emoji_fluent": "Fluent", "emoji_openmoji": "OpenMoji"}
TUXPAINT = "tuxpaint"
PARTS = {"": "all", "pictures": "pictures", "symbols": "letters, numbers, symbols"}


def run(command: str, *lines: str) -> None:
    """One command of the project, from the root of the checkout."""
    print(f"+ {shlex.join([command, *lines])}", flush=True)
    subprocess.run([Path(sys.executable).with_name(command), *lines], cwd=ROOT, check=True)


def measure() -> list[dict[str, Any]]:
    """Records of all models; those without an export are trained first."""
    for name, lines in MODELS.items():
        if not (ROOT / "outputs" / name / "export").is_dir():
            run("m2-train", *lines, f"run.name={name}", "run.resume=auto", "logger=csv")
    models = f"model=[{','.join(f'outputs/{name}/export' for name in MODELS)}]"
    for place in ("siblings.json", "siblings.html"):  # of an earlier call
        (ROOT / "outputs" / place).unlink(missing_ok=True)
    places = ("output=outputs/siblings.json", "page=outputs/siblings.html")
    run("m2-evaluate", models, "evaluation=[emoji_styles,tuxpaint]", *places)
    return list(json.loads((ROOT / "outputs" / "siblings.json").read_text(encoding="utf-8"))["records"])


def group(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Retrieval by model, set, subset and language: metrics, and the interval and chance of the mean."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for each in records:
        if each["task"] != "retrieval":
            continue
        place = (each["model"], each["dataset"], each.get("subset", ""), each["language"])
        row = found.setdefault(place, {})
        row[each["metric"]] = round(each["value"], 4)
        if each["metric"] == "mean_recall":
            row |= {key: round(each[key], 4) for key in ("low", "high", "chance")}
            row["n"] = each["n"]
    return found


def table_of_styles(found: Mapping[tuple[str, ...], Mapping[str, Any]], kind: str) -> str:
    """Mean recall of models, zh / en, by style; a style that training left out is bold."""

    def cell(model: str, style: str) -> str:
        zh, en = (found[model, f"{style}_{kind}", "", language]["mean_recall"] for language in ("zh", "en"))
        is_unseen = style in (LEFT_OUT.get(model, "Twemoji").lower(),)
        return f"**{zh:.1f} / {en:.1f}**" if is_unseen else f"{zh:.1f} / {en:.1f}"

    titles = {"noto": "Noto", "twemoji": "Twemoji", "fluent": "Fluent", "openmoji": "OpenMoji"}
    chance = [f"*{found['emoji', f'{style}_{kind}', '', 'zh']['chance']:.1f}*" for style in STYLES]
    rows = [[f"`{model}`", *(cell(model, style) for style in STYLES)] for model in MODELS]
    head = [["", *(titles[style] for style in STYLES)], ["---", *["--:"] * len(STYLES)]]
    return to_markdown([*head, *rows, ["*chance*", *chance]])


def table_of_stamps(found: Mapping[tuple[str, ...], Mapping[str, Any]]) -> str:
    """Mean recall on the stamps, with intervals."""
    languages = ("zh_CN", "zh_TW", "en")
    rows = []
    for part, title in PARTS.items():
        for model in MODELS:
            cells = [found[model, TUXPAINT, part, language] for language in languages]
            shown = [f"{each['mean_recall']:.1f} ({each['low']:.1f}–{each['high']:.1f})" for each in cells]
            rows.append([title if model == "emoji" else "", f"`{model}`", *shown])
        chance = [f"*{found['emoji', TUXPAINT, part, language]['chance']:.1f}*" for language in languages]
        rows.append(["", "*chance*", *chance])
    return to_markdown([["stamps", "model", *languages], ["---", "---", *["--:"] * 3], *rows])


def write_document(path: Path, tables: Mapping[str, Callable[[], str]]) -> None:
    """Replaces the tables of a document."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = replace_section(text, name, table())
    path.write_text(text, encoding="utf-8")


def main() -> None:
    def configure(parser: Any) -> None:
        parser.add_argument("--document", type=Path, metavar="FILE", help="a document whose tables are replaced")

    arguments = parse_arguments(__doc__, configure=configure)
    report = Report("The emoji model and its siblings, recall in percent", distributions=("lightning", "pillow"))
    found = group(measure())
    for (model, dataset, subset, language), values in found.items():
        report.add(model, set=dataset, subset=subset, language=language, **values)
    tables: dict[str, Callable[[], str]] = {
        "known": lambda: table_of_styles(found, "known"),
        "unseen": lambda: table_of_styles(found, "unseen"),
        "stamps": lambda: table_of_stamps(found),
    }
    if arguments.document is not None:
        write_document(arguments.document, tables)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
