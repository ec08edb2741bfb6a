"""Whole Lightning runs with groups and micro-batches end where plain SGD on the formula ends, rank rows and all.

The reference knows the encoder alone: it encodes every rank's pieces in one process with the ranks' random numbers,
takes the loss from the formula, clips by hand and steps by hand.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.plain_contrastive import world_loss
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS, LR, CLIP = 3, 0.5, 0.05
LAYERS, DROP = 2, 0.3


class Setting(NamedTuple):
    """One run; `rows` are those of a rank in one step."""

    strategy: str
    world_size: int
    group_size: int
    micro_batches: int
    precision: str = "64-true"
    recompute: bool = True
    activation_checkpointing: bool = False
    heads: tuple[str, ...] = ("features",)
    rows: int = 4
    drop: float = DROP


class SeedSteps(Callback):
    """Random numbers of a step belong to rank and step, so that one process can draw the same."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(trainer.global_rank, batch_idx))


class Norms(Callback):
    """Norms of the gradient before clipping, and the loss that is logged, by step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))
        self.losses.append(float(trainer.callback_metrics["train/loss/itc"]))


def seed_of(rank: int, step: int) -> int:
    return 100 * step + rank


def rank_batch(setting: Setting, rank: int, step: int) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(10 + seed_of(rank, step))
    rows = setting.rows
    lengths = torch.randint(2, 9, (rows, 1), generator=generator)
    return ImageTextBatch(
        images=torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8),
        text=TextTokens(torch.randint(5, 90, (rows, 8), generator=generator), torch.arange(8) < lengths),
        language=torch.arange(rows) % 2,
        identity=torch.randint(0, 5, (rows,), generator=generator),
        keys=("row",) * rows,
        sources=("test",) * rows,
    )


def build_strategy(setting: Setting) -> dict[str, Any]:
    options = {
        "micro_batches": setting.micro_batches,
        "recompute": setting.recompute,
        "activation_checkpointing": setting.activation_checkpointing,
    }
    if setting.strategy == "single":
        return {"strategy": LocalStrategy("cpu", **options)}
    kind = {"ddp": GroupedDDPStrategy, "fsdp": GroupedFSDPStrategy}[setting.strategy]
    strategy = kind(group_size=setting.group_size, **options)
    return {"strategy": strategy, "devices": setting.world_size, "plugins": [LightningEnvironment()]}


def train(rank: int, setting: Setting, folder: str) -> dict[str, Any]:
    """A run of a rank; its weights, gradient norms and logged losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.seed_everything(6, verbose=False)
        norms = Norms()
        module = make_module(
            model=tiny_config(num_layers=LAYERS, drop_path_rate=setting.drop),
            max_steps=STEPS,
            objectives={"itc": ImageTextContrastive(heads=setting.heads)},
            optimizer=lambda module: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        )
        trainer = make_trainer(
            Path(folder),
            max_steps=STEPS,
            callbacks=[SeedSteps(), norms],
            precision=setting.precision,
            gradient_clip_val=CLIP,
            **build_strategy(setting),
        )
        batches: Any = [rank_batch(setting, rank, step) for step in range(STEPS)]
        trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    weights = {name: whole_tensor(p.detach()).double().numpy() for name, p in module.model.named_parameters()}
    return {"weights": weights, "norms": norms.norms, "losses": norms.losses}


def train_many(rank: int, settings: list[Setting], folder: str) -> list[dict[str, Any]]:
    return [train(rank, setting, f"{folder}/{place}") for place, setting in enumerate(settings)]


def train_by_hand(setting: Setting) -> dict[str, Any]:
    """SGD on the mean of the ranks' losses, all rows in one process."""
    dtype = torch.float64 if setting.precision == "64-true" else torch.float32
    lightning.seed_everything(6, verbose=False)
    with torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = M2Encoder(tiny_config(num_layers=LAYERS, drop_path_rate=setting.drop)).train()
        torch.set_default_dtype(default)
    model.freeze_parts(OPTIONAL_PARTS.keys() - set(setting.heads))
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms, losses = [], []
    for step in range(STEPS):
        loss = loss_by_hand(model, setting, step)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= LR * gradient * min(1.0, CLIP / (float(norm) + 1e-6))
        norms.append(float(norm))
        losses.append(loss.item())
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    return {"weights": weights, "norms": norms, "losses": losses}


def loss_by_hand(model: M2Encoder, setting: Setting, step: int) -> Tensor:
    sides: dict[str, list[list[Tensor]]] = {side: [[] for _ in setting.heads] for side in ("image", "text")}
    identity = []
    mixed = torch.autocast("cpu", torch.bfloat16) if setting.precision == "bf16-mixed" else contextlib.nullcontext()
    for rank in range(setting.world_size):
        torch.manual_seed(seed_of(rank, step))
        batch = rank_batch(setting, rank, step)
        identity.append(batch.identity)
        texts = zip(*(part.chunk(setting.micro_batches) for part in batch.text), strict=True)
        pieces = {"image": batch.images.chunk(setting.micro_batches), "text": [TextTokens(*text) for text in texts]}
        for side, heads in sides.items():
            with mixed:
                encoded = [getattr(model, f"encode_{side}_heads")(piece) for piece in pieces[side]]
            for name, features in zip(setting.heads, heads, strict=True):
                features.append(torch.cat([getattr(given, name) for given in encoded]).to(model.logit_scale.dtype))
    scales = {"features": model.logit_scale, "backbone_features": model.logit_vl_scale}
    losses = [
        world_loss(image, text, scales[name], group_size=setting.group_size, identity=identity)
        for name, image, text in zip(setting.heads, sides["image"], sides["text"], strict=True)
    ]
    return torch.stack(losses).mean()


