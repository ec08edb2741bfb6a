from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder import load
from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.pipeline import Curation, curate
from m2_encoder.curation.settings import ScoreSettings
from m2_encoder.curation.sources import list_shards
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import ImageError
from tests.support.curation import SETTINGS, export_scorer, file_hashes, read_decisions, write_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return export_scorer(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "web", shards=2, samples=20)


def run(corpus: Path, output: Path, model: Path, workers: int = 0, write: bool = True, **score: Any) -> Curation:
    settings = dataclasses.replace(SETTINGS, score=ScoreSettings(model=str(model), rows=16, **score))
    executor = LocalExecutor(workers)
    result = curate(list_shards({"web": str(corpus)}), output, settings, executor=executor, write=write)
    executor.close()
    return result


def median_score(output: Path) -> float:
    scores = [value for table in read_decisions(output) for value in table.column("score").to_pylist()]
    return sorted(value for value in scores if value is not None)[sum(v is not None for v in scores) // 2]


@pytest.fixture(scope="module")
def scored(corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scored") / "out"
    run(corpus, output, model, rewrite_below=0.0)
    return output


def test_scores_are_those_of_the_model(corpus: Path, model: Path, scored: Path) -> None:
    encoder, preprocess, tokenizer = load(model)
    checked = 0
    for table, shard in zip(read_decisions(scored), sorted(corpus.glob("*.tar")), strict=True):
        content = shard.read_bytes()
        for row in table.to_pylist():
            if not row["keep"]:
                assert row["score"] is None
                continue
            image = content[row["image_offset"] : row["image_offset"] + row["image_size"]]
            with torch.inference_mode():
                one = encoder.encode_image(preprocess(image)[None])
                other = encoder.encode_text(tokenizer([row["text"]]))
            assert row["score"] == pytest.approx(float(one @ other.T), abs=2e-5)
            assert row["rewrite"] == (row["score"] < 0.0)
            checked += 1
    assert checked > 20


def test_flags_reach_shards_and_report(scored: Path) -> None:
    flags = []
    for path in sorted((scored / "web").glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    sample = json.load(tar.extractfile(info))  # type: ignore[arg-type]
                    for language, texts in sample["captions"].items():
                        assert len(sample["caption_scores"][language]) == len(texts)
                        flags += sample["caption_rewrite"][language]
    report = json.loads((scored / "report.json").read_text())
    assert 0 < sum(flags) == report["total"]["rewrite"] < len(flags)
    assert "flagged for rewriting" in (scored / "report.md").read_text()


def test_low_scores_are_dropped(corpus: Path, model: Path, scored: Path, tmp_path: Path) -> None:
    bound = median_score(scored)
    report = run(corpus, tmp_path / "out", model, rewrite_below=None, drop_below=bound).report
    usual = json.loads((scored / "report.json").read_text())["total"]["kept_pairs"]
    assert report.total["reasons"]["low_score"] == usual - report.total["kept_pairs"]
    assert report.total["reasons"]["low_score"] == usual // 2


def test_other_bounds_need_no_new_scores(corpus: Path, model: Path, scored: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output, model, rewrite_below=0.9, write=False)
    again = run(corpus, output, model, rewrite_below=0.0)
    done = {stage.stage: (stage.done_before, stage.tasks) for stage in again.stages}
    assert done["score"][0] == done["score"][1] > 1
    assert done["flag"][0] == 0
    assert file_hashes(output) == file_hashes(scored)


def test_damage_that_only_whole_decoding_meets(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, seen = EvalTransform.to_uint8, []

    def fail_sometimes(self: EvalTransform, source: bytes) -> torch.Tensor:
        seen.append(source)
        if len(seen) % 3 == 0:
            raise ImageError("cut")
        return decode(self, source)

    monkeypatch.setattr(EvalTransform, "to_uint8", fail_sometimes)
    run(corpus, tmp_path / "out", model, rewrite_below=None)
    rows = [row for table in read_decisions(tmp_path / "out") for row in table.to_pylist()]
    failed = set(seen[2::3])
    fallen = {row["image_hash"] for row in rows if row["reason"] == "undecodable_image" and row["width"]}
    assert fallen == {hashlib.sha256(content).digest() for content in failed}
    assert all((row["score"] is None) != row["keep"] for row in rows)


def test_workers_do_not_change_scores(corpus: Path, model: Path, scored: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out", model, workers=2, rewrite_below=0.0)
    assert file_hashes(tmp_path / "out") == file_hashes(scored)
