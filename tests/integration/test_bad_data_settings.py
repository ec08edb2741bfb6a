"""Settings of `data=webdataset` that cannot work: one clear line and exit code 2, before a tar is opened."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli import train as train_command
from m2_encoder.data.shards import index as shard_index
from tests.support.shards import write_numbers
from tests.support.slow_parts import mark_most

Problems = Callable[..., list[str]]
URL = "data.sources.main.shards=http://127.0.0.1:1/a.tar"


@pytest.fixture
def problems(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Problems:
    """What m2-train says about a configuration; fails if it opens a tar, starts, writes or shows a traceback."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("data was touched although the configuration is wrong")

    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(shard_index, "build_index", refuse)
    monkeypatch.setattr("m2_encoder.runs.run.train", refuse)
    monkeypatch.chdir(repo_root)
    write_numbers(tmp_path / "tars", [3, 3])
    (tmp_path / "empty").mkdir()

    def run(*overrides: str) -> list[str]:
        before = set(tmp_path.rglob("*"))
        own = [f"run.folder={tmp_path / 'outputs'}", "trainer.accelerator=cpu"]
        given = [override.replace("TMP", str(tmp_path)) for override in overrides]
        monkeypatch.setattr(sys, "argv", ["m2-train", *own, *given])
        assert train_command.main() == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert set(tmp_path.rglob("*")) == before, "something was written"
        lines = captured.err.strip().splitlines()
        return [line.removeprefix("m2-train: ").strip() for line in (lines if len(lines) == 1 else lines[1:])]

    return run


# The override, and what its line must say besides the key: the rule, or the way out.
ONE_FAULT = [
    # sources
    ("data.sources=[1]", "a mapping {KEY: VALUE}"),
    ("data.sources=7", "{main: {shards: PATHS}}"),
    ("data.sources=null", "{main: {shards: PATHS}}"),
    ("data.sources.main=null", "at least one not null"),
    ("+data.sources.b=TMP/tars", "each a mapping of keys, or null"),
    ("+data.sources.b={weight: null}", "add data.sources.b.shards=PATHS"),
    ("+data.sources.main.shard=x", "did you mean shards"),
    ("data.sources.main.wieght=1", "did you mean weight"),
    ("data.source.main.shards=x", "did you mean sources"),
    # shards
    ("data.sources.main.shards=???", "must be given; add data.sources.main.shards=PATHS"),
    ("data.sources.main.shards=''", "or a list of them"),
    ("data.sources.main.shards=3", "must be a path, a url"),
    ("data.sources.main.shards=[]", "or a list of them"),
    ("data.sources.main.shards=null", "or a list of them"),
    ("data.sources.main.shards=TMP/gone.tar", "TMP holds empty, tars"),
    ("data.sources.main.shards=TMP/tars/*.tgz", "tars holds 000000.tar, 000001.tar"),
    ("data.sources.main.shards=TMP/gone/{00..09}.tar", "gone/00.tar does not exist"),
    ("data.sources.main.shards=TMP/empty", "it holds nothing"),
    ("data.sources.main.shards=[TMP/tars,TMP/tars]", "comes twice"),
    ("data.sources.main.shards=[TMP/tars,TMP/./tars/000001.tar]", "comes twice"),
    ("data.sources.main.shards=TMP/{00..", "its braces cannot be read"),
    ("data.sources.main.shards='pipe:cat a.tar'", "give a url"),
    (URL, "data.cache={folder: cache, max_bytes: 2e11}"),
    # other keys of a source
    ("data.sources.main.languages=[fr]", "some of en, zh"),
    ("data.sources.main.languages=[]", "[zh, en]"),
    ("data.sources.main.weight=-1", "0 or more"),
    ("data.sources.main.weight=nan", "a number"),
    ("data.sources.main.weight=0", "must be above 0 for at least one source"),
    ("+data.sources.b={shards: TMP/tars, weight: 2}", "data.sources.b has one"),
    ("data.sources.main.max_samples=0", "1 or more, or null"),
    ("data.sources.main.max_epochs=1.5", "whole number"),
    # copies of remote shards
    ("data.cache=yes", "must be a mapping or null"),
    ("data.cache={folder: c}", "add data.cache.max_bytes=2e11"),
    ("data.cache={folder: c, max_bytes: 0}", "above 0"),
    ("data.cache={folder: c, max_bytes: 1e9, size: 3}", "data.cache has folder, max_bytes"),
    ("data.cache={folder: c, max_bytes: 1e9, attempts: 0}", "in 1..100"),
    ("data.cache={folder: '', max_bytes: 1e9}", "a text"),
    # the look before training, unusable samples, validation
    ("data.check=true", "must be a mapping or null"),
    ("data.check.shards=0", "1 or more"),
    ("data.check.sample=10", "did you mean samples"),
    ("+data.check.smaples=10", "did you mean samples"),
    ("data.max_bad_share=2", "at most 1"),
    ("data.max_bad_samples=-1", "0 or more, or null"),
    ("data.stall_timeout_s=0", "above 0"),
    ("data.new_segment=maybe", "true or false"),
    ("+data.validation.own=TMP/gone", "give tars, a folder of images"),
    ("data.validation.own=TMP/tars", "has none; add one of your own with a +, as in +data.validation.own=TMP/tars"),
    ("data.sources.more.shards=TMP/tars", "with a +, as in +data.sources.more.shards=TMP/tars"),
    ("data.sources.mine.shards=TMP/tars", "(did you mean main?); it has main; add one of your own with a +"),
    ("+data.validation.数据=TMP/tars", "names of keys are letters from a to z"),
    ("+data.validation.own=TMP/empty", "no *.tar there"),
    ("+data.validation.own=TMP/图=片", "no such file or folder"),
    ("+data.validation.own=TMP/{0..", "its braces cannot be read"),
    ("+data.validation.own=[3]", "folders of tars by name"),
    # order and decoding
    ("data.lanes=0", "in 1..1048576"),
    ("data.window=0", "1 or more"),
    ("data.num_workers=-1", "0 or more"),
    ("+data.decode.max_pixel=3", "did you mean max_pixels"),
    ("+data.decode.max_pixels=many", "whole number"),
    ("data.transform.flip=2", "flip"),
    ("data.captions.role_weights={orignal: 1}", "original"),
    ("data.captions.language_weights={zh: 0, en: 0}", "not all 0"),
    ("data.folder=tars", "unlike data=emoji; choose it"),
    ("data.heldout_style=noto", "data=emoji"),
]


