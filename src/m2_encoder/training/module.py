"""The LightningModule that trains an encoder: runs the objectives on a batch, sums their losses, and logs them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import lightning
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from m2_encoder.distributed.gradients import clip_gradients
from m2_encoder.errors import UserError, in_one_line
from m2_encoder.evaluation.metrics import RECALL_KS
from m2_encoder.evaluation.recall_metric import RetrievalRecall
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import compile_layers
from m2_encoder.models.trainable_parts import PARTS
from m2_encoder.models.two_towers import Encoder, TowersConfig, TwoTowers
from m2_encoder.objectives.base import (
    LocalObjective,
    Objective,
    ObjectiveInputs,
    ObjectiveOutput,
    PairObjective,
    active,
)
from m2_encoder.training.adaptation import Adaptation, Full
from m2_encoder.training.non_finite import NonFiniteGuard
from m2_encoder.training.optim import OptimizerFactory, SchedulerFactory, fill_state, key_by_name
from m2_encoder.training.step import StepEncoder, evaluate_pairs, mean_terms
from m2_encoder.training.step_report import report_step
from m2_encoder.types import LANGUAGES, ContrastiveTopology, ImageTextBatch, RetrievalBatch

logger = logging.getLogger(__name__)


@contextmanager
def _refusing(part: str) -> Iterator[None]:
    """What somebody else's part of a run refuses, as the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot be built: {in_one_line(error)}", key=part) from error


