"""Numbers of runs with different objectives: as their summaries say them, and as the document says them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks._mixtures import BASE, NOT_YET, SECTION, collect, render, render_committed, summarize
from m2_encoder.evaluation.tables import replace_section

BEGIN, END = "<!-- mixtures:begin -->", "<!-- mixtures:end -->"


def make_summary(offset: float, *, masked: bool) -> dict[str, Any]:
    """As of a run: every number differs from every other."""

    def recalls(start: float) -> dict[str, float]:
        return {"t2i_r@10": start + offset, "mean_recall": start + 2 + offset}

    words = {"accuracy": 0.5, "other_accuracy": 0.25, "commonest_accuracy": 0.125, "loss": 3.0, "count": 9}
    patches = {"loss": 0.75 + offset / 1000, "other_loss": 0.875, "mean_loss": 0.9375, "count": 8}
    of = {"cmlm": {"zh": words, "en": words}, "cmim": {"zh": patches, "en": patches}}
    summary: dict[str, Any] = {
        "throughput": {"step": 10, "samples_seen": 640, "samples_per_s": 32.0 + offset},
        "evaluation": {
            "heldout_style": {"zh": recalls(40), "en": recalls(50)},
            "heldout_families": {"zh": recalls(20), "en": recalls(30)},
            "val": {"zh": recalls(0), "en": recalls(0)},
        },
    }
    return summary | ({"masked": {"val": of, "heldout_style": of, "heldout_families": of}} if masked else {})


def make_report() -> dict[str, Any]:
    runs = {
        BASE: {0: collect(make_summary(0, masked=False)), 1: collect(make_summary(3, masked=False))},
        "itc,cmlm,cmim": {0: collect(make_summary(1, masked=True)), 1: collect(make_summary(5, masked=True))},
    }
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
        "command": "python benchmarks/objective_mixtures.py",
        "figures": {"steps": 10, "seeds": [0, 1], "batch": 64, **summarize(runs)},
    }


def test_numbers_of_a_run() -> None:
    found = collect(make_summary(0, masked=True))
    assert found["seconds_per_step"] == 2.0
    assert found["heldout_style/zh R@10"] == 40
    assert found["heldout_families/en R@10"] == 30
    assert found["heldout_style/mean recall"] == 47
    assert [found[f"heldout_style/cmlm zh {name}"] for name in ("right", "other", "blind")] == [50, 25, 12.5]
    assert [found[f"heldout_families/cmim en {name}"] for name in ("right", "other", "blind")] == [0.75, 0.875, 0.9375]
    assert not any("cm" in name for name in collect(make_summary(0, masked=False)))


def test_differences_are_those_of_a_seed() -> None:
    figures = make_report()["figures"]
    own = figures["mixtures"]["itc,cmlm,cmim"]["heldout_style/zh R@10"]
    assert own == {"mean": 43.0, "spread": round(statistics.stdev([41, 45]), 6), "values": [41, 45]}
    assert list(figures["differences"]) == ["itc,cmlm,cmim"]
    difference = figures["differences"]["itc,cmlm,cmim"]
    assert difference["heldout_style/zh R@10"]["values"] == [1, 2]
    assert "heldout_style/cmlm zh right" not in difference, "the base has no such number"


def test_one_seed_has_no_spread() -> None:
    figures = summarize({BASE: {4: {"a": 1.0}}})
    assert figures == {"mixtures": {BASE: {"a": {"mean": 1.0, "spread": None, "values": [1.0]}}}, "differences": {}}


def test_tables() -> None:
    lines = render(make_report(), "some.json").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `[")]
    assert [row[0] for row in rows] == [
        "`[itc]`", "`[itc,cmlm,cmim]`", "`[itc,cmlm,cmim]`", "`[itc,cmlm,cmim]`", "`[itc,cmlm,cmim]`"
    ]  # fmt: skip
    assert rows[0][3:5] == ["41.5 ± 2.1 / 51.5 ± 2.1", "48.5 ± 2.1"]
    assert rows[1][-1].startswith("1.8")
    assert rows[2][1] == "+1.5 ± 0.7 / +1.5 ± 0.7", "the paired difference"
    assert rows[3][1] == "50.0 / 25.0 / 12.5"
    assert rows[4][4] == "0.753 ± 0.003 / 0.875 / 0.938"
    assert any("10 steps" in line and "seeds 0, 1" in line and "`some.json`" in line for line in lines)


def test_the_document_says_what_the_committed_files_say(repo_root: Path) -> None:
    text = (repo_root / "docs" / "objectives.md").read_text(encoding="utf-8")
    content = render_committed(repo_root)
    assert replace_section(text, SECTION, content) == text, "python benchmarks/objective_mixtures.py --markdown"


def test_results_replace_what_was_there(tmp_path: Path) -> None:
    text = f"before\n{BEGIN}\nformer\n{END}\nafter\n"
    assert render_committed(tmp_path) == NOT_YET
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "objective_mixtures-here.json").write_text(json.dumps(make_report()))
    changed = replace_section(text, SECTION, render_committed(tmp_path))
    assert changed.startswith(f"before\n{BEGIN}\n\n10 steps")
    assert changed.endswith(f"\n\n{END}\nafter\n")
    assert "`benchmarks/results/objective_mixtures-here.json`" in changed
    assert "former" not in changed
    assert replace_section(changed, SECTION, render_committed(tmp_path)) == changed
    with pytest.raises(ValueError, match="once each"):
        replace_section(text + BEGIN, SECTION, "")
