"""CLIP_benchmark's own command with our type of models, beside `m2-evaluate`: the same set, the same numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from m2_encoder.checkpoints.export import export_model
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.evaluation.doors import clip_benchmark as door
from m2_encoder.evaluation.models.opening import open_model
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config
from tests.support.peer_models import picture
from tests.support.shards import write_tar
from tests.support.suites import Evaluate, own

NAMES = ("red square", "green ball", "blue bird", "black cat", "old house", "tall tree", "wet dog")
NUMBER, SHARDS = 40, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # of CLIP_benchmark and what it imports


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=12)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))
    return export_model(tmp_path_factory.mktemp("run") / "export", model=model, tokenizer=tokenizer)


def write_set(root: Path, extension: str, label: Callable[[int], str]) -> Path:
    """A set as CLIP_benchmark's exporter lays it out; pictures are JPEGs of different sizes."""
    members = []
    for number in range(NUMBER):
        buffer = io.BytesIO()
        picture(number, size=(40 + number, 30)).save(buffer, "jpeg")
        key = f"s{number:07d}"
        members.append([(f"{key}.jpg", buffer.getvalue()), (f"{key}.{extension}", label(number).encode())])
    size = -(-NUMBER // SHARDS)
    for shard in range(SHARDS):
        rows = members[shard * size : (shard + 1) * size]
        write_tar(root / "test" / f"{shard}.tar", [member for sample in rows for member in sample])
    (root / "test" / "nshards.txt").write_text(f"{SHARDS}\n")
    return root


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(tmp_path, capsys)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = write_set(tmp_path / "classes", "cls", lambda number: str(number * number % len(NAMES)))
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\nthe {c} here\n")
    return root


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    def write(number: int) -> str:
        return "\n".join(f"{NAMES[number % 7]} {number} {word}" for word in ("here", "there", "seen")[: 1 + number % 3])

    root = write_set(tmp_path / "captions", "txt", write)
    (root / "dataset_type.txt").write_text("retrieval\n")
    return root


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *map(str, arguments)])
    return door.main()


def theirs(monkeypatch: pytest.MonkeyPatch, model: Path, data: Path, *more: str) -> dict[str, float]:
    """What CLIP_benchmark's command writes."""
    pytest.importorskip("clip_benchmark")
    output = data.parent / f"{data.name}.json"
    places = ("--dataset_root", data, "--output", output)
    plain = ("--no_amp", "--num_workers", "0", "--batch_size", "16", "--quiet")
    common = ("eval", "--model_type", "m2_encoder", "--model", model, "--dataset", f"wds/{data.name}")
    assert run_command(monkeypatch, *common, *places, *plain, *more) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    assert (found["model"], found["pretrained"]) == (str(model), "none")
    metrics: dict[str, float] = found["metrics"]
    return metrics


def ours(evaluate: Evaluate, model: Path, data: Path, measure: str, **wanted: str) -> dict[str, float]:
    """The records of `m2-evaluate`, as shares."""
    settings = ("evaluation.own.sets.own.layout=clip_benchmark", f"+evaluation.own.measures=[{measure}]")
    found = evaluate(f"model={model}", *own(data, *settings))
    assert found.code == 0, found.err
    records = [each for each in found.report["records"] if all(each[key] == value for key, value in wanted.items())]
    return {each["metric"]: each["value"] / 100 for each in records}


def test_zero_shot_accuracy_is_that_of_m2_evaluate(
    monkeypatch: pytest.MonkeyPatch, export: Path, classes: Path, evaluate: Evaluate
) -> None:
    found = theirs(monkeypatch, export, classes, "--task", "zeroshot_classification")
    mine = ours(evaluate, export, classes, "zero_shot", templates="of the set")
    assert found["acc1"] == pytest.approx(mine["top1"], abs=1e-9)
    assert found["acc5"] == pytest.approx(mine["top5"], abs=1e-9)
    assert found["mean_per_class_recall"] == pytest.approx(mine["mean_per_class"], abs=1e-9)
    assert 0 < found["acc1"] < found["acc5"] < 1


