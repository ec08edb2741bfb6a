"""The pull is that of its formula, computed apart in NumPy; resumed training equals uninterrupted training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.training.adaptation import merge_adaptation
from m2_encoder.training.adaptations.last import Last
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.optim import build_optimizer
from tests.support.models import random_images, random_model
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CONFIG = tiny_config()
STEPS = 4


def fit(folder: Path, emoji: Path, pull: float, *, steps: int = STEPS, resume: Path | None = None, every: int = 0):  # type: ignore[no-untyped-def]
    torch.manual_seed(4 if resume is None else 5)  # other weights: the checkpoint holds the start, too
    module = make_module(
        model=CONFIG,
        objectives={"itc": ImageTextContrastive(heads=["features", "backbone_features"])},
        initial_state=random_model(CONFIG).state_dict(),
        adaptation=Last(pull=pull),
        optimizer=partial(build_optimizer, lr=3e-2, weight_decay=0.1),
        max_steps=STEPS,
    )
    callbacks = [RunCheckpoint(folder=folder / "checkpoints", every_n_steps=every)] if every else []
    trainer = make_trainer(folder, max_steps=steps, callbacks=callbacks)
    trainer.fit(module, make_datamodule(emoji, max_steps=STEPS), ckpt_path=resume, weights_only=True)
    return module, trainer


class Recorded(Last):
    """Notes weights, gradients and rates around each pull."""

    def __init__(self, pull: float) -> None:
        super().__init__(pull=pull)
        self.seen: list[tuple[np.ndarray, np.ndarray, float]] = []

    def after_step(self, model: M2Encoder, optimizer: torch.optim.Optimizer) -> None:
        before = model.vl_image_proj.weight.detach().numpy().copy()
        super().after_step(model, optimizer)
        rate = next(
            g["lr"] for g in optimizer.param_groups if any(p is model.vl_image_proj.weight for p in g["params"])
        )
        self.seen.append((before, model.vl_image_proj.weight.detach().numpy().copy(), rate))


def test_the_pull_follows_its_formula_after_each_step(emoji_folder: Path, tmp_path: Path) -> None:
    adaptation = Recorded(pull=5.0)
    start = random_model(CONFIG)
    module = make_module(
        model=CONFIG,
        initial_state=start.state_dict(),
        adaptation=adaptation,
        optimizer=partial(build_optimizer, lr=3e-2),
        max_steps=STEPS,
    )
    make_trainer(tmp_path, max_steps=STEPS).fit(module, make_datamodule(emoji_folder, max_steps=STEPS))
    begun = start.vl_image_proj.weight.detach().numpy().astype(np.float64)
    assert len(adaptation.seen) == STEPS
    assert len({rate for *_, rate in adaptation.seen}) > 1, "a schedule that moves"
    for before, after, rate in adaptation.seen:
        expected = before - rate * 5.0 * (before.astype(np.float64) - begun)
        np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-7)
        assert np.abs(after - before).max() > 0


def test_nothing_else_moves_and_a_strong_pull_keeps_nearer(emoji_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    begun = random_model(CONFIG).state_dict()
    distances = []
    for pull in (0.0, 10.0):
        module, _ = fit(tmp_path, emoji_folder, pull)
        state = module.model.state_dict()
        moved = {name for name in begun if not torch.equal(begun[name], state[name])}
        heads = {f"{name}.weight" for name in ("image_proj", "text_proj", "vl_image_proj", "vl_text_proj")}
        assert moved == {*heads, "logit_scale", "logit_vl_scale"}
        distances.append(float((state["vl_text_proj.weight"] - begun["vl_text_proj.weight"]).norm()))
    assert distances[1] < 0.8 * distances[0]


def test_resumed_equals_uninterrupted_to_the_bit(emoji_folder: Path, tmp_path: Path) -> None:
    whole, _ = fit(tmp_path / "whole", emoji_folder, 2.0)
    fit(tmp_path / "half", emoji_folder, 2.0, steps=2, every=2)
    resumed, _ = fit(
        tmp_path / "rest", emoji_folder, 2.0, every=2, resume=tmp_path / "half" / "checkpoints" / "last.ckpt"
    )
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("pull", [0.0, 1.0])
def test_merging_forgets_the_starts_alone(pull: float) -> None:
    model, adaptation = random_model(CONFIG), Last(pull=pull)
    adaptation.apply(model)
    images = random_images(CONFIG, 2)
    with torch.no_grad():
        model.vl_image_proj.weight.add_(0.1)
        before = model.encode_image(images)
        merged = merge_adaptation(adaptation, model)
        assert torch.equal(merged.encode_image(images), before)
    assert type(merged.vl_image_proj) is torch.nn.Linear
