"""The training module in real Lightning runs: skipped steps, the temperature, frozen parts, what is logged."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.objectives.base import FeaturePair, Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.non_finite import NonFiniteError
from m2_encoder.training.optim import OptimizerFactory, build_muon, build_optimizer
from m2_encoder.types import LANGUAGES
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Poison(Callback):
    """Makes the loss or one gradient of some steps not finite."""

    def __init__(self, steps: set[int], how: str) -> None:
        self.steps, self.how = steps, how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.how == "weights" and trainer.global_step in self.steps:
            self.saved = pl_module.model.vl_image_proj.weight.detach().clone()
            pl_module.model.vl_image_proj.weight.data.fill_(math.nan)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step not in self.steps:
            return
        if self.how == "weights":  # the loss was not finite; the weight itself is mended
            pl_module.model.vl_image_proj.weight.data.copy_(self.saved)
        else:
            pl_module.model.text_embed.tokens.weight.grad[5, 2] = float(self.how)


class Watch(Callback):
    """Parameters and optimizer state after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Any]] = []
        self.rates: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.weights.append(copy.deepcopy(pl_module.model.state_dict()))
        state = trainer.optimizers[0].state_dict()
        parts = [state] if "state" in state else list(state.values())  # Muon's and AdamW's
        self.states.append({index: copy.deepcopy(part["state"]) for index, part in enumerate(parts)})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) else one == other