def test_recalls_are_those_of_m2_evaluate(
    monkeypatch: pytest.MonkeyPatch, export: Path, captions: Path, evaluate: Evaluate
) -> None:
    found = theirs(monkeypatch, export, captions, "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    mine = ours(evaluate, export, captions, "retrieval")
    for k in (1, 5, 10):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(mine[f"t2i_r@{k}"], abs=1e-6)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(mine[f"i2t_r@{k}"], abs=1e-6)
    assert 0 < found["image_retrieval_recall@10"] < 1


def test_mixed_precision_is_theirs_to_choose(monkeypatch: pytest.MonkeyPatch, export: Path, classes: Path) -> None:
    pytest.importorskip("clip_benchmark")
    output = classes.parent / "amp.json"
    arguments = ("--model", export, "--dataset", "wds/x", "--dataset_root", classes, "--output", output, "--quiet")
    more = ("--task", "zeroshot_classification", "--num_workers", "0")
    assert run_command(monkeypatch, "eval", "--model_type", "m2_encoder", *arguments, *more) == 0
    assert 0 < json.loads(output.read_text())["metrics"]["acc5"] <= 1


def test_registering_twice_changes_nothing() -> None:
    models = pytest.importorskip("clip_benchmark.models")
    door.register()
    door.register()
    assert models.MODEL_TYPES.count("m2_encoder") == 1
    assert models.TYPE2FUNC["m2_encoder"] is door.load_for_clip_benchmark


@pytest.mark.parametrize("topk", [(1,), (1, 5), (3, 2)])
def test_accuracy_in_the_place_of_theirs_is_that_of_torchmetrics(topk: tuple[int, ...]) -> None:
    scores, targets = torch.randn(50, 7), torch.randint(7, (50,))
    for k, found in zip(topk, door._accuracy(scores, targets, topk), strict=True):
        wanted = MulticlassAccuracy(7, top_k=k, average="micro")(scores, targets)
        assert found == pytest.approx(float(wanted), abs=1e-7)


def test_accuracy_of_theirs_is_kept_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(module, "accuracy", kept := lambda *_arguments, **_options: [1.0])
    assert not door.mend_accuracy()
    assert module.accuracy is kept


def test_result_that_could_not_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("clip_benchmark")
    assert run_command(monkeypatch, "eval", "--model_type", "m2_encoder", "--model", "exports/one") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "puts the model exports/one into the name of a file; name a file, such as --output" in said


@pytest.mark.parametrize("arguments", [["--model", "a"], ["--model", "a/b", "--output", "x.json"], ["--output", "x"]])
def test_other_outputs_are_left_alone(arguments: list[str]) -> None:
    assert door.prepare_arguments(arguments) == arguments


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--model_type", "m2_encoder", "--model", "a"], ["--pretrained", "none"]),
        (["--model_type=m2_encoder"], ["--pretrained", "none"]),
        (["--model_type", "m2_encoder", "--pretrained", "step=3.ckpt"], []),
        (["--model_type", "open_clip"], []),
    ],
)
def test_weights_that_nobody_named_are_not_in_the_result(given: list[str], added: list[str]) -> None:
    assert door.prepare_arguments(given) == [*given, *added]


def test_model_that_is_not_there_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], classes: Path
) -> None:
    pytest.importorskip("clip_benchmark")
    places = ("--dataset", "wds/x", "--dataset_root", classes, "--output", classes / "x.json", "--quiet")
    missing = classes / "no-such-folder"
    more = ("--model_type", "m2_encoder", "--model", missing, *places)
    assert run_command(monkeypatch, "eval", *more, "--task", "zeroshot_classification") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(missing) in said


def test_checkpoint_is_given_as_pretrained(export: Path) -> None:
    with pytest.raises(UserError, match=r"step=3\.ckpt"):
        door.load_for_clip_benchmark(str(export), pretrained="step=3.ckpt")


def test_features_cannot_be_evaluated_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Path) -> None:
    opened = dataclasses.replace(open_model(export), model=None)
    monkeypatch.setattr(door, "open_model", lambda *_arguments, **_options: opened)
    with pytest.raises(UserError, match="x: are features, not a model"):
        door.load_for_clip_benchmark("x")


def test_texts_for_a_model_without_a_text_tower(export: Path) -> None:
    tokenizer = door.DoorTokenizer(dataclasses.replace(open_model(export), no_texts="it has no tokenizer"))
    with pytest.raises(UserError, match="it has no tokenizer; choose tasks that need pictures alone"):
        tokenizer(["a"])


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert run_command(monkeypatch, "eval") == 2
    said = capsys.readouterr().err
    assert "evaluations by CLIP_benchmark need the package clip_benchmark; install it" in said
