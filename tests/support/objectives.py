"""Objectives in the real training module without a Trainer: on one process, or on ranks that average gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import FeaturePair, Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.module import PretrainModule
from m2_encoder.training.optim import build_optimizer, warmup_cosine
from m2_encoder.training.step import split_rows
from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens
from tests.support.models import small_config

Numbers = dict[str, npt.NDArray[np.float64]]

LENGTH = 9
CONFIG = small_config(num_layers=1, num_vl_layers=1)


class Topology(NamedTuple):
    """As `ContrastiveTopology`."""

    contrastive_group: dist.ProcessGroup | None = None
    micro_batches: int = 1
    recompute: bool = True


class Bench(PretrainModule):
    """The training module with a topology of the test's."""

    topology = Topology()

    def _topology(self) -> Any:
        return self.topology

    def evaluate(self, batch: ImageTextBatch) -> dict[str, ObjectiveOutput]:
        """What every objective says of a batch."""
        return self._evaluate(batch, self.trained_objectives())


def build_bench(
    objectives: Mapping[str, Objective],
    *,
    config: M2EncoderConfig = CONFIG,
    adaptation: Adaptation | None = None,
    **topology: Any,
) -> Bench:
    """In fp64, with every parameter random, the same on every rank."""
    torch.manual_seed(3)
    module = Bench(
        model=config,
        objectives=objectives,
        adaptation=adaptation,
        optimizer=partial(build_optimizer, lr=1e-3),
        scheduler=partial(warmup_cosine, warmup_steps=1, max_steps=2),
    )
    module.configure_model()
    module.double()
    module.topology = Topology(**topology)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
                parameter.add_(float("norm" in name and name.endswith("weight")))
        module.model.logit_scale.fill_(2.0)
        module.model.logit_vl_scale.fill_(1.5)
    return module


def make_batch(rows: int, captions: int, *, seed: int = 1, config: M2EncoderConfig = CONFIG) -> ImageTextBatch:
    """Random pairs; some content comes twice, captions differ in length, and those of the second half hide no word."""
    generator = torch.Generator().manual_seed(seed)
    texts, side = rows * captions, config.image_size
    lengths = torch.randint(3, LENGTH + 1, (texts, 1), generator=generator)
    images = torch.rand((rows, 3, side, side), generator=generator, dtype=torch.float64)
    text = TextTokens(
        torch.randint(5, config.vocab_size, (texts, LENGTH), generator=generator), torch.arange(LENGTH) < lengths
    )
    predicted = text.mask & (torch.rand(text.mask.shape, generator=generator) < 0.5)
    predicted[texts // 2 :] = False
    return ImageTextBatch(
        images=images,
        text=text,
        language=torch.arange(texts) % 2,
        identity=torch.tensor([0, 1, 0, 2, 3, 1, 4, 5] * rows)[:rows],
        keys=tuple(map(str, range(rows))),
        sources=("test",) * rows,
        masked_text=MaskedText(text.ids.masked_fill(predicted, 4), predicted),
        patch_mask=torch.rand((rows, (side // config.patch_size) ** 2), generator=generator) < 0.4,
    )


def take_numbers(module: Bench, batch: ImageTextBatch) -> Numbers:
    """Losses by `loss/<objective>` and gradients by parameter, means over ranks as DDP takes them."""
    outputs = module.evaluate(batch)
    total = torch.stack([output.loss for output in outputs.values()]).sum()
    total.backward()
    found = {f"loss/{name}": output.loss.detach() for name, output in outputs.items()}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for value in found.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return {name: value.numpy().copy() for name, value in found.items()}


def part_of(batch: ImageTextBatch, rank: int, ranks: int) -> ImageTextBatch:
    """A rank's rows."""
    return split_rows(batch, ranks)[rank]


def draw_inputs(rows: int, captions: int, *, width: int = 6, seed: int = 2) -> ObjectiveInputs:
    """Random normalised features in fp64 that want gradients, in one process; some content comes twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        raw = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return nn.functional.normalize(raw, dim=1).requires_grad_()

    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    identity = torch.tensor([7, 2, 7, 1, 4, 2, 9, 5] * rows)[:rows]
    return ObjectiveInputs(
        {"features": FeaturePair(draw(rows), draw(rows * captions), scale)}, identity, None, make_batch(rows, captions)
    )


def leaves(inputs: ObjectiveInputs) -> list[Tensor]:
    """What gradients are asked for: image features, text features, log of the scale."""
    return [inputs.image_features, inputs.text_features, inputs.logit_scale]
