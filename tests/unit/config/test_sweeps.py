from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from m2_encoder.config.check import check_settings
from m2_encoder.config.schema import SAFE_NAME, Run
from m2_encoder.config.sweeps import (
    MAX_NAME_LENGTH,
    expand_sweep,
    is_sweep_line,
    job_name,
    without_constant,
)

SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def _hydra(sweeper: str = SWEEPER, launcher: str = "x.BasicLauncher", **params: str) -> DictConfig:
    return OmegaConf.create({"sweeper": {"_target_": sweeper, "params": params}, "launcher": {"_target_": launcher}})


def test_sweep_lines() -> None:
    assert is_sweep_line("a=1,2")
    assert is_sweep_line("a=range(1,4)")
    assert not any(map(is_sweep_line, ["a=1", "a=[1,2]", "a='1,2'", "a=[", "+experiment=smoke"]))


def test_product_of_all_values() -> None:
    jobs = expand_sweep(["+experiment=smoke", "a=1,2", "b=x,y"], _hydra())
    assert sorted(map(sorted, jobs)) == sorted(
        sorted(["+experiment=smoke", f"a={a}", f"b={b}"]) for a in (1, 2) for b in ("x", "y")
    )


def test_sweep_of_the_configuration_counts() -> None:
    assert expand_sweep(["seed=1"], _hydra(a="1,2")) == [["a=1", "seed=1"], ["a=2", "seed=1"]]


def test_unreadable_lines_stay_for_the_message() -> None:
    assert expand_sweep(["a=[1"], _hydra()) == [["a=[1"]]


def test_another_sweeper_decides_its_values_later() -> None:
    assert expand_sweep(["a=1,2", "seed=3"], _hydra("optuna.Sweeper")) == [["seed=3"]]


def test_names_say_what_is_swept() -> None:
    assert job_name("smoke", ["optimizer.lr=1e-3", "+seed=2"]) == "smoke-lr=1e-3-seed=2"
    assert job_name("smoke", ["run.name=smoke", "hydra.x=1"]) == "smoke"


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["objective=[itc,cmlm]"], "objective=itc+cmlm"),
        (["optimizer.betas=[0.9,0.98]"], "betas=0.9+0.98"),
        (["data.captions={zh: 1, en: 2}"], "captions=zh-1+en-2"),
        (["+experiment=emoji"], "experiment=emoji"),
        (["objective.cmlm.weight=0.5"], "cmlm.weight=0.5"),
        (["data.sources.a.weight=1", "data.sources.b.weight=2"], "a.weight=1-b.weight=2"),
        (["model.name=x", "scheduler.name=y", "seed=1"], "model.name=x-scheduler.name=y-seed=1"),
        (["objective.a.targets.size=1", "objective.b.targets.size=2"], "a.targets.size=1-b.targets.size=2"),
        (["seed=1", "data.seed=2"], "seed=1-data.seed=2"),
        (["logger.group='a b'", "optimizer.x=null", "optimizer.y=true"], "group=a-b-x=null-y=true"),
    ],
)
def test_names_say_whose_value_it_is(lines: list[str], name: str) -> None:
    assert job_name("run", lines) == f"run-{name}"


def test_what_all_jobs_share_is_not_swept() -> None:
    constant = ["a={0: 1, 2: 3}", "~b.c", "+d='x'", "seed=1"]
    (job, _) = expand_sweep([*constant, "seed=2,3"], _hydra())
    assert without_constant(job, constant) == ["seed=2"]


values = st.text(string.ascii_letters + string.digits + " /={}.,~'\"中", min_size=1, max_size=60)


@given(first=st.lists(values, min_size=2, max_size=2), second=st.lists(values, min_size=2, max_size=2))
def test_names_are_safe_and_short(first: list[str], second: list[str]) -> None:
    names = [job_name("run", [f"a.b={a}", f"c.d={b}"]) for a, b in (first, second)]
    assert all(SAFE_NAME.fullmatch(name) and len(name) <= MAX_NAME_LENGTH for name in names)


def test_long_names_stay_distinct() -> None:
    long = "x" * 200
    assert job_name("run", [f"a={long}1"]) != job_name("run", [f"a={long}2"])


def test_names_of_any_script_are_kept_and_fit_a_file_system() -> None:
    assert job_name("实验一", ["optimizer.lr=1e-3"]) == "实验一-lr=1e-3"
    long = job_name("实验一" * 20, ["a.b=" + "中" * 60])
    assert SAFE_NAME.fullmatch(long)
    assert len(long.encode()) <= 200


@pytest.mark.parametrize(
    ("name", "fits"), [("实验一", True), ("été_2", True), ("实" * 67, False), ("-a", False), ("a b", False)]
)
def test_names_of_runs(name: str, fits: bool) -> None:
    run = {"name": name, "folder": "outputs", "resume": "never", "checkpoint_every": 1, "export": True}
    assert [problem.key for problem in check_settings(Run, run, "run")] == ([] if fits else ["run.name"])