class PretrainModule(lightning.LightningModule):
    """Trains an M2-Encoder on a weighted sum of objectives.

    Args:
        model: built in `configure_model`, so that a large one can start sharded; or somebody else's, built.
        objectives: by name, in the order of their logs.
        optimizer: makes the optimizer of this module.
        scheduler: makes the schedule of learning rates by step.
        adaptation: changes the model before training; None trains everything.
        initial_state: parameters to start from (fine-tuning), by our names; None for random ones.
        max_logit_scale: upper bound of exp(logit_scale), applied after every step (CLIP, arXiv:2103.00020, uses 100).
        max_skipped_in_a_row: steps with a non-finite gradient in a row after which training aborts.
        validation_name: name of the validation set in metric names.
        compiled: run the encoder's layers compiled (`torch.compile`).
        tokenizer: what `pack_tokenizer` gives, for checkpoints to say which pieces the token table has; None says
            nothing.

    Raises:
        UserError: if no objective has a weight, local ones differ in `text_expert`, or `max_logit_scale` is below 1.
    """

    reads_micro_batches: ClassVar[bool] = True  # of the strategy

    def __init__(
        self,
        *,
        model: M2EncoderConfig | TwoTowers,
        objectives: Mapping[str, Objective],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        adaptation: Adaptation | None = None,
        initial_state: Mapping[str, Tensor] | None = None,
        max_logit_scale: float = 100.0,
        max_skipped_in_a_row: int = 20,
        validation_name: str = "val",
        compiled: bool = False,
        tokenizer: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not active(objectives):
            raise UserError(f"objectives {', '.join(objectives) or 'none'}: at least one needs a weight above 0")
        if not 1 <= max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale={max_logit_scale!r} must be 1 or more")
        self._given = (model,)  # no sub-module yet
        self.config: M2EncoderConfig | TowersConfig = model.config if isinstance(model, TwoTowers) else model
        self.adaptation = adaptation or Full()
        self.objectives = nn.ModuleDict(active(objectives))
        _check_shared_pass(self.trained_objectives())
        self.validation_recall = nn.ModuleDict({language: RetrievalRecall() for language in LANGUAGES})
        self.non_finite = NonFiniteGuard(max_in_a_row=max_skipped_in_a_row)
        self._build_optimizer, self._build_scheduler = optimizer, scheduler
        self._initial_state = initial_state
        self._max_log_scale = math.log(max_logit_scale)
        self.validation_name = validation_name
        self._compiled = compiled
        self._tokenizer = tokenizer
        self._last_losses: dict[str, Tensor] = {}
        self._paused: list[nn.Parameter] = []  # trained only by objectives that are paused in this step

    def initial_temperature(self) -> float | None:
        """1 / exp(logit_scale) of the weights that training starts from; None without any, and once it has started."""
        scale = (self._initial_state or {}).get("logit_scale")
        return None if scale is None else math.exp(-float(scale))

    def build_unfilled(self) -> Encoder:
        """The adapted model, of whose parameters names and shapes are right; what is to be trained stays as it is."""
        (given,) = self._given
        is_foreign = isinstance(given, TwoTowers)  # and may look into its tensors
        with torch.device("cpu" if is_foreign else "meta"):
            model: Encoder = given.build_again() if isinstance(given, TwoTowers) else M2Encoder(given)
            self.adaptation.apply(cast("M2Encoder", model))
        return model

    def configure_model(self) -> None:
        """Build, adapt, freeze and shard the encoder, once. Lightning calls this with its device and precision set."""
        if hasattr(self, "model"):
            return
        (given,) = self._given
        self.model: Encoder = M2Encoder(given) if isinstance(given, M2EncoderConfig) else given
        for objective in self.trained_objectives().values():
            objective.build(cast("M2EncoderConfig", self.config))
        if self._initial_state is not None:
            self.model.load_state_dict(self._initial_state)
            self._initial_state = None
        self.adaptation.apply(cast("M2Encoder", self.model))
        frozen = self.model.freeze_parts(PARTS.keys() - self._trained_parts())
        logger.info("%s parameters that no objective trains are frozen", f"{frozen:,}")
        if self._compiled:
            compile_layers(cast("M2Encoder", self.model))  # others are refused
        strategy = None if self._trainer is None else self._trainer.strategy
        prepare = getattr(strategy, "parallelize", None)  # strategies of this project have it
        if prepare is not None:
            prepare(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer, and its schedule by step.

        Raises:
            UserError: if either refuses its settings.
        """
        with _refusing("optimizer"):
            optimizer = self._build_optimizer(self)  # objectives may have parameters of their own
        with _refusing("scheduler"):
            scheduler = self._build_scheduler(optimizer)
        schedule = LRSchedulerConfigType(scheduler=scheduler, interval="step")
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=schedule)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the objectives on one batch."""
        made: Any = batch  # by whichever data module
        if not isinstance(made, ImageTextBatch):
            data = type(getattr(self.trainer, "datamodule", None))
            rule = f"gives batches of {type(made).__name__}; it must give m2_encoder.types.ImageTextBatch"
            raise UserError(rule, key="data._target_", value=f"{data.__module__}.{data.__qualname__}")
        objectives = self.trained_objectives()
        weights = {name: objective.weight_at(self.global_step) for name, objective in objectives.items()}
        if not any(weights.values()):
            raise UserError(f"at step {self.global_step} all schedules are 0; one must be above 0 there")
        outputs = self._evaluate(batch, {name: objectives[name] for name, weight in weights.items() if weight > 0})
        report = report_step(outputs, batch.language)
        self._last_losses = report.losses
        self._log_step(self.global_step + 1)
        self.log_dict({f"train/loss/{name}": loss for name, loss in report.losses.items()})
        self.log_dict({f"train/{name}": score for name, score in report.scores.items()})
        self.log_dict({f"data/share/{code}": share for code, share in report.shares.items()})
        self.log("train/loss/total", sum(weights[name] * report.losses[name] for name in outputs), prog_bar=True)
        self.log("train/logit_scale", self.model.logit_scale.detach().exp())
        terms = [weights[name] * output.loss for name, output in outputs.items()]
        return torch.stack(terms).sum() + self._zero_of_paused(outputs.keys())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the adaptation follow, and clamp the logit scales, before a checkpoint or anything else reads them."""
        super().optimizer_step(*args, **kwargs)
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        with torch.no_grad():
            self.adaptation.after_step(cast("M2Encoder", self.model), optimizer)
        scales = self.model.logit_scales()
        with torch.no_grad():
            for scale in scales:
                if scale.requires_grad:
                    scale.clamp_(0, self._max_log_scale)

    def on_train_batch_end(self, outputs: Any, batch: ImageTextBatch, batch_idx: int) -> None:
        """Log how many steps were skipped so far."""
        self.log("train/skipped_steps", float(self.non_finite.total))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, or each value; a step whose gradient is not finite is skipped and counted.

        Raises:
            NonFiniteError: after too many such steps in a row.
        """
        for parameter in self._paused:  # with a gradient of 0 the optimizer would still decay them
            parameter.grad = None
        parameters = [p for p in self.parameters() if p.grad is not None]
        by_value = gradient_clip_algorithm == "value"  # Lightning makes it an enum of texts
        norm = clip_gradients(parameters, math.inf if by_value else gradient_clip_val or math.inf)
        if by_value and gradient_clip_val:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val, foreach=False)  # sharded and whole ones together
        self.log("train/grad_norm", norm)
        losses = {name: self._last_losses[name] for name in self.objectives if name in self._last_losses}
        step = self.global_step + 1
        if self.non_finite.observe(norm, step=step, losses=losses, parameters=self.named_parameters()):
            optimizer.zero_grad(set_to_none=True)  # optimizers skip parameters without a gradient

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters of skipped steps, and the optimizer's state so that every strategy can load it."""
        if "optimizer_states" in checkpoint:
            weights = checkpoint["state_dict"]
            checkpoint["optimizer_states"] = [
                fill_state(key_by_name(state), weights) for state in checkpoint["optimizer_states"]
            ]
        checkpoint["non_finite"] = self.non_finite.state_dict()
        if self._tokenizer is not None:
            checkpoint["tokenizer"] = dict(self._tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters of skipped steps."""
        self.non_finite.load_state_dict(checkpoint["non_finite"])

    def validation_step(self, batch: RetrievalBatch, batch_idx: int) -> None:
        """Encode one batch of the validation set, its texts in every language."""
        image_features = self.model.encode_image(batch.images)[: len(batch.identity)]
        for language, text in batch.texts.items():
            identity = batch.text_identity[language]
            text_features = self.model.encode_text(text)[: len(identity)]
            self._recall(language).update(image_features, batch.identity, text_features, identity)

    def on_validation_epoch_end(self) -> None:
        """Log recalls of each language that the set has."""
        self._log_step(self.global_step)
        means = []
        for language in LANGUAGES:
            recall = self._recall(language)
            if not recall.update_called:
                continue
            found = recall.compute()
            means.append(found["mean_recall"])
            for name, value in found.items():
                if "r@" in name or name == "mean_recall":
                    self.log(f"val/{self.validation_name}_{language}/{name}", value)
            recall.reset()
        if means:
            self.log(f"val/{self.validation_name}/mean_recall", torch.stack(means).mean())

    def validation_metrics(self) -> list[str]:
        """Names of all that a validation may log; those of a language only come where the set has it."""
        recalls = [f"{way}_r@{k}" for way in ("i2t", "t2i") for k in RECALL_KS]
        own = [f"_{language}/{name}" for language in LANGUAGES for name in (*recalls, "mean_recall")]
        return [f"val/{self.validation_name}{name}" for name in ("/mean_recall", *own)]

    def frozen_towers(self) -> tuple[str, ...]:
        """Names of what somebody else's model has beside what gives features; nothing of our own."""
        (given,) = self._given
        return given.frozen if isinstance(given, TwoTowers) else ()

    def trained_objectives(self) -> dict[str, Objective]:
        """The objectives of this run (those of weight above 0), by name."""
        return {name: o for name, o in self.objectives.items() if isinstance(o, Objective)}

    def _recall(self, language: str) -> RetrievalRecall:
        recall = self.validation_recall[language]
        assert isinstance(recall, RetrievalRecall)
        return recall

    def _evaluate(self, batch: ImageTextBatch, objectives: Mapping[str, Objective]) -> dict[str, ObjectiveOutput]:
        """Encode the batch once for all objectives, and compute their losses."""
        local = {name: objective for name, objective in objectives.items() if isinstance(objective, LocalObjective)}
        pairs = {name: objective for name, objective in objectives.items() if isinstance(objective, PairObjective)}
        encoder = StepEncoder(
            self.model,
            local,
            trains_features=len(local) < len(objectives),
            trains_backbone_features="backbone_features" in self._trained_parts(),
            keeps_passes=bool(pairs),
        )
        topology = self._topology()
        encoded = encoder.encode(batch, micro_batches=topology.micro_batches, recompute=topology.recompute)
        inputs = ObjectiveInputs(encoded.heads, batch.identity, topology.contrastive_group, batch, self.global_step)
        second = evaluate_pairs(
            self.model,
            pairs,
            inputs,
            first_round=encoded.passes,
            micro_batches=topology.micro_batches,
            recompute=topology.recompute,
        )
        means = mean_terms(encoded.terms | second)
        outputs = {name: means[name] if name in means else objective(inputs) for name, objective in objectives.items()}
        if first := next((name for name in outputs if name not in means), None):
            outputs[first] = _reach_all(outputs[first], inputs)
        return outputs

    def _zero_of_paused(self, evaluated: Collection[str]) -> Tensor | float:
        """Zero times every parameter of paused objectives: DDP hangs if a parameter gets no gradient."""
        objectives = self.trained_objectives()
        paused = [objective for name, objective in objectives.items() if name not in evaluated]
        parts = _parts(paused) - _parts(objectives[name] for name in evaluated)
        self._paused = [*self.model.part_parameters(parts), *(p for each in paused for p in each.parameters())]
        return sum(p.flatten()[0] * 0 for p in self._paused if not isinstance(p, DTensor))  # FSDP2 does not wait

    def _trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that the run trains."""
        return _parts(self.trained_objectives().values())

    def _topology(self) -> ContrastiveTopology:
        strategy = self.trainer.strategy
        assert isinstance(strategy, ContrastiveTopology), f"{type(strategy).__name__} has no contrastive_group"
        return strategy

    def _log_step(self, step: int) -> None:
        """Log the number of updates done; Lightning's own "step" is one less."""
        # fp32 counts no further than 16.7 million.
        self.log("step", torch.tensor(float(step), dtype=torch.float64))


def _reach_all(output: ObjectiveOutput, inputs: ObjectiveInputs) -> ObjectiveOutput:
    """Add zero times all features and scales to a loss: DDP hangs if a parameter gets no gradient."""
    nothing = [(images.sum() + texts.sum() + scale) * 0 for images, texts, scale in inputs.heads.values()]
    return output._replace(loss=output.loss + sum(nothing))


def _check_shared_pass(objectives: Mapping[str, Objective]) -> None:
    """Refuse local objectives that differ in `text_expert`: they share the passes of image and text."""
    wanted = {name: each.text_expert for name, each in objectives.items() if isinstance(each, LocalObjective)}
    first = next(iter(wanted), "")
    for name, value in wanted.items():
        if value != wanted[first]:
            raise UserError(
                f"objectives {name}: text_expert={value} must be that of {first}, {wanted[first]}: they share the pass "
                f"of image and text; use text_expert={wanted[first]}"
            )


def _parts(objectives: Iterable[Objective]) -> frozenset[str]:
    return frozenset().union(*(objective.trained_parts() for objective in objectives))