BOTH = ("features", "backbone_features")


def check(results: list[dict[str, Any]], setting: Setting, *, rtol: float) -> None:
    expected = train_by_hand(setting)
    assert min(expected["norms"]) > 2 * CLIP, "nothing was clipped"
    moved = max(np.abs(w - v).max() for w, v in zip(expected["weights"].values(), start(setting), strict=True))
    for result in results:
        assert result["norms"] == pytest.approx(expected["norms"], rel=max(rtol, 1e-6))  # logged in fp32
        assert result["losses"] == pytest.approx(expected["losses"], rel=max(rtol, 1e-6))
        for name, weights in expected["weights"].items():
            np.testing.assert_allclose(
                result["weights"][name], weights, rtol=0, atol=rtol * moved, err_msg=f"{setting} {name}"
            )


def start(setting: Setting) -> list[Any]:
    lightning.seed_everything(6, verbose=False)
    model = M2Encoder(tiny_config(num_layers=LAYERS, drop_path_rate=setting.drop))
    return [parameter.detach().double().numpy() for parameter in model.parameters()]


# Lightning's FSDP2 has no fp64; `test_grouped_encoder` compares it there, without Lightning.
TWO = [
    Setting("ddp", 2, 1, 2),
    Setting("ddp", 2, 2, 4, heads=BOTH, recompute=False),
    Setting("ddp", 2, 2, 1, activation_checkpointing=True),
    Setting("ddp", 2, 2, 2, precision="32-true"),
    Setting("fsdp", 2, 1, 2, precision="32-true", activation_checkpointing=True),
    Setting("fsdp", 2, 2, 4, precision="32-true", heads=BOTH),
    Setting("fsdp", 2, 2, 2, precision="32-true", recompute=False),
]
FOUR = [
    Setting("ddp", 4, 2, 2),
    Setting("ddp", 4, 4, 1),
    Setting("fsdp", 4, 2, 2, precision="32-true"),
    Setting("fsdp", 4, 1, 4, precision="32-true", recompute=False),
]
RTOL = {"64-true": 1e-11, "32-true": 1e-4}  # of the farthest that a weight went; fp32 weights of 1 are rounded to 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TWO, FOUR], ids=["two-ranks", "four-ranks"])
def test_runs_over_ranks_end_where_the_formula_ends(settings: list[Setting], tmp_path: Path) -> None:
    world_size = settings[0].world_size
    results = run_lightning_ranks(train_many, world_size, settings, str(tmp_path))
    for place, setting in enumerate(settings):
        check([rank[place] for rank in results], setting, rtol=RTOL[setting.precision])


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_run_of_one_process_ends_where_the_formula_ends(micro_batches: int, recompute: bool, tmp_path: Path) -> None:
    setting = Setting("single", 1, 1, micro_batches, recompute=recompute, heads=BOTH)
    check([train(0, setting, str(tmp_path))], setting, rtol=RTOL["64-true"])


def test_without_random_numbers_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole = train(0, Setting("single", 1, 1, 1, drop=0.0), str(tmp_path / "whole"))
    pieces = train(0, Setting("single", 1, 1, 4, drop=0.0), str(tmp_path / "pieces"))
    assert pieces["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    for name, weights in whole["weights"].items():
        np.testing.assert_allclose(pieces["weights"][name], weights, rtol=0, atol=1e-12, err_msg=name)


def test_mixed_precision_is_replayed_to_the_bit_and_near_the_formula(tmp_path: Path) -> None:
    """bf16 autocast is on in Lightning's forward and off in its backward; a replay must not run in fp32."""
    setting = Setting("single", 1, 1, 4, precision="bf16-mixed")
    replayed = train(0, setting, str(tmp_path / "replayed"))
    kept = train(0, setting._replace(recompute=False), str(tmp_path / "kept"))
    assert replayed["losses"] == kept["losses"]
    assert replayed["norms"] == kept["norms"]
    assert all(np.array_equal(weights, kept["weights"][name]) for name, weights in replayed["weights"].items())
    expected = train_by_hand(setting)
    assert replayed["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-3)
    assert replayed["losses"] == pytest.approx(expected["losses"], rel=1e-2)  # steps enlarge what rounding began
    assert replayed["norms"] == pytest.approx(expected["norms"], rel=5e-2)
    exact = train_by_hand(setting._replace(precision="32-true"))
    assert replayed["losses"] != pytest.approx(exact["losses"], rel=1e-6), "nothing ran in bf16"
