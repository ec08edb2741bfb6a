"""Suites of evaluation in the loop: measured at validations, by all ranks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from m2_encoder.bounds import Count, Workers, check_bounds
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import Tokenize
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.evaluation.report.page import draw_strip
from m2_encoder.evaluation.suite import run_tasks
from m2_encoder.evaluation.tables import CellTable
from m2_encoder.evaluation.tasks.base import EvaluationContext, TaskResult
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.pictures import PicturePolicy
from m2_encoder.training.module import PretrainModule


class MeasureSuites(lightning.Callback):
    """Measures suites of `evaluation` at validations; early stopping and the best checkpoint may watch what they find.

    Metrics are named `eval/<set>_<language>/<metric>`. Pictures are shared among the ranks. Loggers with `log_table`
    and `log_image`, as that of W&B, get the tables of the terminal and galleries of the best and worst retrievals.

    Args:
        suites: names in `evaluation`; None for all suites there.
        every_n_validations: measured at every n-th validation.
        batch_size: pictures or texts per forward pass.
        num_workers: threads of each rank that read and decode ahead.
    """

    @check_bounds
    def __init__(
        self,
        *,
        suites: Sequence[str] | None = None,
        every_n_validations: Count = 1,
        batch_size: Count = 256,
        num_workers: Workers = 2,
    ) -> None:
        self._names, self._every = suites, every_n_validations
        self._batch_size, self._num_workers = batch_size, num_workers
        self._suites: dict[str, Suite] = {}
        self._seen = 0

    def attach(
        self, tasks: Mapping[str, Any], *, tokenizer: Tokenize, pictures: PicturePolicy, heldout_style: str = ""
    ) -> None:
        """Takes its suites from the tasks of a run, and what else that knows of its model.

        Raises:
            UserError: for a name that is no suite there, or if there is none.
        """
        there = {name: task for name, task in tasks.items() if isinstance(task, Suite)}
        for name in self._names or ():
            if name not in there:
                known = ", ".join(there) or "none"
                rule = f"{name!r} is no suite of this run; evaluation has {known}"
                raise UserError(f"{rule}; choose it there, as in evaluation=[retrieval,{name}]", key="suites")
        self._suites = {name: there[name] for name in self._names or there}
        if not self._suites:
            fix = "choose one there, as in evaluation=[retrieval,emoji]"
            raise UserError(f"evaluation has no suite; {fix}", key="suites")
        self._tokenizer, self._pictures, self._heldout_style = tokenizer, pictures, heldout_style

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a model that cannot be measured here.

        Raises:
            UserError: for weights that are split over ranks, and for a task of somebody else's.
        """
        if not isinstance(pl_module, PretrainModule):
            raise UserError("measures encoders; this task has none", key="callbacks.suites")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            rule = "cannot measure weights that are split over ranks"
            raise UserError(f"{rule}; leave it out with strategy=grouped_fsdp", key="callbacks.suites")

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure, and log what was found."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._seen += 1
        if self._seen % self._every:
            return
        assert isinstance(pl_module, PretrainModule)
        model = pl_module.model
        preprocess = EvalTransform(model.config.image_size, pictures=self._pictures)
        wrapped = wrap_towers(model, preprocess, self._tokenizer, name="model", heldout_style=self._heldout_style)
        group = dist.group.WORLD if trainer.world_size > 1 else None
        more: dict[str, Any] = {"batch_size": self._batch_size, "num_workers": self._num_workers, "group": group}
        with FeatureEncoder(wrapped, **more) as encoder:
            context = EvaluationContext(model=model, tokenizer=self._tokenizer, sets={}, files=encoder)
            results = run_tasks(self._suites, context)
        for name, result in results.items():
            pl_module.log_dict(dict(result.metrics), rank_zero_only=False)
            _log_media(trainer, name, result)

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were."""
        return {"seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._seen = int(state_dict.get("seen", 0))


def _log_media(trainer: lightning.Trainer, name: str, result: TaskResult) -> None:
    """Tables and galleries, to loggers that take them, as that of W&B does."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger in trainer.loggers:
        log_table: Any = getattr(logger, "log_table", None)
        for table in result.rows if log_table is not None else ():
            if isinstance(table, CellTable):
                key = f"eval/{name}/{table.title.partition(',')[0].lower().replace(' ', '_')}"
                log_table(key, columns=list(table.headings), data=[list(row) for row in table.rows], step=step)
        log_image: Any = getattr(logger, "log_image", None)
        for gallery in result.galleries if log_image is not None else ():
            for which, queries in (("best", gallery.best), ("worst", gallery.worst)):
                key = f"eval/{gallery.dataset}_{gallery.language}/{which}"
                captions = [f"{each.query} (rank {each.rank} of {gallery.gallery_size})" for each in queries]
                log_image(key, images=[draw_strip(each) for each in queries], caption=captions, step=step)
