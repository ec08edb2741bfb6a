from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from m2_encoder.cli import commands
from m2_encoder.config import plan
from m2_encoder.errors import UserError

CONSTANTS = Path("conf") / "cluster" / "hardware"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo_root: Path) -> Callable[..., int]:
    """Runs m2-plan in the checkout, as a user would."""
    monkeypatch.chdir(repo_root)
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)

    def start(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-plan", *argv])
        return commands.PLAN()

    return start


def _report(run: Callable[..., int], path: Path, *argv: str) -> dict[str, Any]:
    assert run(f"output={path}", "overwrite=true", *argv) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_table_says_what_was_found(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ranks=64", "global_batch_size=8192", "group_batch_size=2048") == 0
    out = capsys.readouterr().out
    for words in (
        "m2-encoder-1b: 730 M parameters",
        "GBA-ITC",
        "local loss",
        "full logits",
        "Not modelled",
        "congestion",
    ):
        assert words in out
    assert "strategy.group_size=16 strategy.micro_batches=1 data.global_batch_size=8192" in out
    rows = [line for line in out.splitlines() if line.lstrip().startswith("GBA-ITC  ")]
    assert [row.split()[2] for row in rows] == ["16", "32", "64"], "a line for each group size that contrasts enough"


def test_json_holds_the_numbers_of_the_formulas(run: Callable[..., int], tmp_path: Path) -> None:
    report = _report(
        run, tmp_path / "plan.json", "ranks=64", "group_size=8", "micro_batches=4", "global_batch_size=8192",
        "group_batch_size=1", "feature_bytes=2",
    )  # fmt: skip
    best = report["best"]
    assert (best["group_size"], best["micro_batches"], best["rows"], best["contrasted_rows"]) == (8, 4, 32, 1024)
    assert best["contrast_bytes_sent"] == 2 * 4 * 7 * 32 * 1024 * 2 + 8 * 4 * 7 * 32
    assert best["contrast_collectives"] == 2
    assert best["step_s"] == pytest.approx(sum(best["time"].values()))
    assert best["memory_bytes"] == pytest.approx(sum(best["memory"].values()))
    assert best["logits"] == 2 * 128 * 1024
    assert set(report["baselines"]) == {"local_loss", "full_logits"}
    assert [point["world_size"] for point in report["scaling"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert report["hardware"]["peak_tflops"] == 312
    assert report["not_modelled"]
    assert report["command"].endswith("feature_bytes=2")


def test_every_constant_can_be_given(run: Callable[..., int], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    usual = _report(run, path, "ranks=64")
    slow = _report(run, path, "ranks=64", "hardware.mfu=0.225", "hardware.straggler_std=0")
    assert slow["hardware"] == {**usual["hardware"], "mfu": 0.225, "straggler_std": 0}
    assert slow["best"]["time"]["forward"] == pytest.approx(2 * usual["best"]["time"]["forward"])
    assert slow["best"]["time"]["waiting"] == 0


def test_full_precision_multiplies_at_its_own_speed(run: Callable[..., int], tmp_path: Path) -> None:
    half, full = (
        _report(run, tmp_path / "plan.json", "model=m2_encoder_0_4b", f"precision={precision}")["best"]
        for precision in ("bf16-mixed", "32-true")
    )
    assert full["time"]["forward"] == pytest.approx(half["time"]["forward"] * 312 / 19.5)
    assert full["memory"]["activations"] > half["memory"]["activations"]


def test_a_cluster_of_ones_own(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: h100_80g\ndevices_per_node: 4\n", encoding="utf-8")
    report = _report(run, tmp_path / "plan.json", f"cluster={tmp_path / 'mine.yaml'}", "ranks=64")
    assert (report["hardware"]["devices_per_node"], report["hardware"]["peak_tflops"]) == (4, 989)
    assert "trainer.devices=4 trainer.num_nodes=16" in report["train"]


def test_the_printed_command_trains_what_was_planned(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    words = ["model=tiny", "ranks=8", "global_batch_size=64", "group_batch_size=16", "image_size=96"]
    report = _report(run, path, *words, "precision=32-true", "heads=2", "feature_bytes=2")
    for word in (
        "model=tiny",
        "model.image_size=96",
        "trainer.precision=32-true",
        "'objective.itc.heads=[features,backbone_features]'",
        "objective.itc.feature_dtype=bfloat16",
    ):
        assert f" {word} " in f" {report['train']} "
    assert f"m2-train {report['train']}\n" in capsys.readouterr().out
    plain = _report(run, path, "ranks=64")["train"]
    assert plain.startswith("model=m2_encoder_1b trainer.precision=bf16-mixed trainer.devices=8")
    assert all(word not in plain for word in ("objective", "image_size")), "what m2-train does anyway is left out"


@pytest.mark.parametrize("key", ["output", "plot"])
def test_a_place_that_cannot_be_written_is_one_line(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Only writing shows it, as on a full disk."""
    place = Path("/proc") / "plan.png"
    assert run(f"{key}={place}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"m2-plan: {key}={place}: cannot be written")


def test_picture(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(f"plot={tmp_path / 'plan.png'}") == 0
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 2 * picture.height
        assert len(picture.convert("RGB").getcolors(1_000_000) or []) > 50
    assert run(f"plot={tmp_path / 'plan.svg'}", "min_rows=128", "cluster=a100_80g_slow") == 0
    drawn = (tmp_path / "plan.svg").read_text(encoding="utf-8")
    for words in ("1,024 ranks: groups of 64", "local loss, all ranks", "out of memory above", "GBA-ITC, best group"):
        assert words in drawn


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["model=m2_encoder_1B"], ["model=m2_encoder_1B: must be one of tiny, m2_encoder_0_4b"]),
        (["rank=8"], ["rank=8: the configuration has no key 'rank' (did you mean ranks?)"]),
        (["ranks=0", "strategy=ddp"], ["ranks=0: must be a whole number, in 1..", "strategy=ddp: must be one of"]),
        (["cluster=a100"], ["cluster=a100: no such cluster; choose from a100_80g, a100_80g_slow, h100_80g"]),
        (["ranks=12"], ["ranks=12: must be a multiple of the 8 devices of a node; use 8 or"]),
        (["group_size=48"], ["group_size=48: must divide the 256 ranks and be node-aligned; use one of 1, 2, 4"]),
        (["group_batch_size=1e9"], ["group_batch_size=1000000000.0: must be a whole number"]),
        (["memory_gb=1"], ["memory_gb=1: no setting fits; the smallest needs"]),
        (["hardware.mfu=2"], ["hardware.mfu=2: must be a number, above 0 and at most 1"]),
        (["image_size=100"], ["image_size=100: must be a multiple of patch_size=16"]),
        (["text_tokens=1023"], ["text_tokens=1023 must be in 2..1022"]),
        (["feature_bytes=3"], ["feature_bytes=3: must be one of 2, 4"]),
        (["plot=plan.txt"], ["plot=plan.txt: must end in .png, .svg, .pdf"]),
        (["hardware=null"], ["hardware=null: must be a mapping"]),
        (["output=conf"], ["output=conf: is a folder; give the name of a file"]),
    ],
    ids=lambda value: value[0].partition(":")[0],
)
def test_mistakes(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: list[str], messages: list[str]
) -> None:
    assert run(*argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    problems = said if len(said) == 1 else said[1:]
    assert len(problems) == len(messages), said
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_without_matplotlib(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("plot=plan.png") == 2
    assert capsys.readouterr().err == (
        "m2-plan: plot=plan.png: needs an extra; install it with pip install 'm2-encoder[plot]'\n"
    )


def test_nothing_is_replaced_unasked(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("mine", encoding="utf-8")
    assert run(f"output={tmp_path / 'plan.json'}") == 2
    assert "exists; choose another name, or replace it with overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["a100_80g", "a100_80g_slow", "h100_80g", "two_core_cpu"])
def test_constants_say_where_they_come_from(name: str, repo_root: Path) -> None:
    lines = (repo_root / CONSTANTS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if not line.startswith("#") and len(line.partition(" # ")[2]) < 7]
    assert not bare
    plan.read_hardware(name, {})


def test_every_shipped_cluster_is_tested(repo_root: Path) -> None:
    found = {path.stem for path in (repo_root / CONSTANTS).glob("*.yaml")}
    assert found == {"a100_80g", "a100_80g_slow", "h100_80g", "two_core_cpu"}
    base = yaml.safe_load((repo_root / CONSTANTS / "a100_80g_slow.yaml").read_text(encoding="utf-8"))
    assert set(base) == {"base", "inter_node_gb_per_s"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "must hold constants as `name: number`"),
        ("base: h100_80g\npeak: 3", r"unknown hardware constant\(s\) peak.*; known: devices_per_node"),
        ("base: h100_80g\nmfuu: 0.3", r"unknown hardware constant\(s\) mfuu \(did you mean mfu\?\)"),
        ("mfu: 0.3", r"missing hardware constant\(s\): devices_per_node"),
        ("base: h100_80\nmfu: 1", r"mine\.yaml: base=h100_80: no such cluster; choose from .* \(did you mean h100_80g"),
        ("base: [a]", r"mine\.yaml: base=\[a\]: must be the name of a cluster"),
        ("defaults: [h100_80g]", "name the file to start from as `base: NAME`"),
        ("", "must hold constants"),
    ],
)
def test_damaged_constants(text: str, message: str, tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        plan.read_hardware(str(tmp_path / "mine.yaml"), {})


def test_a_base_may_lie_beside_its_file_and_numbers_may_have_exponents(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: a100_80g\ninter_node_gb_per_s: 1.25e+1\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nmfu: 5e-1\n", encoding="utf-8")
    found = plan.read_hardware(str(tmp_path / "other.yaml"), {"overlap": 0.5})
    assert (found.inter_node_gb_per_s, found.mfu, found.overlap, found.peak_tflops) == (12.5, 0.5, 0.5, 312)


def test_files_that_are_the_base_of_each_other(tmp_path: Path, repo_root: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {tmp_path / base}.yaml\nmfu: 0.3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"cluster=.*a\.yaml: .*is its own base, by way of .*b\.yaml"):
        plan.read_hardware(str(tmp_path / "a.yaml"), {})


def test_an_adaptation_is_planned_beside_full_training(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = ("model=m2_encoder_0_4b", "ranks=8", "global_batch_size=256", "group_batch_size=256")
    report = _report(run, tmp_path / "plan.json", *setting, "adaptation=lora", "adaptation.rank=4")
    out = capsys.readouterr().out
    assert "adaptation=lora adaptation.rank=4" in report["train"]
    assert "the same setting" in out
    adapted, whole = report["best"], report["trained_whole"]
    trained = report["model"]["trainable_parameters"]
    assert f"{trained / 1e6:,.0f} M trained" in out
    # by hand: rank times width and output of six matrices, two experts in 12 layers, without 3 unused text experts
    assert trained == (2 * 12 - 3) * 4 * (4 * 2 * 768 + 2 * 5 * 768) + 1
    assert adapted["memory"]["optimizer"] < 0.02 * whole["memory"]["optimizer"]
    assert adapted["step_s"] < whole["step_s"]
    assert run(*setting, "adaptation=lora", "adaptation.first_layer=12") == 2
    assert "adaptation.first_layer=12: must be at most 11, the last layer of vl_encoder" in capsys.readouterr().err
