"""A run with masked objectives ends with what they predict on every set: in its summary, its metrics and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2_encoder.analysis import load_masked, read_run
from m2_encoder.config import validate
from m2_encoder.config.compose import Composer
from m2_encoder.evaluation.tasks.masked import Masked
from m2_encoder.runs.run import train
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CONF = Path(__file__).resolve().parents[2] / "conf"
SHORT = (
    "+experiment=smoke",
    "logger=csv",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "scheduler.warmup_steps=1",
    "run.export=false",
    "model.num_layers=1",
    "model.embed_dim=32",
    "model.num_heads=2",
    "model.image_size=32",
)
SPLITS = {"heldout_style": 1494, "heldout_families": 153, "val": 721}
WORDS = {"accuracy", "other_accuracy", "commonest_accuracy", "loss", "other_loss"}
PATCHES = {"loss", "other_loss", "mean_loss"}


@pytest.mark.parametrize("objectives", [pytest.param("itc,cmlm,cmim", marks=pytest.mark.slow), "itc"])
def test_end_of_a_run(
    composer: Composer, emoji_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objectives: str
) -> None:
    composition = composer.compose(
        [*SHORT, f"objective=[{objectives}]", f"run.folder={tmp_path}", f"data.folder={emoji_folder}"]
    )
    assert composition.problems == []
    assert validate.validate_train(composition.cfg) == []
    metrics = train(composition.cfg)
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"].items() <= metrics.items(), "what the loggers get"
    out = capsys.readouterr().out
    masked = {name: value for name, value in summary["metrics"].items() if "/cm" in name}
    if objectives == "itc":
        assert not masked
        assert "masked" not in summary
        assert "Hidden words" not in out
        return
    assert "Hidden words and patches" in out
    assert set(summary["masked"]) == set(SPLITS)
    for split, images in SPLITS.items():
        found = summary["masked"][split]
        assert list(found) == ["cmlm", "cmim"]
        for language in ("zh", "en"):
            words, patches = found["cmlm"][language], found["cmim"][language]
            assert set(words) == {"count", *WORDS}
            assert set(patches) == {"count", *PATCHES}
            assert words["count"] >= images, "each caption has a hidden word"
            assert patches["count"] % images == 0, "each image has as many hidden patches"
            assert 0 < words["commonest_accuracy"] < 0.2
            assert 0.8 < patches["mean_loss"] < 1
            assert 0.8 < patches["loss"] < 1.5
            for objective, numbers in found.items():
                for name, value in numbers[language].items():
                    key = f"val/emoji_{split}_{language}/{objective}_{name}"
                    assert (name == "count") == (masked.pop(key, None) != value)
    assert not masked
    # What a checkpoint holds is enough for the same numbers.
    run = read_run(tmp_path / "smoke")
    context = load_masked(run, {"heldout_families": run.read_set("heldout_families")})
    again = Masked().measure_sets(context)["heldout_families"]
    for objective, by_language in summary["masked"]["heldout_families"].items():
        assert all(again[objective][language] == pytest.approx(by_language[language]) for language in ("zh", "en"))