def fit(
    emoji_folder: Path, folder: Path, *callbacks: Callback, max_steps: int = 4, **module: Any
) -> tuple[PretrainModule, list[dict[str, Any]]]:
    lightning.seed_everything(1, verbose=False)
    built = make_module(max_steps=max_steps, **module)
    trainer = make_trainer(
        folder, max_steps=max_steps, callbacks=callbacks, loggers=[JsonlLogger(folder / "metrics.jsonl")]
    )
    trainer.fit(built, datamodule=make_datamodule(emoji_folder, max_steps=max_steps))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return built, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("how", "build"),
    [
        ("weights", partial(build_optimizer, lr=1e-3)),
        ("nan", partial(build_optimizer, lr=1e-3)),
        ("inf", partial(build_muon, lr=1e-3, matrix_lr=1e-3)),
    ],
    ids=["loss", "gradient", "gradient-muon"],
)
def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(
    emoji_folder: Path, tmp_path: Path, how: str, build: OptimizerFactory
) -> None:
    watch = Watch()
    module, records = fit(emoji_folder, tmp_path, Poison({1}, how), watch, max_steps=4, optimizer=build)
    assert is_same(watch.weights[1], watch.weights[0]), "the step was taken"
    assert is_same(watch.states[1], watch.states[0]), "moments or counters of the optimizer moved"
    assert all(watch.states[0].values()), "no optimizer state: nothing was tested"
    assert not is_same(watch.weights[2], watch.weights[1])
    assert all(value.isfinite().all() for value in watch.weights[3].values())
    assert [record["train/skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    # A value that is not finite is left out; in no case that of an earlier step stands there again.
    assert ["train/grad_norm" in record for record in records] == [True, False, True, True]
    assert ("train/loss/itc" in records[1]) == (how != "weights")
    assert (module.non_finite.total, module.non_finite.in_a_row) == (1, 0)
    assert watch.rates == pytest.approx([1e-3, 1e-3, 5e-4, 0]), "the schedule goes on by steps"


def test_too_many_in_a_row_end_the_run_with_the_diagnosis(emoji_folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(NonFiniteError) as caught:
        fit(emoji_folder, tmp_path, Poison({1, 2, 3}, "weights"), watch, max_steps=8, max_skipped_in_a_row=3)
    message = str(caught.value)
    for words in ("3 steps in a row", "step 4", "itc=nan", "model.logit_scale", "and 70 more"):
        assert words in message, message
    assert "itc_zh" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert is_same(watch.weights[2], watch.weights[0])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3, "what was logged is on the disk"


@pytest.mark.parametrize(("start", "lr", "expected"), [(4.6, 0.5, math.log(100)), (0.001, 0.5, 0.0)])
def test_the_temperature_stays_in_its_bounds(
    emoji_folder: Path, tmp_path: Path, start: float, lr: float, expected: float
) -> None:
    class Push(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.logit_scale.data.fill_(start)

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.logit_scale.grad.fill_(-1.0 if expected else 1.0)

    watch = Watch()  # a callback, as checkpoints are: it must not see the scale before it is clamped
    fit(emoji_folder, tmp_path, Push(), watch, max_steps=3, lr=lr)
    assert [float(w["logit_scale"]) for w in watch.weights] == pytest.approx([expected] * 3)


def test_no_trainable_parameter_is_left_without_a_gradient(emoji_folder: Path, tmp_path: Path) -> None:
    class Check(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.trained = {n for n, p in pl_module.named_parameters() if p.requires_grad}
            self.without = [n for n, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
            self.frozen_with = [
                n for n, p in pl_module.named_parameters() if not p.requires_grad and p.grad is not None
            ]

    check = Check()
    module, _ = fit(emoji_folder, tmp_path, check, max_steps=1)
    assert check.without == []
    assert check.frozen_with == []
    frozen = {f"model.{name}" for name, p in module.model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {
        "image_proj", "text_proj", "logit_vl_scale", "image_embed", "vl_encoder", "pooler", "norm",
    }  # fmt: skip
    assert not frozen & check.trained


class Extra(Objective):
    """An objective with a parameter of its own, that trains an optional part."""

    optional_parts = frozenset({"backbone_features"})

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        rows = (inputs.image_features.float().mean(dim=1) - self.bias - 1) ** 2
        return ObjectiveOutput(rows.mean(), rows.detach())


def test_objectives_are_weighted_and_those_without_weight_left_out(emoji_folder: Path, tmp_path: Path) -> None:
    objectives = {"itc": ImageTextContrastive(weight=0.5), "extra": Extra(weight=2.0), "off": Extra(weight=0.0)}
    module, records = fit(emoji_folder, tmp_path, max_steps=2, objectives=objectives)
    for record in records:
        expected = 0.5 * record["train/loss/itc"] + 2 * record["train/loss/extra"]
        assert record["train/loss/total"] == pytest.approx(expected, rel=1e-6)
        assert not any("off" in name for name in record)
    extra = module.objectives["extra"]
    assert isinstance(extra, Extra)
    assert extra.bias.item() != 0, "a parameter of an objective was not trained"
    assert module.model.image_proj.weight.requires_grad, "a part that an objective names was frozen"
    assert not module.model.pooler.weight.requires_grad


def test_losses_and_shares_by_language_are_those_of_their_rows(emoji_folder: Path, tmp_path: Path) -> None:
    expected: list[dict[str, float]] = []
    spoken: list[list[float]] = []

    class Recompute(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch.language[:3].fill_(0)  # uneven shares
            model = pl_module.model
            inputs = ObjectiveInputs(
                {
                    "features": FeaturePair(
                        model.encode_image(batch.images), model.encode_text(batch.text), model.logit_scale
                    )
                },
                batch.identity,
                None,
            )
            rows = ImageTextContrastive()(inputs).per_sample
            values = {"itc": float(rows.mean())}
            for index, code in enumerate(LANGUAGES):
                values[f"itc_{code}"] = float(rows[batch.language == index].mean())
            expected.append(values)
            spoken.append([float((batch.language == index).float().mean()) for index in range(len(LANGUAGES))])

    _, records = fit(emoji_folder, tmp_path, Recompute(), max_steps=3)
    for record, values in zip(records, expected, strict=True):
        for name, value in values.items():
            assert record[f"train/loss/{name}"] == pytest.approx(value, rel=1e-5), name
        assert record["train/loss/itc_zh"] != record["train/loss/itc_en"]
    shares = [[record[f"data/share/{code}"] for code in LANGUAGES] for record in records]
    assert shares == [pytest.approx(parts) for parts in spoken]


def one_language_at(step: int, index: int) -> type[Callback]:
    class OneLanguage(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == step:
                batch.language.fill_(index)

    return OneLanguage


def test_a_language_without_rows_repeats_no_earlier_value(emoji_folder: Path, tmp_path: Path) -> None:
    zh = LANGUAGES.index("zh")
    _, records = fit(emoji_folder, tmp_path, one_language_at(1, zh)(), max_steps=3)
    assert ["train/loss/itc_en" in record for record in records] == [True, False, True]
    assert records[1]["train/loss/itc_zh"] == pytest.approx(records[1]["train/loss/itc"], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(emoji_folder: Path, tmp_path: Path, precision: Any) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=2, precision=precision, loggers=[JsonlLogger(tmp_path / "m.jsonl")], limit_val_batches=1,
        val_check_interval=2,
    )  # fmt: skip
    trainer.fit(make_module(), datamodule=make_datamodule(emoji_folder, max_steps=2, eval_batch_size=64))
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert all(0 < record["train/loss/itc"] < 10 for record in records)
    assert records[-1]["val/emoji_val_zh/mean_recall"] >= 0


def test_the_initial_state_is_what_training_starts_from() -> None:
    source = make_module()
    source.configure_model()
    state = {name: value.clone() for name, value in source.model.state_dict().items()}
    module = make_module(initial_state=state)
    module.configure_model()
    assert is_same(dict(module.model.state_dict()), state)
    model = module.model
    module.configure_model()
    assert module.model is model, "Lightning calls this more than once"


def test_unused_parts_are_frozen_when_the_model_is_built() -> None:
    module = make_module()
    module.configure_model()
    trainable = {name for name, p in module.model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in module.model.named_parameters()}
    reference = make_module()
    reference.configure_model()
    reference.model.requires_grad_(True)
    reference.model.freeze_parts(OPTIONAL_PARTS.keys() - {"features"})
    assert trainable == {name for name, p in reference.model.named_parameters() if p.requires_grad} < everything


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_module(objectives={}), "at least one needs a weight"),
        (lambda: make_module(objectives={"itc": ImageTextContrastive(weight=0)}), "objectives itc: at least one"),
        (lambda: make_module(max_logit_scale=0.5), "max_logit_scale=0.5"),
        (lambda: make_module(max_logit_scale=math.nan), "max_logit_scale=nan"),
        (lambda: make_module(max_skipped_in_a_row=0), "max_skipped_in_a_row=0"),
        (
            lambda: make_module(
                objectives={
                    "off": Captioning(weight=0),
                    "itc": ImageTextContrastive(),
                    "cmlm": MaskedLanguage(text_expert=True),
                    "captioning": Captioning(),
                }
            ),
            "^objectives captioning: text_expert=False must be that of cmlm, True: they share .*use text_expert=True$",
        ),
    ],
)
def test_impossible_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(("limit", "algorithm"), [(0.01, "norm"), (0.001, "value"), (None, "norm")])
def test_gradients_are_clipped(emoji_folder: Path, tmp_path: Path, limit: float | None, algorithm: str) -> None:
    class Norm(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                self.norm = float(torch.stack([g.norm() for g in grads]).norm())
                self.largest = max(float(g.abs().max()) for g in grads)

    norm = Norm()
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    clip = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[norm], loggers=[logger], **clip)
    trainer.fit(make_module(), datamodule=make_datamodule(emoji_folder, max_steps=2))
    logged = json.loads(logger.path.read_text().splitlines()[0])["train/grad_norm"]
    assert logged > 0.05, "the norm that is logged is the one before clipping"
    if algorithm == "value":
        assert norm.largest == pytest.approx(limit)
    else:
        assert norm.norm == pytest.approx(limit if limit else logged, rel=1e-3)


def test_the_local_strategy_has_no_group() -> None:
    assert LocalStrategy("cpu").contrastive_group is None
    assert LocalStrategy("cpu").root_device.type == "cpu"
    assert tiny_config().image_size == 16