@pytest.mark.parametrize(("override", "named"), mark_most(ONE_FAULT))
def test_one_fault_gives_one_line(problems: Problems, tmp_path: Path, override: str, named: str) -> None:
    shards = [] if override.startswith("data.sources.main.shards") else ["data.sources.main.shards=TMP/tars"]
    if override == "data.sources.main.weight=0":
        shards.append("+data.sources.b={shards: TMP/tars/000000.tar, weight: 0}")
    (line,) = problems("data=webdataset", *shards, override)
    assert named.replace("TMP", str(tmp_path)) in line
    assert line.lstrip("+").startswith("data.")


def test_braces_that_the_shell_has_expanded_are_not_taken_for_their_last_part(problems: Problems) -> None:
    """In bash, data.sources.main.shards=/data/{0..1}.tar without quotes is two arguments, and Hydra takes the last."""
    given = [f"data.sources.main.shards=TMP/tars/{number:06d}.tar" for number in range(2)]
    (line,) = problems("data=webdataset", *given)
    assert line.startswith("data.sources.main.shards is given 2 times; put its braces in quotes")


def test_lanes_of_many_ranks(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ranks = ("strategy=ddp", "trainer.devices=6", "data.global_batch_size=12")
    (line,) = problems("data=webdataset", "data.sources.main.shards=TMP/tars", *ranks, "data.lanes=4")
    assert line.startswith("data.lanes=4: must be at least the 6 ranks")
    assert line.endswith("data.lanes=8")


def test_several_faults_take_a_line_each(problems: Problems) -> None:
    wrong = ["data.sources.main.shards=TMP/gone.tar", "+data.sources.b={shards: TMP/empty}", "data.check.shards=0"]
    lines = problems("data=webdataset", *wrong, "+data.validation.own=TMP/gone", "data.cache={folder: c}")
    assert len(lines) == 5


def test_the_published_mixture_says_in_one_line_what_is_missing(problems: Problems) -> None:
    (line,) = problems("data=bm6b", "trainer.devices=1")
    assert line.startswith("data.sources.{laion_en,laion_en_translated,laion_cn,coyo,")
    assert "data.sources.laion_en.shards=PATHS" in line
    assert "~data.sources.laion_en" in line


def test_a_part_of_the_published_mixture(problems: Problems) -> None:
    """Two sources are given or left out; the line names the other seven. No key needs a +."""
    limits = ("data.sources.wukong.max_samples=5", "data.sources.wukong.max_epochs=2")
    (line,) = problems("data=bm6b", "data.sources.wukong.shards=TMP/tars", "~data.sources.inhouse", *limits)
    assert "wukong" not in line
    assert "inhouse" not in line
    assert line.count(",") == 6 + 1, "seven names, and the comma of the fix"
