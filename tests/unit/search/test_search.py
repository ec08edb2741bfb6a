"""A search whose jobs are functions of the test: what it tries, finds, ends early, and how it goes on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.config import command as cli
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.problems import UNSET
from m2_encoder.config.sweep_jobs import EXIT_PRUNED
from m2_encoder.errors import Problem, UserError

optuna = pytest.importorskip("optuna")

SPACE = ("size=interval(1,9)", "kind=choice(one,two)")
RANDOM = ("hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler",)
MEDIAN = ("+hydra.sweeper.pruner.n_startup_trials=1",)
NO_PRUNER = ("hydra.sweeper.pruner=null",)


def _check(cfg: dict[str, Any]) -> list[Problem]:
    size = cfg["size"]
    return [] if size is UNSET or size > 0 else [Problem("size", size, "must be above 0", "try size=1")]


class Bench:
    """A command whose jobs report `size` at four steps, and what came of its searches."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.interrupt_at: set[int] = set()  # jobs, counted over all starts
        self.ran: list[str] = []
        self.done: list[str] = []
        self.fails: Callable[[dict[str, Any]], object] = lambda cfg: None

    def work(self, cfg: dict[str, Any]) -> int:
        from m2_encoder.search.trial import find_own_trial

        name = cfg["run"]["name"]
        self.ran.append(name)
        if len(self.ran) in self.interrupt_at:
            raise KeyboardInterrupt
        self.fails(cfg)
        trial = find_own_trial()
        for step in range(1, 5) if trial is not None else ():
            trial.report(step, _value(cfg) * step)
            if step < 4 and trial.is_hopeless():
                return EXIT_PRUNED
        self.done.append(name)
        return 0

    def search(self, *lines: str, name: str = "try") -> int:
        return self.run("hydra/sweeper=search", f"run.name={name}", "hydra.sweeper.n_trials=6", *lines)

    def run(self, *lines: str) -> int:
        command = cli.Command(
            name="m2-tool", config_name="tool", summary="", examples=("",), check=_check, run=self.work,
            run_folder=default_run_folder, measure=_value,
        )  # fmt: skip
        sys.argv = ["m2-tool", "-m", *lines]
        return cli.run_command(command)

    def table(self, name: str = "try") -> list[tuple[Any, ...]]:
        """State, values and result of all trials."""
        return [(t.state.name, t.params, t.value, t.intermediate_values) for t in self.study(name).trials]

    def study(self, name: str = "try") -> Any:
        file = optuna.storages.journal.JournalFileBackend(str(self.folder(name) / "study.journal"))
        return optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(file))

    def folder(self, name: str = "try") -> Path:
        return self.root / "outputs" / "multirun" / name


def _value(cfg: dict[str, Any]) -> float:
    return float(cfg["size"]) + (cfg["kind"]["label"] == "two")


@pytest.fixture
def bench(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    conf = tmp_path / "conf"
    shutil.copytree(repo_root / "conf" / "hydra", conf / "hydra")
    (conf / "kind").mkdir()
    (conf / "tool.yaml").write_text(
        "defaults: [_self_, kind: one]\nsize: 1\nother: 0\n"
        f"run: {{name: try, folder: '{tmp_path / 'outputs'}', resume: never, metric: null}}\n",
        encoding="utf-8",
    )
    for name in ("one", "two"):
        (conf / "kind" / f"{name}.yaml").write_text(f"label: {name}\n", encoding="utf-8")
    monkeypatch.setattr(cli, "find_conf", lambda: conf)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)
    return Bench(tmp_path)


