"""The README keeps its word: its blocks run, its files and links exist, its numbers are right.

Python blocks run on a model that two steps of `m2-train +experiment=emoji` made. Commands run, too; those of m2-train,
which could take hours, go through everything but the training itself. The official checkpoint is a small stand-in of
the same format.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from m2_encoder import M2Encoder, M2EncoderConfig, hub
from m2_encoder.checkpoints.io import save_official
from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.data.emoji.dataset import load_emoji_concepts, load_emoji_tokenizer_model
from m2_encoder.objectives.base import FeaturePair, ObjectiveInputs
from tests.support.readme import KINDS, anchors, commands, inline_code, links, split_blocks

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS, PROSE = split_blocks(README)
# A measure of one's own, which the README leaves to its page.
OWN, _ = split_blocks((ROOT / "docs" / "own_parts.md").read_text(encoding="utf-8"))
MEASURE = [block for block in OWN if "gap" in f"{block.file} {block.text}"]
FILES = {block.file: block for block in [*BLOCKS, *MEASURE] if block.file}
SNIPPETS = [block for block in BLOCKS if block.kind == "python" and not block.file]
COMMANDS = [words for block in [*BLOCKS, *MEASURE] if block.kind == "bash" for words in commands(block)]
TRAINING = [words for words in COMMANDS if words[0] == "m2-train"]
QUICK = ("m2-data", "m2-evaluate", "m2-embed", "m2-export", "m2-plan", "m2-search")

# The run that the other blocks build on: the README's own experiment, cut short.
SHORT_RUN = (
    "+experiment=emoji", "logger=csv", "trainer.accelerator=cpu", "trainer.max_steps=2", "scheduler.warmup_steps=1",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "data.global_batch_size=8",
)  # fmt: skip
PHOTOS = {
    "cat": "一只猫坐在窗边",
    "bus": "a bus in the street",
    "lake": "湖边的一座小木屋",
    "bread": "fresh bread on a table",
}
OFFICIAL = {
    "beit_version": "base", "encoder_layers": 1, "encoder_embed_dim": 32, "encoder_attention_heads": 2,
    "beit3_vl_layers": 1, "out_embed_dim": 24, "image_size": 224, "patch_size": 16, "vocab_size": 3500,
    "max_text_len": 52,
}  # fmt: skip


def _console_script(name: str) -> Any:
    (found,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    return found.load()


def _write_inputs(folder: Path) -> None:
    """What the README expects a user to have: pictures, texts, an official checkpoint."""
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for name, text in PHOTOS.items():
        blobs = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        blobs.resize((300, 240), Image.Resampling.BICUBIC).save(folder / "photos" / f"{name}.png")
        (folder / "photos" / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "captions.txt").write_text("一只猫\na bus\n", encoding="utf-8")
    (folder / "sp.model").write_bytes(load_emoji_tokenizer_model())
    (folder / "official.json").write_text(json.dumps(OFFICIAL))
    torch.manual_seed(0)
    model = M2Encoder(M2EncoderConfig.from_official(OFFICIAL))
    save_official(model, folder / "m2_encoder_0.4B.ckpt")
    for name, block in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of any checkout in which `make train` seems to have ended."""
    folder = tmp_path_factory.mktemp("readme")
    _write_inputs(folder)
    script = shutil.which("m2-train", path=str(Path(sys.executable).parent))
    assert script, "m2-train is not installed beside this Python"
    done = subprocess.run([script, *SHORT_RUN], cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def workspace(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the working directory, with the README's own parts where Python finds them."""
    monkeypatch.chdir(trained)
    monkeypatch.syspath_prepend(trained / "my")
    return trained


def _record_training(words: list[str], conf: Path) -> list[dict[str, Any]]:
    """Goes through all of m2-train but the training; the configurations of its jobs."""
    started: list[dict[str, Any]] = []
    command = dataclasses.replace(TRAIN, run=started.append, measure="", module="", end_sweep="")  # jobs stay here
    if any(word.startswith("sweep=") for word in words):  # a search goes by what its jobs return
        words = [*words, "--cfg", "job"]
    more = [] if {"--config-path", "--config-dir"} & {*words} else ["--config-dir", str(conf)]
    before = set(Path("outputs").iterdir())
    assert run_command(command, [*words[1:], *more]) == 0
    for folder in set(Path("outputs").iterdir()) - before:  # Hydra's records of a run that did not take place
        shutil.rmtree(folder)
    return started


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert BLOCKS
    assert {block.kind for block in BLOCKS} <= set(KINDS), "a block of an unknown kind would not be tested"
    shown = [block for block in BLOCKS if block.kind == "yaml"]
    assert all(block.file for block in shown), "a YAML block must name its file in a comment on its first line"


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {words[0] for words in COMMANDS} <= {"export", "make", "pip", "source", "m2-train", *QUICK}


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_environment_is_where_make_puts_it() -> None:
    sourced = [words for words in COMMANDS if words[0] == "source"]
    venv = re.search(r"^VENV +\?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert venv
    assert sourced == [["source", f"{venv[1]}/bin/activate"]]


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "pip"], ids=" ".join)
def test_extras_exist(words: list[str]) -> None:
    match = re.fullmatch(r"\.(?:\[(.+)\])?", words[-1])
    assert match
    assert words[1:-1] == ["install"]
    extras = importlib.metadata.metadata("m2-encoder").get_all("Provides-Extra") or []
    assert set(filter(None, (match[1] or "").split(","))) <= set(extras)


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_training_commands_start(words: list[str], workspace: Path) -> None:
    started = _record_training(words, workspace / "conf")
    assert started or any(word.startswith("sweep=") for word in words)


def test_runs_get_the_names_that_the_comments_give(workspace: Path) -> None:
    repeat = next(words for words in TRAINING if "--config-path" in words)
    sweep = next(words for words in TRAINING if "-m" in words)
    assert [cfg["run"]["name"] for cfg in _record_training(repeat, workspace / "conf")] == ["emoji-2"]
    assert "# repeat, as outputs/emoji-2" in README
    names = [cfg["run"]["name"] for cfg in _record_training(sweep, workspace / "conf")]
    assert f"# {', '.join(names)}\n" in README


def test_a_continued_run_is_repeated_beside_itself(workspace: Path) -> None:
    text = (workspace / "outputs" / "emoji" / "config.yaml").read_text(encoding="utf-8")
    again = workspace / "outputs" / "again"
    again.mkdir()
    text = text.replace("name: emoji\n  folder", "name: again\n  folder").replace("resume: never", "resume: auto")
    (again / "config.yaml").write_text(text, encoding="utf-8")
    words = ["m2-train", "--config-path", "outputs/again", "--config-name", "config"]
    assert [cfg["run"]["name"] for cfg in _record_training(words, workspace / "conf")] == ["again-2"]


@pytest.fixture(scope="module")
def finished(trained: Path) -> dict[str, int]:
    """The quick commands, run in the README's order, and their exit codes."""
    codes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        patch.syspath_prepend(trained / "my")
        for words in COMMANDS:
            if words[0] in QUICK:
                patch.setattr(sys, "argv", words)
                codes[" ".join(words)] = _console_script(words[0])()
    return codes


@pytest.mark.parametrize("line", [" ".join(w) for w in COMMANDS if w[0] in QUICK])
def test_quick_commands_run(line: str, finished: dict[str, int], trained: Path) -> None:
    assert finished[line] == 0
    output = re.search(r"output=(\S+)", line)
    assert output is None or (trained / output[1]).stat().st_size > 0


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: f"line {block.line}")
def test_python_runs(
    block: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = M2EncoderConfig.from_official(workspace / "official.json")
    monkeypatch.setitem(hub.NAME_TO_CONFIG, "m2-encoder-0.4b", dataclasses.replace(stand_in, name="m2-encoder-0.4b"))
    exec(compile(block.text, f"README.md:{block.line}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for expected in re.findall(r"^print\(.+\)  # (.+)$", block.text, flags=re.MULTILINE):
        assert expected in printed.splitlines()


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shown_files_are_new_and_used(workspace: Path) -> None:
    assert {Path(name).parent.as_posix() for name in FILES} == {
        "my", "my/objective", "my/evaluation", "conf/experiment",
    }  # fmt: skip
    for name in FILES:
        assert not (ROOT / name).exists(), f"{name} exists: show the file itself"
    (experiment,) = (Path(name).stem for name in FILES if name.startswith("conf/experiment"))
    (cfg,) = _record_training(["m2-train", f"+experiment={experiment}"], workspace / "conf")
    assert cfg["run"]["name"] == experiment
    assert f"`m2-train +experiment={experiment}`" in PROSE


def test_the_new_objective_is_what_it_says(workspace: Path) -> None:
    name = next(name for name, block in FILES.items() if "HardestNegative(" in block.text)
    objective = _import_file(workspace / name).HardestNegative(margin=0.3, schedule=[[0, 0], [10, 1]])
    assert objective.weight_at(5) == 0.5
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1).requires_grad_() for n in (5, 10))
    identity = torch.tensor([0, 1, 2, 1, 3])
    features = {"features": FeaturePair(images, texts, torch.tensor(0.0))}
    output = objective(ObjectiveInputs(features, identity, None))
    cosines = (images @ texts.t()).tolist()
    expected = []
    for text in range(10):  # captions 2 i and 2 i + 1 describe image i
        image = text // 2
        other_texts = max(cosines[image][j] for j in range(10) if identity[j // 2] != identity[image])
        other_images = max(cosines[j][text] for j in range(5) if identity[j] != identity[image])
        expected.append(sum(max(0.0, 0.3 + best - cosines[image][text]) for best in (other_texts, other_images)))
    torch.testing.assert_close(output.per_sample, torch.tensor(expected))
    output.loss.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_the_new_objective_takes_a_schedule_as_all_others_do(workspace: Path) -> None:
    words = next(words for words in TRAINING if any("hardest" in word for word in words))
    (cfg,) = _record_training([*words, "objective.hardest.schedule=[[0,0],[5,1]]"], workspace / "conf")
    assert cfg["objective"]["hardest"]["schedule"] == [[0, 0], [5, 1]]


def _names_a_path(code: str) -> bool:
    return bool(re.match(r"(src|conf|tests|scripts|benchmarks|docs|outputs)/", code)) and " " not in code


def test_named_files_exist(trained: Path) -> None:
    checked = 0
    for line in PROSE.splitlines():
        folder = ROOT
        for code in inline_code(line):
            if _names_a_path(code):
                path = (trained if code.startswith("outputs/") else ROOT) / code
                folder = path.parent
            elif re.fullmatch(r"\w+\.py", code):
                path = folder / code
            else:
                continue
            checked += 1
            assert path.exists(), f"README.md names {code}, which does not exist"
    assert checked > 20


def _has_key(cfg: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(cfg, dict) or part not in cfg:
            return False
        cfg = cfg[part]
    return True


def test_named_keys_options_and_targets_exist(trained: Path) -> None:
    cfg = yaml.safe_load((trained / "outputs" / "emoji" / "config.yaml").read_text(encoding="utf-8"))
    shards = yaml.safe_load((ROOT / "conf" / "data" / "webdataset.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for code in inline_code(PROSE):
        words = code.split()
        group, _, option = code.partition("=")
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), code
        elif words[0].startswith("m2-"):
            assert callable(_console_script(words[0]))
        elif re.fullmatch(r"(model|data|run|trainer|optimizer|scheduler|strategy)\.[\w.]+", group):
            assert _has_key(cfg, group) or _has_key({"data": shards}, group), f"there is no key {group}"
        elif (ROOT / "conf" / group).is_dir() and option.islower():
            for name in option.strip("[]").split(","):
                assert (ROOT / "conf" / group / f"{name}.yaml").is_file(), f"{group} has no option {name}"


def test_links_lead_somewhere() -> None:
    for target in links(PROSE):
        if target.startswith("#"):
            assert target[1:] in anchors(PROSE), target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_numbers_of_the_data() -> None:
    concepts = [concept for concept in load_emoji_concepts() if concept.split == "train"]
    drawings = [style for concept in concepts for style in concept.styles if style != "twemoji"]
    seen = [concept for concept in concepts if set(concept.styles) - {"twemoji"}]
    assert f"{len(drawings):,} training drawings of {len(seen):,} emoji" in PROSE


def test_the_citation_is_that_of_the_project() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert cited["identifiers"][0]["value"] in PROSE
    assert "[CITATION.cff](CITATION.cff)" in README


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script that writes measured numbers into a README; gives its exit code."""
    script = ROOT / "scripts" / "update_readme.py"
    main = _import_file(script).main

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        return int(main())

    return run


def test_results_are_written_by_the_script(trained: Path, tmp_path: Path, update: Callable[..., int]) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    report = {"machine": {"cpu": "a CPU", "cores": 2, "gpu": None}, "figures": {"text_speedup": 3.14159}}
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "encode-here.json").write_text(json.dumps(report))
    assert update(trained / "outputs" / "emoji", "--readme", copy) == 0
    text = copy.read_text(encoding="utf-8")
    table = json.loads((trained / "outputs" / "emoji" / "summary.json").read_text(encoding="utf-8"))["table"]
    recall = table["heldout_style"]["zh"]["t2i_r@10"]
    row = next(line for line in text.splitlines() if line.startswith("| unseen style, 1,494 images | zh |"))
    assert f" / {recall:.2f} |" in row if recall < 1 else f" / {recall:.1f} |" in row
    assert "| 3.14 | a CPU, 2 cores | `benchmarks/results/encode-here.json` |" in text
    assert "`m2-train +experiment=emoji logger=csv" in text
    assert len(text.splitlines()) < 365
    picture = tmp_path / "docs" / "retrieval.png"
    assert picture.stat().st_size <= 600_000
    with Image.open(picture) as image:
        assert image.width >= 1000
    assert update("--readme", copy) == 0
    assert copy.read_text(encoding="utf-8") == text, "a second update changes nothing"


def test_the_script_refuses_times_of_a_part_of_a_run(
    trained: Path, tmp_path: Path, update: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained / "outputs" / "emoji", tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["throughput"] |= {"samples_seen": 1000, "samples_per_s": 10.0}
    summary["wall_time_s"] = 80.0
    (run / "summary.json").write_text(json.dumps(summary))
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    assert update(run, "--readme", copy) == 2
    assert "shorter than its training" in capsys.readouterr().err
    assert copy.read_text(encoding="utf-8") == README


def test_the_script_refuses_a_readme_without_markers(
    tmp_path: Path, update: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("nothing to replace\n")
    assert update("--readme", copy) == 2
    assert "<!-- benchmarks:begin -->" in capsys.readouterr().err
    assert copy.read_text() == "nothing to replace\n"


def test_length() -> None:
    assert len(README.splitlines()) < 365
