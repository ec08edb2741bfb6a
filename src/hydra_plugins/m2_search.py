"""The sweeper of `hydra/sweeper=search`. Hydra reads this file whenever a command starts: it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SearchSweeper(Sweeper):
    """Tries values that Optuna chooses, one job after the other; `m2_encoder.search` does the work."""

    def __init__(self, **settings: Any) -> None:
        self._settings: Mapping[str, Any] = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what the sweep is of."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs the search of a command line, or what is left of it."""
        from m2_encoder.search.loop import run_search

        assert self.config is not None
        run_search(arguments, self.config, self.launcher)
