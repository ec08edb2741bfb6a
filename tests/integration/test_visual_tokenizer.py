"""A visual tokenizer from Hydra to its picture and folder, and an encoder that learns its codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from m2_encoder.checkpoints.visual_tokenizer import load_visual_tokenizer, save_visual_tokenizer
from m2_encoder.config import validate
from m2_encoder.config.compose import Composer
from m2_encoder.config.problems import format_problem
from m2_encoder.errors import Problem, UserError
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.runs.build import build_objectives, build_run
from m2_encoder.runs.folder import write_config
from m2_encoder.runs.run import train
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CONF = Path(__file__).resolve().parents[2] / "conf"
FEW = ("logger=csv", "trainer.accelerator=cpu", "data.global_batch_size=16", "scheduler.warmup_steps=1")
SMALL = (
    "+experiment=visual_tokenizer",
    *FEW,
    "trainer.max_steps=12",
    "trainer.val_check_interval=12",
    "task.num_codes=40",
    "task.embed_dim=32",
    "optimizer.lr=5e-3",
)


def compose(composer: Composer, *lines: str) -> dict[str, Any]:
    composition = composer.compose(list(lines))
    assert composition.problems == []
    assert validate.validate_train(composition.cfg) == []
    return composition.cfg


def test_tokenizer_trains_and_its_codes_are_learnt(
    composer: Composer, emoji_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}")
    metrics = train(compose(composer, *SMALL, *places))
    run = tmp_path / "visual_tokenizer"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss/reconstruction"] for line in lines if "train/loss/reconstruction" in line]
    assert losses
    assert metrics["val/emoji_val/psnr"] > 5
    assert 1 <= metrics["val/emoji_val/perplexity"] <= metrics["val/emoji_val/codes_used"] <= 40
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.width > 500
    assert "PSNR" in capsys.readouterr().out
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported = load_visual_tokenizer(run / "export")
    assert json.loads((run / "export" / "config.json").read_text())["preprocess"]["pictures"]["background"] == "white"
    assert torch.equal(saved["tokenizer.codebook.vectors"], exported.codebook.vectors)

    cfg = compose(
        composer,
        "+experiment=smoke",
        *FEW,
        *places,
        "model.patch_size=8",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=0",
        "objective=[itc,cmim_codes]",
        f"objective.cmim.targets.tokenizer={run / 'export'}",
        "objective.cmim.masking=attentive",
    )
    codes = build_run(cfg, tmp_path / "codes")
    codes.trainer.fit(codes.module, datamodule=codes.datamodule)
    assert 0 <= codes.trainer.callback_metrics["train/accuracy/cmim"] <= 1
    state = torch.load(next((tmp_path / "codes").rglob("last.ckpt")), weights_only=True)["state_dict"]
    own = {name for name in state if name.startswith("objectives.")}
    assert own == {"objectives.cmim.targets.head.weight", "objectives.cmim.targets.head.bias"}
    assert state["objectives.cmim.targets.head.weight"].shape[0] == 40


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["objective=[itc]"], "objective=[itc]: must be empty: the task has a loss of its own"),
        (["strategy=ddp", "trainer.devices=2"], "strategy: must be single"),
        (["strategy.micro_batches=2"], "strategy.micro_batches=2: has no meaning"),
        (["adaptation._target_=builtins.dict"], "adaptation._target_=builtins.dict: must be full"),
        (["task.num_codes=1"], "task.num_codes=1: must be"),
        (["task.decay=1"], "task.decay=1: must be"),
        (["task.num_heads=3"], "task.num_heads=3: must divide task.embed_dim=32; for example task.num_heads=4"),
    ],
)
def test_what_a_tokenizer_cannot_use_is_said(
    composer: Composer, tmp_path: Path, lines: list[str], message: str
) -> None:
    composition = composer.compose([*SMALL, f"run.folder={tmp_path}", *lines])
    (problem,) = [*composition.problems, *validate.validate_train(composition.cfg)]
    assert format_problem(problem).startswith(message)


def test_a_tokenizer_and_an_encoder_do_not_go_on_in_each_others_run(composer: Composer, tmp_path: Path) -> None:
    encoder = ("+experiment=smoke", *FEW)
    for number, (first, then, what) in enumerate(
        [(SMALL, encoder, "a visual tokenizer"), (encoder, SMALL, "an encoder")]
    ):
        shared = (f"run.folder={tmp_path}", f"run.name=run{number}", "run.resume=auto")
        folder = tmp_path / f"run{number}"
        (folder / "checkpoints").mkdir(parents=True)
        write_config(folder / "config.yaml", compose(composer, *first, *shared))
        torch.save({"global_step": 1, "state_dict": {}}, folder / "checkpoints" / "last.ckpt")
        with pytest.raises(UserError) as caught:
            train(compose(composer, *then, *shared))
        assert caught.value.problems == (
            Problem("run.name", f"run{number}", f"its run trains {what}", "give another run.name"),
        )


def test_codes_need_a_tokenizer_of_the_same_patches(composer: Composer, tmp_path: Path) -> None:
    composition = composer.compose(
        [
            "+experiment=smoke",
            f"run.folder={tmp_path}",
            "objective=[itc,cmim_codes]",
            "objective.cmim.targets.tokenizer=outputs/nowhere",
        ]
    )
    (problem,) = validate.validate_train(composition.cfg)
    assert format_problem(problem).startswith(
        "objective.cmim.targets.tokenizer=outputs/nowhere: no such folder; train one with"
    )
    config = VisualTokenizerConfig(image_size=64, patch_size=8, num_codes=5, code_dim=4, embed_dim=8, num_heads=2)
    folder = save_visual_tokenizer(tmp_path / "t", VisualTokenizer(config))
    composition.cfg["objective"]["cmim"]["targets"]["tokenizer"] = str(folder)
    with pytest.raises(UserError, match=r"has image_size=64, the model 32; train one with .* model\.image_size=32"):
        build_objectives(composition.cfg)
