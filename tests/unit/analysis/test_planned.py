"""Plans and committed results as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.analysis import plan_training, read_benchmark, read_grouped_speedups, tabulate_plans
from m2_encoder.errors import UserError
from m2_encoder.planning.communication import contrastive_bytes


def test_a_plan_is_what_the_command_finds() -> None:
    plan = plan_training(model="tiny", cluster="two_core_cpu", ranks=2, global_batch_size=64, group_batch_size=32)
    table = tabulate_plans([*plan.best, *plan.baselines])
    assert {row["g"] for row in table[: len(plan.best)]} == {1, 2}
    assert table[0]["step, ms"] == pytest.approx(1e3 * plan.best[0].time.total)
    assert [row["method"] for row in table[-2:]] == ["local_loss", "full_logits"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"rank": 2}, "rank: no such key"), ({"ranks": 0}, "ranks=0"), ({"cluster": "x"}, "cluster=x: no such cluster")],
)
def test_a_plan_refuses_what_the_command_refuses(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_training(**settings)


def test_results_of_a_benchmark_are_rows_and_figures() -> None:
    found = read_benchmark("contrastive")
    (row,) = [row for row in found.rows if row["candidate"] == "ours, g = 2"]
    sent = contrastive_bytes(
        "local_form", world_size=4, group_size=2, rows=512, feature_dim=768, bytes_per_element=4
    ).bytes_sent
    assert row["sent_mb"] == pytest.approx(sent / 1e6, abs=1e-3)
    with pytest.raises(UserError, match=r"name=nope: no results of that name; there are .*contrastive"):
        read_benchmark("nope")


def test_every_measured_setting_has_its_prediction() -> None:
    table = read_grouped_speedups()
    assert len(table) == 72
    assert {row["group_size"] for row in table} == {1, 2, 4}
    assert all(row["measured"] > 0 and row["planned"] > 0 for row in table)


def test_outside_of_a_checkout_results_are_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m2_encoder.analysis.benchmarks.PACKAGE_FOLDER", tmp_path)
    with pytest.raises(UserError, match="part of a checkout, not of an installed package"):
        read_benchmark("contrastive")
