"""What a later curation into the same folder uses again, and what it must not."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.curation.executors import LocalExecutor
from m2_encoder.curation.pipeline import Curation, curate
from m2_encoder.curation.settings import CurationSettings
from m2_encoder.curation.sources import list_shards
from m2_encoder.data.shards.index import INDEX_SUFFIX, build_index, load_index
from m2_encoder.errors import UserError
from tests.support.curation import SETTINGS, file_hashes, write_corpus

OTHER = dataclasses.replace(SETTINGS, max_repeats=1, samples_per_shard=7)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "web", shards=3, samples=20)


def run(corpus: Path, output: Path, settings: CurationSettings = SETTINGS, **options: Any) -> Curation:
    return curate(list_shards({"web": str(corpus)}), output, settings, executor=LocalExecutor(0), **options)


def results(output: Path) -> dict[str, str]:
    return {name: digest for name, digest in file_hashes(output).items() if not name.startswith(".work")}


def done_before(curation: Curation) -> dict[str, tuple[int, int]]:
    return {stage.stage: (stage.done_before, stage.tasks) for stage in curation.stages}


def test_new_shards_have_indexes(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    tars = sorted((tmp_path / "out" / "web").glob("*.tar"))
    assert len(tars) > 1
    for tar in tars:
        index = load_index(f"{tar}{INDEX_SUFFIX}")
        assert index is not None
        assert index.dump() == build_index(tar).dump()
        assert not index.faults


def test_deciding_first_and_writing_later(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, tmp_path / "whole")
    decided = run(corpus, output, write=False)
    assert not list(output.glob("*/*.tar"))
    assert sorted(path.name for path in (output / "decisions").iterdir()) == [f"web-{n:06d}.arrow" for n in range(3)]
    assert not decided.report.content["written"]
    assert run(corpus, output, write=False).stages == (), "it was decided already"
    other = run(corpus, output, OTHER, write=False)
    assert done_before(other)["measure"] == (3, 3)
    assert other.report.total["kept_pairs"] < decided.report.total["kept_pairs"]
    written = run(corpus, output)
    assert all(
        done == tasks for stage, (done, tasks) in done_before(written).items() if stage not in ("write", "report")
    )
    assert results(output) == results(tmp_path / "whole")
    assert written.report.total == decided.report.total


def test_decided_only_replaces_no_finished_shards(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output)
    assert run(corpus, output, write=False).report.content["written"], "the same settings are finished"
    with pytest.raises(UserError, match="overwrite=true"):
        run(corpus, output, OTHER, write=False)
    run(corpus, output, OTHER, write=False, overwrite=True)
    assert not list(output.glob("*/*.tar*"))


def test_shards_of_other_settings_never_pass_for_ours(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole")
    output = tmp_path / "out"
    run(corpus, output, keep_work=True)
    run(corpus, output, OTHER, keep_work=True, overwrite=True)  # other shards of the same names
    run(corpus, output, overwrite=True)
    assert results(output) == results(tmp_path / "whole")


@pytest.mark.parametrize("change", ["new", "changed", "gone"])
def test_only_other_shards_are_read_again(corpus: Path, tmp_path: Path, change: str) -> None:
    output = tmp_path / "out"
    run(corpus, output, write=False)
    if change == "new":
        (corpus / "0005.tar").write_bytes((corpus / "001.tar").read_bytes())
    elif change == "changed":
        os.utime(corpus / "001.tar", ns=(0, 0))
    else:
        (corpus / "000.tar").unlink()
    again = run(corpus, output)
    assert done_before(again)["measure"] == {"new": (3, 4), "changed": (2, 3), "gone": (2, 2)}[change]
    assert done_before(again)["rules"][0] == 0
    run(corpus, tmp_path / "fresh")
    assert results(output) == results(tmp_path / "fresh")


def test_a_changed_shard_is_no_finished_curation(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output)
    before = json.loads((output / "report.json").read_text())["fingerprint"]
    os.utime(corpus / "001.tar", ns=(0, 0))
    with pytest.raises(UserError, match="other shards or settings"):
        run(corpus, output)
    run(corpus, output, overwrite=True)
    assert json.loads((output / "report.json").read_text())["fingerprint"] != before
