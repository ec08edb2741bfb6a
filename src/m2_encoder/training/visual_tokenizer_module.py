"""The LightningModule that trains a visual tokenizer on the images of a data module; captions are left aside."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import lightning
import torch
from annotated_types import Ge, Lt
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from m2_encoder.bounds import Count, NotNegative, check_bounds
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.training.optim import OptimizerFactory, SchedulerFactory
from m2_encoder.types import ImageTextBatch, RetrievalBatch


class Reconstruction(NamedTuple):
    """How well images survive their codes.

    Attributes:
        psnr: mean over images of the peak signal-to-noise ratio, dB.
        perplexity: exp of the entropy of the codes: as many equally frequent codes would be as varied.
        codes_used: how many codes occur.
    """

    psnr: float
    perplexity: float
    codes_used: int


class ReconstructionMeter:
    """Adds batches up to a `Reconstruction`.

    Args:
        num_codes: K.
    """

    def __init__(self, num_codes: int) -> None:
        self._counts = torch.zeros(num_codes)
        self._psnr, self._images = 0.0, 0

    def add(self, true: Tensor, drawn: Tensor, codes: Tensor) -> None:
        """Take a batch: images in 0..1 as they are and as given back, (B, 3, S, S), and their codes, (B, N)."""
        self._psnr += float(psnr(true, drawn).sum())
        self._images += len(true)
        self._counts += torch.bincount(codes.flatten().cpu(), minlength=len(self._counts))

    def compute(self) -> Reconstruction:
        """What all batches give; zeros without any."""
        return Reconstruction(
            self._psnr / max(1, self._images), perplexity(self._counts), int((self._counts > 0).sum())
        )


class VisualTokenizerModule(lightning.LightningModule):
    """Trains a `VisualTokenizer`: squared distance of pixels, and of vectors to their codes.

    Args:
        image_size: side of the images, pixels.
        patch_size: side of a patch, pixels.
        optimizer: builds the optimizer from a module.
        scheduler: builds the per-step schedule from the optimizer.
        num_codes: rows of the codebook.
        code_dim: width of a code.
        embed_dim: width of the layers.
        num_heads: attention heads of a layer.
        num_layers: of the encoder.
        num_decoder_layers: of the decoder.
        commitment_weight: of the distance of vectors to their codes.
        decay: share of the past in the moving means of the codes.
        restart_below: codes chosen less often than this share of the mean start again.
        validation_name: name of the validation set in metric names.

    Raises:
        UserError: for a number that makes no sense.
    """

    @check_bounds
    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        num_codes: Annotated[int, Ge(2)] = 8192,
        code_dim: Count = 32,
        embed_dim: Count = 128,
        num_heads: Count = 4,
        num_layers: Count = 2,
        num_decoder_layers: Count = 2,
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
        self._validation_name = validation_name
        self._meter = ReconstructionMeter(num_codes)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimizer over what is trainable, which the codes are not, and its schedule per step."""
        optimizer = self._build_optimizer(self)
        schedule = LRSchedulerConfigType(scheduler=self._build_scheduler(optimizer), interval="step")
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=schedule)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Loss of one batch; its codes follow."""
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
        """Measure a chunk of the validation set."""
        codes = self.tokenizer.encode(batch.images)
        self._meter.add(self.tokenizer.to_unit(batch.images), self.tokenizer.decode(codes), codes)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured."""
        self.log("step", torch.tensor(float(self.global_step), dtype=torch.float64))
        for name, value in self._meter.compute()._asdict().items():
            self.log(f"val/{self._validation_name}/{name}", float(value))
        self._meter = ReconstructionMeter(self.tokenizer.num_codes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the shape, without which nobody could open the weights."""
        checkpoint["visual_tokenizer"] = self.tokenizer.config.to_dict()


def psnr(true: Tensor, drawn: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in 0..1, (B, 3, S, S) to (B,), dB; at most 100, for equal images."""
    error = (true - drawn).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def perplexity(counts: Tensor) -> float:
    """The exponential of the entropy of the shares of counts, (K,); 0 if all are 0."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float((-torch.special.xlogy(shares, shares).sum()).exp()) if bool(counts.any()) else 0.0
