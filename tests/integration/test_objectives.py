"""Every shipped objective composes, validates and trains together with the others, from Hydra to the log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra.utils import instantiate

from m2_encoder.checkpoints.export import export_model
from m2_encoder.config import validate
from m2_encoder.config.compose import Composer
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.config.problems import format_problem
from m2_encoder.errors import UserError
from m2_encoder.hub import load
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.base import Objective
from m2_encoder.runs.build import build_objectives, build_run
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CONF = Path(__file__).resolve().parents[2] / "conf"
# Codes of patches need a trained visual tokenizer, whose own tests make one.
OBJECTIVES = sorted(path.stem for path in (CONF / "objective").glob("*.yaml") if path.stem != "cmim_codes")
EVERYTHING = ["itc", "sigmoid", "soft_targets", "text_contrast", "captioning", "itm", "distillation"]
FREE_TEXTS = {"teacher", "teacher_weights", "user_dictionary"}
SMALL = (
    "+experiment=smoke",
    "logger=csv",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=0",
    "scheduler.warmup_steps=1",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of other widths and another image size, with the built-in tokenizer."""
    values: dict[str, Any] = {"name": "tiny", "tokenizer": "emoji", "feature_dim": 48, "embed_dim": 32, "num_heads": 2}
    config = build_model_config(values)
    folder = tmp_path_factory.mktemp("teacher") / "export"
    return export_model(folder, model=M2Encoder(config), tokenizer=build_tokenizer(values, config))


def compose(composer: Composer, *lines: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    composition = composer.compose([*SMALL, f"run.folder={folder}", *lines])
    assert composition.problems == []
    return composition.cfg, [*map(format_problem, validate.validate_train(composition.cfg))]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_composes_and_its_values_are_those_of_the_code(
    composer: Composer, tmp_path: Path, teacher: Path, name: str
) -> None:
    lines = [f"objective=[{name}]"]
    lines += [f"objective.distillation.teacher={teacher}"] if name == "distillation" else []
    lines += [f"model.weights={teacher}"] if name == "keep" else []
    lines += ["data.captions.short=name", "objective.long.components=2"] if name == "long" else []
    lines += ["adaptation=mixture"] if name == "routing" else []
    lines += ["objective.cmim.targets.tokenizer=outputs/visual_tokenizer/export"] if name == "cmim_codes" else []
    cfg, problems = compose(composer, *lines, folder=tmp_path)
    assert problems == []
    name = name.removesuffix("_codes")  # another option of the same objective
    objective = instantiate(cfg["objective"])[name]
    assert isinstance(objective, Objective)
    assert objective.weight > 0
    for key in cfg["objective"][name]:
        broken = {**cfg, "objective": {name: {**cfg["objective"][name], key: "nonsense"}}}
        assert key in FREE_TEXTS or validate.validate_train(broken), key


def test_all_of_them_train_together(
    composer: Composer, emoji_folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, problems = compose(
        composer,
        f"objective=[{','.join(EVERYTHING)}]",
        f"data.folder={emoji_folder}",
        f"objective.distillation.teacher={teacher}",
        "objective.distillation.teacher_language=en",
        "strategy.micro_batches=2",
        folder=tmp_path,
    )
    assert problems == []
    lightning.seed_everything(0, verbose=False)
    run = build_run(cfg, tmp_path / "run")
    without: list[str] = []
    monkeypatch.setattr(
        run.module,
        "on_after_backward",
        lambda: without.extend(n for n, p in run.module.named_parameters() if p.requires_grad and p.grad is None),
    )
    run.trainer.fit(run.module, datamodule=run.datamodule)
    assert without == []
    metrics = run.trainer.callback_metrics
    for name in EVERYTHING:
        assert math.isfinite(metrics[f"train/loss/{name}"]), name
    assert 0 <= metrics["train/accuracy/itm"] <= 1
    assert metrics["train/skipped_steps"] == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = {key.removeprefix("objectives.") for key in saved if key.startswith("objectives.")}
    assert own == {
        "sigmoid.logit_bias",
        "itm.head.weight",
        "itm.head.bias",
        "distillation.projection.weight",
        *(
            f"captioning.head.{key}"
            for key in ("bias", "norm.weight", "norm.bias", "transform.weight", "transform.bias")
        ),
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["objective=[itc,text_contrast]", "data.captions.every_language=false"],
            "data.captions.every_language=false: must be true: objective.text_contrast",
        ),
        (
            [
                "objective=[distillation]",
                "objective.distillation.teacher=TEACHER",
                "objective.distillation.teacher_language=en",
                "data.captions.every_language=false",
            ],
            "objective.distillation.teacher_language=en: needs captions in every language",
        ),
        (["objective=[long]", "objective.long.components=2"], "data.captions.short=null: must be given"),
        (
            ["objective=[long]", "data.captions.short=name", "data.global_batch_size=9", "objective.long.components=8"],
            "objective.long.components=8: must be below 8: the 9 images of a contrastive group",
        ),
        (
            ["objective=[soft_targets]", "objective.soft_targets.softness=1"],
            "objective.soft_targets.softness=1: must be",
        ),
        (
            ["objective=[captioning,itm]", "objective.itm.text_expert=true"],
            "objective.itm.text_expert=true: must be that of objective.captioning",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    composer: Composer, tmp_path: Path, teacher: Path, lines: list[str], message: str
) -> None:
    lines = [line.replace("TEACHER", str(teacher)) for line in lines]
    _, problems = compose(composer, *lines, folder=tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_a_teacher_must_exist_and_reads_by_its_own_tokenizer(teacher: Path, parity_dir: Path) -> None:
    official = {"name": "tiny", "tokenizer": str(parity_dir / "tokenizer" / "sp.model"), "vocab_size": 115244}
    emoji = {"name": "tiny", "tokenizer": "emoji"}

    def build(model: dict[str, Any], name: str) -> Objective:
        node = {"_target_": "m2_encoder.objectives.distillation.Distillation", "teacher": name}
        return build_objectives({"model": model, "objective": {"d": node}})["d"]

    most = load(teacher).require_tokenizer().context_length
    assert not build(emoji, str(teacher)).readers
    assert not build({**emoji, "context_length": most - 1}, str(teacher)).readers
    (cut,) = build({**emoji, "context_length": most + 1}, str(teacher)).readers.values()
    assert cut.context_length == most, "a teacher reads no more than it was trained with"
    (reader,) = build(official, str(teacher)).readers.values()
    assert reader.vocab_size == load(teacher).require_tokenizer().vocab_size
    with pytest.raises(UserError, match="no such folder"):
        build(emoji, "outputs/nowhere")
    towers = {"_target_": "m2_encoder.models.composed.ComposedTowers", "tokenizer": "emoji", "image_size": 16}
    with pytest.raises(UserError, match="teacher=start: is somebody else's model, which cannot teach"):
        build({**towers, "weights": "a.pt"}, "start")
