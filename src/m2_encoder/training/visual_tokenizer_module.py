"""The LightningModule that trains a visual tokenizer on the images of a data module."""

from __future__ import annotations

from typing import Annotated, Any

import lightning
import torch
from annotated_types import Ge, Le, Lt
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from m2_encoder.bounds import Count, NotNegative, check_bounds
from m2_encoder.evaluation.reconstruction import Reconstruction, ReconstructionMeter, perplexity, psnr
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.training.optim import OptimizerFactory, SchedulerFactory
from m2_encoder.types import ImageTextBatch, RetrievalBatch


class VisualTokenizerModule(lightning.LightningModule):
    """Trains a `VisualTokenizer`: squared distance of pixels, and of vectors to their codes.

    The shape is that of `VisualTokenizerConfig`.

    Args:
        commitment_weight: of the distance of vectors to their codes.
        decay: see `Codebook.follow`.
        restart_below: see `Codebook.follow`.
        validation_name: name of the validation set in metric names.
    """

    @check_bounds
    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        num_codes: Annotated[int, Ge(2), Le(2**24)] = 8192,
        code_dim: Annotated[Count, Le(2**16)] = 32,
        embed_dim: Annotated[Count, Le(2**16)] = 128,
        num_heads: Annotated[Count, Le(2**12)] = 4,
        num_layers: Annotated[Count, Le(2**10)] = 2,
        num_decoder_layers: Annotated[Count, Le(2**10)] = 2,
        commitment_weight: NotNegative = 1.0,
        decay: Annotated[float, Ge(0), Lt(1)] = 0.99,
        restart_below: Annotated[float, Ge(0), Lt(1)] = 0.03,
        validation_name: str = "val",
    ) -> None:
        super().__init__()
        config = VisualTokenizerConfig(
            image_size=image_size,
            patch_size=patch_size,
            num_codes=num_codes,
            code_dim=code_dim,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            num_decoder_layers=num_decoder_layers,
        )
        self.tokenizer = VisualTokenizer(config)
        self._build_optimizer, self._build_scheduler = optimizer, scheduler
        self._commitment_weight, self._decay, self._restart_below = commitment_weight, decay, restart_below
        self.validation_name = validation_name
        self._meter = ReconstructionMeter(num_codes)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer, and its schedule by step; codes are no parameters."""
        optimizer = self._build_optimizer(self)
        schedule = LRSchedulerConfigType(scheduler=self._build_scheduler(optimizer), interval="step")
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=schedule)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Loss of one batch; also moves the codes."""
        found = self.tokenizer(batch.images)
        true = self.tokenizer.to_unit(batch.images)
        reconstruction = functional.mse_loss(found.images, true)
        loss = reconstruction + self._commitment_weight * found.commitment
        restarted = self.tokenizer.codebook.follow(
            found.vectors, found.codes, decay=self._decay, restart_below=self._restart_below
        )
        counts = torch.bincount(found.codes.flatten(), minlength=self.tokenizer.num_codes)
        self.log("step", torch.tensor(float(self.global_step + 1), dtype=torch.float64))
        self.log("train/loss/reconstruction", reconstruction.detach())
        self.log("train/loss/commitment", found.commitment.detach())
        self.log("train/loss/total", loss.detach(), prog_bar=True)
        self.log("train/psnr", psnr(true, found.images.detach().clamp(0, 1)).mean())
        self.log("train/codes/perplexity", perplexity(counts))
        self.log("train/codes/restarted", float(restarted))
        return loss

    def validation_step(self, batch: RetrievalBatch, batch_idx: int) -> None:
        """Measure the reconstruction of one batch of the validation set."""
        images = batch.images[: len(batch.identity)]
        if not len(images):
            return
        codes = self.tokenizer.encode(images)
        self._meter.add(self.tokenizer.to_unit(images), self.tokenizer.decode(codes), codes)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the reconstruction."""
        self.log("step", torch.tensor(float(self.global_step), dtype=torch.float64))
        for name, value in self._meter.compute()._asdict().items():
            self.log(f"val/{self.validation_name}/{name}", float(value))
        self._meter = ReconstructionMeter(self.tokenizer.num_codes)

    def validation_metrics(self) -> list[str]:
        """Names of all that a validation logs."""
        return [f"val/{self.validation_name}/{name}" for name in Reconstruction._fields]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the shape, which loading the weights needs."""
        checkpoint["visual_tokenizer"] = self.tokenizer.config.to_dict()
