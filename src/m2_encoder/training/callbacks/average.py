"""An exponential moving average of the weights (EMA), kept beside the trained ones.

Lightning's `EMAWeightAveraging` is not used: it averages a copy of the whole module, which it says does not work for
sharded weights; its checkpoints hold the average in the place of the weights that training goes on from, and it ends by
overwriting them. Here an average is a part of the checkpoint, of trained parameters alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import lightning
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from m2_encoder.bounds import Count, Index, check_bounds
from m2_encoder.checkpoints.training_state import AVERAGE_KEY
from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

_LARGE_SHARE: Final = 0.5  # of the start in the average of the last step


class WeightAverage(lightning.Callback):
    """Keeps an average of all trained parameters: after step t, `average = decay * average + (1 - decay) * weights`.

    It starts as the weights after `start_step`, or as those of the start. Buffers and frozen parameters are not
    averaged. Where weights are split over ranks, so is the average. It is part of every checkpoint; `run.final=ema`
    evaluates and exports it, and `run.final=best` too if it was what was validated.

    Reference: Polyak and Juditsky (1992); with a decay as in Inception-v3 (arXiv:1512.00567), section 8.

    Args:
        decay: about the last 1 / (1 - decay) updates count.
        start_step: steps before which the average is the weights themselves.
        every_n_steps: steps from one update to the next.
        validate: validate the average during training, in place of the weights; so early stopping and the best
            checkpoint decide by it.
    """

    @check_bounds
    def __init__(
        self,
        *,
        decay: Annotated[float, Ge(0), Lt(1)] = 0.999,
        start_step: Index = 0,
        every_n_steps: Count = 1,
        validate: bool = True,
    ) -> None:
        self.decay, self.start_step, self.every_n_steps, self.validates = decay, start_step, every_n_steps, validate
        self._parameters: dict[str, nn.Parameter] = {}  # trained ones; split, where the strategy splits them
        self._average: dict[str, Tensor] = {}  # by the same names, split as they are
        self._loaded: Mapping[str, Tensor] = {}  # of a checkpoint, whole
        self._aside: dict[str, Tensor] = {}  # weights while the average is validated
        self._step = 0  # of the newest update

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Begin anew: a checkpoint is read later."""
        self._parameters, self._average, self._loaded, self._aside, self._step = {}, {}, {}, {}, 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Find what is trained, before a validation gathers what is split."""
        self._parameters = {name: each for name, each in pl_module.named_parameters() if each.requires_grad}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the average, from the weights or from a checkpoint."""
        self._begin()
        self._step = trainer.global_step
        if trainer.is_global_zero and (warning := self._describe_slowness(trainer.max_steps)):
            logger.warning(warning)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after a step, before the step is saved."""
        step = trainer.global_step
        if step == self._step:  # a part of a step alone
            return
        self._step = step
        if step <= self.start_step:
            _write(self._average, self._parameters)
        elif (step - self.start_step) % self.every_n_steps == 0:
            averages = [_local(each) for each in self._average.values()]
            weights = [_local(self._parameters[name]).to(each.dtype) for name, each in self._average.items()]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in the place of the weights."""
        if self.validates and not trainer.sanity_checking and self._average:
            _split_again(pl_module)
            self._aside = {name: each.detach().clone() for name, each in self._parameters.items()}
            _write(self._parameters, self._average)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the weights back, before a checkpoint is written."""
        if self._aside:
            _split_again(pl_module)
            _write(self._parameters, self._aside)
            self._aside = {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average, whole: by all ranks where it is split, for the first one."""
        weights = {name: whole_tensor(each).cpu() for name, each in self._average.items()}
        weights = weights if trainer.is_global_zero else {}
        checkpoint[AVERAGE_KEY] = {"weights": weights, "validated": self.validates}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the average of a checkpoint; one without starts it from its weights."""
        self._loaded = checkpoint.get(AVERAGE_KEY, {}).get("weights", {})
        if not self._loaded and trainer.is_global_zero:
            logger.warning("the checkpoint holds no average of the weights; it starts at this step, from its weights")

    def take(self, module: lightning.LightningModule) -> None:
        """Give a trained module the average for its weights; every rank calls it."""
        self._begin()
        _split_again(module)
        _write(self._parameters, self._average)

    def _describe_slowness(self, max_steps: int) -> str | None:
        """What to say where the average of a run's last step is still mostly what it started from."""
        updates = (max_steps - self.start_step) // self.every_n_steps
        if updates < 1 or (share := self.decay**updates) <= _LARGE_SHARE:
            return None
        said = f"after {max_steps:,} steps {share:.0%} of the average would still be the weights it starts from"
        return f"{said}; use callbacks.ema.decay={max(0, 1 - 10 / updates):.2g}, or train longer"

    @torch.no_grad()
    def _begin(self) -> None:
        if self._average:
            return
        if self._loaded and (missing := sorted(self._parameters.keys() - self._loaded.keys())):
            rule = f"its average lacks {missing[0]}, which is trained now"
            raise UserError(f"the checkpoint does not fit: {rule}; start another run from its weights")
        for name, parameter in self._parameters.items():
            average = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            if self._loaded:
                _copy(average, self._loaded[name])
            self._average[name] = average
        self._loaded = {}


def find_average(callbacks: Iterable[Any]) -> WeightAverage | None:
    """The callback that keeps an average of the weights, if there is one."""
    return next((each for each in callbacks if isinstance(each, WeightAverage)), None)


@torch.no_grad()
def _write(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Values of other tensors that are split in the same way."""
    for name, target in targets.items():
        _local(target).copy_(_local(sources[name]))


@torch.no_grad()
def _copy(target: Tensor, whole: Tensor) -> None:
    """The values of a whole tensor that every rank has, to one that may be split."""
    if isinstance(target, DTensor):
        on_device = whole.to(target.device)
        whole = distribute_tensor(on_device, target.device_mesh, target.placements, src_data_rank=None).to_local()
    _local(target).copy_(whole)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which shares its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _split_again(module: nn.Module) -> None:
    """Let go of gathered weights, which a forward pass alone may leave: they would hide what is written."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()
