"""The LightningModule: encode, evaluate the objectives, sum, log. What a loss is stands in `m2_encoder.objectives`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from m2_encoder.evaluation.metrics import RetrievalRecall
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import OPTIONAL_PARTS, M2Encoder
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.training.non_finite import NonFiniteGuard
from m2_encoder.training.optim import OptimizerFactory, SchedulerFactory
from m2_encoder.types import LANGUAGES, ContrastiveTopology, ImageTextBatch, RetrievalBatch

logger = logging.getLogger(__name__)


class PretrainModule(lightning.LightningModule):
    """Trains an M2-Encoder on a weighted sum of objectives.

    Args:
        model: architecture; built in `configure_model`, so that a large one can start sharded.
        objectives: by name, in the order of their logs.
        optimizer: builds the optimizer from a module.
        scheduler: builds the per-step schedule from the optimizer.
        initial_state: parameters to start from (fine-tuning), by our names; None starts from `init_weights`.
        max_logit_scale: upper bound of exp(logit_scale), applied after every step (CLIP, arXiv:2103.00020, uses 100).
        max_skipped_in_a_row: steps with a non-finite gradient in a row after which training aborts.
        validation_name: name of the validation set in metric names.
    """

    def __init__(
        self,
        *,
        model: M2EncoderConfig,
        objectives: Mapping[str, Objective],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        initial_state: Mapping[str, Tensor] | None = None,
        max_logit_scale: float = 100.0,
        max_skipped_in_a_row: int = 20,
        validation_name: str = "val",
    ) -> None:
        super().__init__()
        self.config = model
        self.objectives = nn.ModuleDict({name: o for name, o in objectives.items() if o.weight > 0})
        self.validation_recall = nn.ModuleDict({language: RetrievalRecall() for language in LANGUAGES})
        self.non_finite = NonFiniteGuard(max_in_a_row=max_skipped_in_a_row)
        self._build_optimizer, self._build_scheduler = optimizer, scheduler
        self._initial_state = initial_state
        self._max_log_scale = math.log(max_logit_scale)
        self._validation_name = validation_name
        self._last_losses: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Build the encoder on the device and in the precision Lightning wants, once."""
        if hasattr(self, "model"):
            return
        self.model = M2Encoder(self.config)
        if self._initial_state is not None:
            self.model.load_state_dict(self._initial_state)
            self._initial_state = None
        wanted = frozenset().union(*(objective.optional_parts for objective in self._objectives().values()))
        frozen = self.model.freeze_parts(OPTIONAL_PARTS.keys() - wanted)
        logger.info("%s parameters that no objective trains are frozen", f"{frozen:,}")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimizer over what is trainable, and its schedule per step."""
        optimizer = self._build_optimizer(self.model)
        schedule = LRSchedulerConfigType(scheduler=self._build_scheduler(optimizer), interval="step")
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=schedule)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the objectives on one batch."""
        inputs = ObjectiveInputs(
            image_features=self.model.encode_image(batch.images),
            text_features=self.model.encode_text(batch.text),
            logit_scale=self.model.logit_scale,
            identity=batch.identity,
            group=self._contrastive_group(),
        )
        total = inputs.logit_scale.new_zeros(())
        for name, objective in self._objectives().items():
            output: ObjectiveOutput = objective(inputs)
            total = total + objective.weight * output.loss
            self._log_loss(name, output.loss, output.per_sample, batch.language)
        self.log("train/logit_scale", self.model.logit_scale.detach().exp())
        self.log("train/loss/total", total.detach(), prog_bar=True)
        return total

    def on_train_batch_end(self, outputs: Any, batch: ImageTextBatch, batch_idx: int) -> None:
        """Keep the temperature in its bounds; publish the counters."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self._max_log_scale)
        self.log("train/skipped_steps", float(self.non_finite.total))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm; a step whose gradient is not finite is skipped and counted."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        if self.non_finite.observe(
            norm, step=self.global_step, losses=self._last_losses, parameters=self.model.named_parameters()
        ):
            optimizer.zero_grad(set_to_none=True)  # an optimizer leaves parameters without a gradient alone
        else:
            self.log("train/grad_norm", norm)

    def validation_step(self, batch: RetrievalBatch, batch_idx: int) -> None:
        """Encode a chunk of the validation set in every language."""
        image_features = self.model.encode_image(batch.images)
        for language, text in batch.texts.items():
            recall = self._recall(language)
            recall.update(image_features, batch.identity, self.model.encode_text(text), batch.identity)

    def on_validation_epoch_end(self) -> None:
        """Log recalls per language."""
        for language in LANGUAGES:
            recall = self._recall(language)
            for name, value in recall.compute().items():
                if "r@" in name or name == "mean_recall":
                    self.log(f"val/{self._validation_name}_{language}/{name}", value)
            recall.reset()

    def _objectives(self) -> dict[str, Objective]:
        return {name: o for name, o in self.objectives.items() if isinstance(o, Objective)}

    def _recall(self, language: str) -> RetrievalRecall:
        recall = self.validation_recall[language]
        assert isinstance(recall, RetrievalRecall)
        return recall

    def _contrastive_group(self) -> dist.ProcessGroup | None:
        strategy = self.trainer.strategy
        assert isinstance(strategy, ContrastiveTopology), f"{type(strategy).__name__} has no contrastive_group"
        return strategy.contrastive_group

    def _log_loss(self, name: str, loss: Tensor, per_sample: Tensor, language: Tensor) -> None:
        self._last_losses[name] = loss.detach()
        self.log(f"train/loss/{name}", loss.detach(), sync_dist=self.trainer.world_size > 1)
        for index, code in enumerate(LANGUAGES):
            rows = per_sample[language == index]
            if len(rows):
                self.log(f"train/loss/{name}_{code}", rows.mean(), batch_size=len(rows))
