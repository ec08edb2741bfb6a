"""Validation before the first step is logged as that of step 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.evaluation.retrieval import encode_set, evaluate_features
from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.training.callbacks.first_validation import FirstValidation
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def lines_of(emoji_folder: Path, folder: Path, **given: Any) -> list[dict[str, float]]:
    metrics = JsonlLogger(folder / "metrics.jsonl")
    trainer = make_trainer(
        folder, max_steps=1, callbacks=[FirstValidation()], loggers=[metrics], **{"limit_val_batches": 1.0, **given}
    )
    torch.manual_seed(0)
    module = make_module(max_steps=1)
    trainer.fit(module, datamodule=make_datamodule(emoji_folder, max_steps=1))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_logged_as_step_0_with_the_numbers_of_the_evaluation(emoji_folder: Path, tmp_path: Path) -> None:
    first, second = lines_of(emoji_folder, tmp_path, num_sanity_val_steps=-1)
    assert (first["step"], first["samples_seen"], second["step"]) == (0, 0, 1)
    torch.manual_seed(0)
    module, data = make_module(max_steps=1), make_datamodule(emoji_folder)
    module.configure_model()
    wanted = evaluate_features(encode_set(module.model, data.retrieval_set("emoji_val"), data.tokenizer))
    for language in ("zh", "en"):
        for name in ("t2i_r@10", "i2t_r@10", "mean_recall"):
            assert first[f"val/emoji_val_{language}/{name}"] == pytest.approx(wanted[language][name], abs=1e-4)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_trial_of_a_few_batches_is_not_logged(emoji_folder: Path, tmp_path: Path, steps: int) -> None:
    assert [line["step"] for line in lines_of(emoji_folder, tmp_path, num_sanity_val_steps=steps)] == [1]
