"""Runs as data: reading, comparing, loading."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import m2_encoder
from m2_encoder.analysis import plot_effects, read_run, read_runs, use_font
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.io import load_model
from m2_encoder.config.sweep_jobs import JobOutcome, write_outcome
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.pictures import STANDARD
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config

OLDER = Path(__file__).parents[2] / "data" / "older_run"
RECALL = "val/set_zh/mean_recall"


def write_run(folder: Path, *, lr: float = 0.1, seed: int = 0, recall: float | None = None, **more: Any) -> Path:
    folder.mkdir(parents=True)
    cfg = {"seed": seed, "run": {"name": folder.name, "folder": str(folder.parent)}, "optimizer": {"lr": lr}, **more}
    (folder / "config.yaml").write_text(json.dumps(cfg), encoding="utf-8")  # JSON is YAML
    lines = [{"step": n, "samples_seen": 8 * n, "train/loss/total": 1 / n} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    if recall is not None:
        summary = {"finished": True, "metrics": {RECALL: recall}}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_a_run_has_its_settings_curves_and_final_metrics(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "实验一", recall=12.5))
    assert (run.name, run.is_finished, run.settings["optimizer.lr"]) == ("实验一", True, 0.1)
    assert run.curve("train/loss/total") == ([1, 2, 3], [8, 16, 24], [1.0, 0.5, 1 / 3])
    assert (run.final(RECALL), run.final("train/loss/total")) == (12.5, 1 / 3)
    with pytest.raises(UserError, match="did you mean train/loss/total"):
        run.curve("train/loss/totl")


def test_half_a_line_of_a_run_at_work_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "train/lo')
    run = read_run(folder)
    assert len(run.log) == 3
    assert not run.is_finished


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "{}\nnone\n", "line 2 is damaged"),
        ("summary.json", "[1]", "is damaged"),
        ("config.yaml", "- 1", "must hold a mapping"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, said: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{file}: .*{said}"):
        read_run(folder)


def test_seeds_are_averaged_with_their_spread(tmp_path: Path) -> None:
    values = {(lr, seed): 10 * lr + seed for lr in (0.1, 0.2) for seed in (0, 1, 2)}
    for (lr, seed), recall in values.items():
        write_run(tmp_path / f"lr={lr}-seed={seed}", lr=lr, seed=seed, recall=recall)
    (tmp_path / "multirun").mkdir()  # no run
    runs = read_runs(tmp_path)
    assert runs.varies == ["seed", "optimizer.lr"]
    table = runs.table()
    assert table.columns == ("optimizer.lr", "runs", RECALL, f"{RECALL} ±")
    assert [row["optimizer.lr"] for row in table] == [0.1, 0.2]
    for row in table:
        own = [value for (lr, _), value in values.items() if lr == row["optimizer.lr"]]
        assert row == {
            "optimizer.lr": row["optimizer.lr"],
            "runs": 3,
            RECALL: pytest.approx(statistics.fmean(own)),
            f"{RECALL} ±": pytest.approx(1.0),
        }
    assert len(runs.table(RECALL, over=None)) == 6
    assert len(read_runs(f"{tmp_path}/lr=0.1-*")) == 3


def test_runs_without_the_metric_count_in_no_mean(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, recall=4.0)
    write_run(tmp_path / "b", seed=1)
    (row,) = read_runs(tmp_path).table(RECALL)
    assert (row["runs"], row[RECALL], row[f"{RECALL} ±"]) == (2, 4.0, None)


def test_a_table_is_shown_and_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a", lr=0.1, recall=4.123456)
    write_run(tmp_path / "b<c>", lr=0.2, recall=5.0)
    table = read_runs(tmp_path).table(RECALL, over=None)
    assert str(table).splitlines() == [
        "run   optimizer.lr  val/set_zh/mean_recall",
        "----  ------------  ----------------------",
        "a              0.1                   4.123",
        "b<c>           0.2                       5",
    ]
    assert "b&lt;c&gt;" in table._repr_html_()
    assert table.to_markdown().splitlines()[1] == "| --- | --: | --: |"
    assert table.to_csv(tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[1] == "a,0.1,4.123456"


def test_no_run_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        read_runs(f"{tmp_path}/x-*")
    with pytest.raises(UserError, match=r"no run's folder: it has no config\.yaml"):
        read_run(tmp_path)


def test_a_checkpoint_of_a_run_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(OLDER, folder)
    os.link(folder / "checkpoints/last.ckpt", folder / "checkpoints/step=2.ckpt")
    run = read_run(folder)
    model, preprocess, tokenizer = m2_encoder.load(folder, checkpoint="step=2")
    by_number, last = run.load(2).model, run.load("last").model
    expected = load_model(model.config, folder / "checkpoints/last.ckpt").encode_text(tokenizer(["猫"]))
    assert torch.equal(model.encode_text(tokenizer(["猫"])), expected)
    assert torch.equal(by_number.encode_text(tokenizer(["猫"])), last.encode_text(tokenizer(["猫"])))
    assert preprocess.image_size == model.config.image_size
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="no checkpoint '7'; there is step=2"):
        run.load(7)
    with pytest.raises(UserError, match="needs the folder of a run"):
        m2_encoder.load("tiny", checkpoint=3)
    with pytest.raises(UserError, match="weights and a tokenizer of its own"):
        run.load(2, tokenizer="sp.model")


def test_the_folder_of_a_run_opens_its_export(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=14)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size)).requires_grad_(False).eval()
    export_model(tmp_path / "run" / "export", model=model, tokenizer=tokenizer, pictures=STANDARD)
    loaded = m2_encoder.load(tmp_path / "run")
    assert torch.equal(loaded.model.encode_text(tokenizer(["猫"])), model.encode_text(tokenizer(["猫"])))


def test_time_is_told_apart(tmp_path: Path) -> None:
    """Two windows of 80 pairs, at 8 and 4 pairs a second, of which a tenth and a half were spent waiting."""
    folder = write_run(tmp_path / "a", recall=1.0)
    speeds = [(10, 80, 8.0, 0.1), (15, 120, None, None), (20, 160, 4.0, 0.5)]
    keys = ("step", "samples_seen", "perf/samples_per_s", "perf/data_wait")
    lines = [{key: value for key, value in zip(keys, line, strict=True) if value is not None} for line in speeds]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert read_run(folder).timing == pytest.approx({"waiting for data": 11.0, "steps": 19.0})
    summary = {"wall_time_s": 50.0, "metrics": {}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert read_run(folder).timing["rest"] == pytest.approx(20.0)
    timing = {"from_step": 10, "start_s": 3.0, "training_s": 22.0, "validation_s": 5.0, "evaluation_s": 9.0}
    (folder / "summary.json").write_text(json.dumps({**summary, "timing": timing}), encoding="utf-8")
    expected = {"start": 3, "waiting for data": 11, "steps": 19, "validation": 5, "saving, logging": 2}
    assert read_run(folder).timing == pytest.approx({**expected, "evaluation": 9, "export, rest": 11})


def test_runs_of_a_sweep_are_found_by_its_folder(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "multirun" / "lr"
    for lr in ("2", "10"):
        folder = write_run(tmp_path / "outputs" / f"lr={lr}", lr=float(lr), recall=1.0)
        write_outcome(sweep, JobOutcome(folder.name, "finished", str(folder)))
    write_outcome(sweep, JobOutcome("lr=x", "refused", str(tmp_path / "outputs" / "lr=x"), "no number"))
    assert [run.name for run in read_runs(sweep)] == ["lr=2", "lr=10"]
    (tmp_path / "outputs").rename(tmp_path / "copied")
    assert [run.name for run in read_runs(tmp_path / "copied" / "multirun" / "lr")] == ["lr=2", "lr=10"]


def test_a_path_counts_from_the_checkout_where_nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").touch()
    (tmp_path / "src" / "m2_encoder").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    write_run(tmp_path / "outputs" / "a")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert read_run("outputs/a").name == "a"
    assert len(read_runs("outputs/a*")) == 1
    with pytest.raises(UserError, match="no run there"):
        read_runs("outputs/b-*")


def test_runs_at_work_are_told_from_finished_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, recall=4.0)
    write_run(tmp_path / "b", seed=1)
    assert [run.name for run in read_runs(tmp_path).finished] == ["a"]


def test_a_run_of_older_code_has_facts_and_times() -> None:
    run = read_run(OLDER)
    assert {"run", "trained", "model"} <= set(run.facts.column("what"))
    assert all(seconds >= 0 for seconds in run.timing.values())
    assert not run.sources


def test_curves_are_found_by_pattern_and_smoothed(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    assert run.curves("train/*") == {"train/loss/total": run.curve("train/loss/total")}
    assert run.curves("val/*") == {}
    assert run.curve("train/loss/total").smoothed(3).values == pytest.approx([1.0, 11 / 18, 1 / 3])


def test_a_user_error_is_one_line_in_a_notebook() -> None:
    """IPython asks an error for what to show in place of its traceback."""
    error = UserError("must be above 0", key="lr", value=-1)
    assert error._render_traceback_() == ["UserError: lr=-1: must be above 0"]


def test_the_shipped_font_draws_both_languages() -> None:
    with mpl.rc_context():
        assert use_font() in mpl.rcParams["font.family"]
        path = font_manager.findfont(use_font(), fallback_to_default=False)
    assert {ord(sign) for sign in "猫狗aZ"} <= set(FT2Font(path).get_charmap())


def test_pandas_takes_tables(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for lr in (0.1, 0.2):
        write_run(tmp_path / f"lr={lr}", lr=lr, recall=10 * lr)
    frame = pandas.DataFrame(read_runs(tmp_path).table(RECALL))
    assert list(frame["optimizer.lr"]) == [0.1, 0.2]
    assert list(frame[RECALL]) == [1.0, 2.0]


def test_of_settings_that_change_together_the_cause_is_named(tmp_path: Path) -> None:
    for size, seed in itertools.product((64, 256), (0, 1)):
        more = {"data": {"global_batch_size": size}, "trainer": {"max_steps": 10240 // size}}
        write_run(tmp_path / f"b{size}-{seed}", seed=seed, recall=float(size + seed), **more)
    runs = read_runs(tmp_path)
    assert runs.factors == ["data.global_batch_size"]
    assert runs.by_combination() == {"global_batch_size=256": [256.0, 257.0], "global_batch_size=64": [64.0, 65.0]}
    (rival,) = runs.rivals()
    assert (rival.better, rival.other, rival.is_told_apart) == ("global_batch_size=256", "global_batch_size=64", True)
    assert [str(each) for each in runs.differences()] == [
        "data.global_batch_size: 256 is better than 64 by 192.00 ± 0.00"
    ]
    with mpl.rc_context():
        assert [axes.get_xlabel() for axes in plot_effects(runs).axes] == ["data.global_batch_size"]


def test_values_of_a_sweep_are_those_that_were_swept(tmp_path: Path) -> None:
    sweep = tmp_path / "outputs" / "multirun" / "s"
    for lr in (0.1, 0.2):
        folder = write_run(tmp_path / "outputs" / f"lr={lr}", lr=lr, trainer={"max_steps": int(10 * lr)})
        write_outcome(sweep, JobOutcome(folder.name, "finished", str(folder), swept=[f"optimizer.lr={lr}"]))
    assert read_runs(sweep).varies == ["optimizer.lr"]
    assert read_runs(tmp_path / "outputs").varies == ["optimizer.lr", "trainer.max_steps"]


def test_a_sweep_that_went_on_with_other_settings_shows_them(tmp_path: Path) -> None:
    for seed, lr in ((0, 0.1), (1, 0.1), (2, 0.2), (3, 0.2)):
        folder = write_run(
            tmp_path / f"a-seed={seed}", lr=lr, seed=seed, recall=float(seed), objective={"itm": {"seed": seed}}
        )
        write_outcome(tmp_path / "sweep", JobOutcome(folder.name, "finished", str(folder), swept=[f"seed={seed}"]))
    runs = read_runs(tmp_path / "sweep")
    assert runs.varies == ["seed", "optimizer.lr"]
    assert [row["runs"] for row in runs.table()] == [2, 2]


def test_measures_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", lr=0.1, recall=4.0)
    write_run(tmp_path / "b", lr=0.2, recall=float("nan"))
    runs = read_runs(tmp_path)
    for compare in (runs.scored, runs.differences, runs.by_combination, runs.rivals, runs.table):
        with pytest.raises(UserError, match="no metric 'nosuch'"):
            compare("nosuch")
    with pytest.raises(UserError, match="over='nosuch': is no setting"):
        runs.table(over="nosuch")
    assert runs.by_combination() == {"lr=0.1": [4.0]}


def test_a_mean_of_languages_stands_for_no_set_of_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    recalls = {f"val/set{part}/mean_recall": 1.0 for part in ("_zh", "_en", "")} | {"val/other/mean_recall": 2.0}
    (folder / "summary.json").write_text(json.dumps({"finished": True, "metrics": recalls}), encoding="utf-8")
    assert read_runs(tmp_path).recalls == ["val/set_zh/mean_recall", "val/set_en/mean_recall", "val/other/mean_recall"]


def test_samples_of_lines_that_do_not_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", data={"global_batch_size": 8})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps({'step': step, RECALL: 1.0})}\n" for step in (3, 5))
    run = read_run(folder)
    assert run.curve(RECALL).samples == [24, 40]
    assert run.sources.column("source") == []


def test_a_comparison_of_no_runs_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    with pytest.raises(UserError, match="no run to compare"):
        read_runs(tmp_path).finished.table()


def test_a_search_is_drawn_over_its_values(tmp_path: Path) -> None:
    """Ten learning rates: points on a logarithmic axis; and seeds alone have no effect to draw."""
    for number in range(10):
        write_run(tmp_path / "search" / f"t{number}", lr=10.0 ** (-number / 3), recall=float(number))
        write_run(tmp_path / "seeds" / f"t{number}", seed=number, recall=float(number))
    with mpl.rc_context():
        figure = plot_effects(read_runs(tmp_path / "search"))
        assert [axes.get_xscale() for axes in figure.axes if axes.get_visible()] == ["log"]
        with pytest.raises(UserError, match="no effect to draw"):
            plot_effects(read_runs(tmp_path / "seeds"))


def test_a_run_that_was_given_more_steps_has_not_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", recall=1.0)
    summary = {"finished": True, "steps": 2, "metrics": {RECALL: 1.0, "train/loss/total": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    run = read_run(folder)
    assert not run.is_finished
    assert (run.final("train/loss/total"), run.final(RECALL)) == (1 / 3, 1.0)
    (folder / "summary.json").write_text(json.dumps({**summary, "steps": 3}), encoding="utf-8")
    assert read_run(folder).is_finished