def test_it_finds_the_best_and_says_so(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.search(*SPACE, *NO_PRUNER) == 0
    table = bench.table()
    assert [row[0] for row in table] == ["COMPLETE"] * 6
    best = json.loads((bench.folder() / "best.json").read_text())
    assert best["value"] == max(row[2] for row in table)
    assert best["overrides"] == [f"size={table[best['trial']][1]['size']}", f"kind={table[best['trial']][1]['kind']}"]
    err = capsys.readouterr().err
    assert f"the best of 6 trials is {best['name']}" in err
    assert err.splitlines()[-1] == "m2-tool: 6 jobs: 6 finished"
    assert bench.search(*SPACE, *NO_PRUNER, "hydra.sweeper.direction=minimize", name="low") == 0
    assert json.loads((bench.folder("low") / "best.json").read_text())["value"] == min(r[2] for r in bench.table("low"))


def _fail(cfg: dict[str, Any]) -> None:
    if 3 < cfg["size"] < 4:
        raise UserError("the file is gone", key="data", value="x")


@pytest.mark.parametrize(
    "more", [MEDIAN, pytest.param((*RANDOM, *NO_PRUNER), marks=pytest.mark.slow)], ids=["TPE", "no pruner"]
)
def test_a_search_that_is_ended_three_times_finds_the_same(bench: Bench, more: tuple[str, ...]) -> None:
    bench.fails = _fail
    code = bench.search(*SPACE, *more, name="whole")
    expected, bench.ran, bench.done = bench.table("whole"), [], []
    states = [row[0] for row in expected]
    assert code == ("FAIL" in states)
    assert ("PRUNED" in states) == (more == MEDIAN)
    bench.interrupt_at = {2, 5, 6}
    codes = [bench.search(*SPACE, *more) for _ in range(4)]
    assert codes == [130, 130, 130, code]
    assert bench.table() == expected
    assert len(bench.done) == len(set(bench.done)) == states.count("COMPLETE")
    count = len(bench.ran)
    assert bench.search(*SPACE, *more) == code
    assert len(bench.ran) == count, "nothing is run again"
    assert bench.search(*SPACE, *more, "hydra.sweeper.n_trials=7") == code
    assert bench.table()[:6] == expected
    assert len(bench.table()) == 7


def test_jobs_that_fail_are_listed_and_do_not_end_the_others(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.fails = lambda cfg: 1 / 0 if cfg["kind"]["label"] == "two" else None
    all_of_them = ("size=1,2", SPACE[1], "hydra.sweeper.sampler._target_=optuna.samplers.BruteForceSampler")
    assert bench.search(*all_of_them) == 1
    err = capsys.readouterr().err
    assert "m2-tool: 4 jobs: " in err
    assert "  try-size=2-kind=two: failed (ZeroDivisionError: division by zero)" in err
    assert sorted(row[0] for row in bench.table()) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"], "there is nothing else"
    assert bench.search(*all_of_them) == 1
    assert len(bench.ran) == len(bench.table()) == 4


def test_no_values_are_run_twice(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.search("kind=one,two", *RANDOM) == 0
    assert sorted(bench.ran) == ["try-kind=one", "try-kind=two"]
    assert [row[0] for row in bench.table()] == ["COMPLETE"] * 6
    assert "is trial 0 again, which is not run twice" in capsys.readouterr().err


def test_any_sweeper_gets_the_number_of_each_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    launch, found = BasicLauncher.launch, []

    def keep(*given: Any, **more: Any) -> Any:
        found.extend(launch(*given, **more))
        return found

    monkeypatch.setattr(BasicLauncher, "launch", keep)
    bench.fails = lambda cfg: 1 / 0 if cfg["size"] == 2 else None
    assert bench.run("size=1,2,3") == 1
    assert [str(each.return_value) for each in found] == ["1.0", "nan", "3.0"]


def test_nan_is_a_failed_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_value", lambda cfg: float("nan"))
    bench.search("size=1,2", *NO_PRUNER, "hydra.sweeper.n_trials=1")
    assert [row[0] for row in bench.table()] == ["FAIL"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["size=2"], "hydra/sweeper=search: varies nothing, so there is nothing to search"),
        (["size=1,2", "size=interval(1,2)"], "size=interval(1,2): is there twice"),
        (["size=interval(3,1)"], "size=interval(3,1): holds no number"),
        (["size=tag(log,interval(0,1))"], "has a logarithm of 0 or less"),
        (["size=interval(-1,2)"], "size=-1.0: must be above 0"),
        (["sise=1,2"], "sise=1: the configuration has no key 'sise' (did you mean size?)"),
        (["size=1,2", "run.name=choice(a,b)"], "the names of trials are made of what they vary"),
        (["size=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be"),
        (["size=1,2", "+hydra.sweeper.trials=3"], "hydra.sweeper.trials=3: unknown"),
        (["size=1,2", "hydra.sweeper.sampler._target_=optuna.pruners.NopPruner"], "must be a subclass of optuna"),
        (["size=1,2", "+hydra.sweeper.pruner.warmup=1"], "hydra.sweeper.pruner"),
        (["size=1,2", "hydra/launcher=joblib"], "hydra/launcher=joblib: a search runs its trials one after the other"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    bench: Bench, lines: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.search(*lines) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (bench.root / "outputs").exists()


def test_without_optuna_it_says_how_to_get_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench.search("size=1,2") == 2
    said = "m2-tool: hydra/sweeper=search: needs Optuna; install it with pip install 'm2-encoder[search]'"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_value_is_fine_that_some_trial_can_use(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(cfg: dict[str, Any]) -> list[Problem]:
        wrong = cfg["size"] == 2 and cfg["kind"]["label"] == "one"
        return [Problem("size", 2, "not with one")] if wrong else []

    monkeypatch.setattr(sys.modules[__name__], "_check", check)
    assert bench.search("size=1,2", "kind=one,two", "hydra.sweeper.n_trials=1") == 0


def test_another_command_line_does_not_go_on(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("hydra.sweeper.n_trials=1",)
    assert bench.search(*few, "size=1,2") == 0
    capsys.readouterr()
    for lines, said in (
        (("size=1,3",), "size=1,3: the search that is there has size=1,2"),
        (("size=1,2", "other=1"), "other=1: the search that is there has nothing of it"),
        (
            ("size=1,2", "run.metric=x"),
            "run.metric=x: the search that is there has run.metric=the mean recall of validation",
        ),
    ):
        assert bench.search(*few, *lines) == 2
        assert said in capsys.readouterr().err
    assert bench.search(*few, "size=1,2", "hydra.sweeper.seed=1") == 0
    assert "search: hydra.sweeper.seed has changed since the last start" in capsys.readouterr().err


def test_a_journal_that_was_cut_or_damaged(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("size=1,2,3,4", *NO_PRUNER)
    assert bench.search(*few, "hydra.sweeper.n_trials=2") == 0
    journal = bench.folder() / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "wor')
    assert bench.search(*few, "hydra.sweeper.n_trials=3") == 0
    assert len(bench.table()) == 3
    capsys.readouterr()
    journal.write_bytes(whole[:40] + b"\x00" + whole[41:])
    assert bench.search(*few) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{journal}: is damaged" in line
