"""Ray gives the same bytes as local processes; it takes a while to start."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.pipeline import curate
from m2_encoder.curation.ray_executor import RayExecutor
from m2_encoder.curation.settings import CurationSettings, ScoreSettings
from m2_encoder.curation.sources import list_shards
from m2_encoder.errors import UserError
from tests.support.curation import SETTINGS, export_scorer, file_hashes, write_corpus


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"m2-encoder\[ray\]"):
        RayExecutor()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_unreachable_cluster_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(UserError, match="nothing answers"):
        RayExecutor(address=address)


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    executor = RayExecutor(workers=2, models=2)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CurationSettings:
    torch.manual_seed(3)
    model = export_scorer(tmp_path_factory.mktemp("model") / "export")
    return dataclasses.replace(SETTINGS, score=ScoreSettings(model=str(model), rows=16, rewrite_below=0.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gpus_that_are_not_there_are_said(executor: RayExecutor) -> None:
    with pytest.raises(UserError, match="2 models with 99 GPUs each"):
        RayExecutor(models=2, gpus=99)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, about files it leaves to the collector
def test_same_bytes_as_local_processes(executor: RayExecutor, settings: CurationSettings, tmp_path: Path) -> None:
    shards = list_shards({"web": str(write_corpus(tmp_path / "web"))})
    by_ray = curate(shards, tmp_path / "ray", settings, executor=executor)
    local = curate(shards, tmp_path / "local", settings, executor=LocalExecutor(0))
    assert file_hashes(tmp_path / "ray") == file_hashes(tmp_path / "local")
    assert [stage.tasks for stage in by_ray.stages] == [stage.tasks for stage in local.stages]
    assert by_ray.report == local.report


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mistakes_keep_their_words(executor: RayExecutor, tmp_path: Path) -> None:
    shards = list_shards({"web": str(write_corpus(tmp_path / "web", shards=2, samples=4))})
    write_corpus(tmp_path / "web", shards=2, samples=5)
    with pytest.raises(UserError, match="shard_changed"):
        curate(shards, tmp_path / "out", SETTINGS, executor=executor)
