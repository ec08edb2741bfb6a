"""Lightning's MLflow logger with every metric of a run, under names that MLflow takes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from m2_encoder.bounds import Text


class MlflowLogger(MLFlowLogger):
    """Lightning's, with names by `mlflow_name`, where Lightning's leaves out letters, Chinese ones, too.

    Args:
        run_name: name of the run.
        folder: the run's; runs beside it share a data base.
        experiment_name: of runs.
        tracking_uri: of the server or the data base; None: the variable `MLFLOW_TRACKING_URI`, or else `mlflow.db`
            beside the run's folder.
        settings: more arguments of Lightning's logger.
    """

    def __init__(
        self,
        *,
        run_name: str,
        folder: Path,
        experiment_name: Text = "m2-encoder",
        tracking_uri: Text | None = None,
        **settings: Any,
    ) -> None:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve().parent}/mlflow.db"
        super().__init__(experiment_name=experiment_name, run_name=run_name, tracking_uri=uri, **settings)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hand scalars of a step to MLflow."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        values = [Metric(mlflow_name(name), float(value), now_ms, step or 0) for name, value in metrics.items()]
        self.experiment.log_batch(run_id=self.run_id, metrics=values, **self._log_batch_kwargs)


def mlflow_name(name: str) -> str:
    """A metric's name at MLflow: `@` is `_at_`, and what it does not take otherwise is `_`.

    >>> mlflow_name("val/emoji_zh/i2t_r@1")
    'val/emoji_zh/i2t_r_at_1'
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
