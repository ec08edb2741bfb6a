"""What a sampler proposes depends on its seed and the trials so far, not on when the process was started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from m2_encoder.search.space import read_space
from m2_encoder.search.study import SearchSettings, Study

SPACE = ["x=interval(0,1)", "n=range(1,9)", "k=choice(a,b,c)"]
SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "TPE": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3},
    "multivariate": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3, "multivariate": True},
    "NSGA-II": {"_target_": "optuna.samplers.NSGAIISampler", "population_size": 3},
    "brute force": {"_target_": "optuna.samplers.BruteForceSampler"},
    "partly fixed": {
        "_target_": "optuna.samplers.PartialFixedSampler",
        "fixed_params": {"k": "a"},
        "base_sampler": {"_target_": "optuna.samplers.RandomSampler"},
    },
}


def _run(folder: Path, node: dict[str, Any], *, restarts: bool, seed: int = 0, count: int = 7) -> list[Any]:
    from optuna.trial import TrialState

    folder.mkdir()
    space = read_space([line for line in SPACE if node is not SAMPLERS["brute force"] or "interval" not in line])
    settings = SearchSettings(sampler=node, seed=seed)
    study = Study(folder, settings, space)
    for number in range(count):
        if restarts:
            study = Study(folder, settings, space)
        study.ask(number)
        if restarts:  # killed while it was at work
            study = Study(folder, settings, space)
            study.ask(number)
        params = study.trials[number].params
        study.tell(number, TrialState.COMPLETE, params.get("x", 0) + params["n"] + (params["k"] == "b"))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_restarts_change_nothing(tmp_path: Path, name: str) -> None:
    whole = _run(tmp_path / "whole", SAMPLERS[name], restarts=False)
    assert _run(tmp_path / "parts", SAMPLERS[name], restarts=True) == whole
    assert len({str(params) for params in whole}) > 4
    if name not in ("brute force",):
        assert _run(tmp_path / "other", SAMPLERS[name], restarts=False, seed=1) != whole
