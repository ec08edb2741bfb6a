"""`m2-evaluate` on sets on disk: whatever is wrong is said in a line, and what is finished is kept."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder.cli.evaluate_suites import check_models
from m2_encoder.config.problems import format_problem
from m2_encoder.errors import UserError
from m2_encoder.evaluation.suite import prepare_tasks
from m2_encoder.evaluation.tasks.suite import Suite
from m2_encoder.models.m2_encoder import M2Encoder
from tests.support.peer_models import save_open_clip, save_transformers
from tests.support.suites import Evaluate, by_class, captioned, own, save_features, small_export

SUITE = "m2_encoder.evaluation.tasks.suite.Suite"
RETRIEVAL = "m2_encoder.evaluation.tasks.retrieval.Retrieval"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a set with captions, the same with a broken picture, and one of classes; never written to."""
    folder = tmp_path_factory.mktemp("suites")
    small_export(folder / "one")
    small_export(folder / "two", seed=1)
    broken = shutil.copytree(folder / "one", folder / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    captioned(folder / "own", 6)
    captioned(folder / "damaged", 6, broken=(0, 3))
    by_class(folder / "classes", 3, 3)
    features = {f"{row}.png": torch.rand(8) for row in range(6)}
    features |= {f"c{row // 3}/{row % 3}.png": torch.rand(8) for row in range(9)}
    save_features(folder / "pictures.npz", features)
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(tmp_path, capsys)


@pytest.fixture
def count_encoded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Counts pictures that models encode; optionally interrupts the run at a call."""

    def start(interrupt_at: int | None = None) -> list[int]:
        seen: list[int] = []

        def encode(self: M2Encoder, images: Tensor) -> Tensor:
            if len(seen) == interrupt_at:
                raise KeyboardInterrupt
            seen.append(len(images))
            return _ENCODE(self, images)

        monkeypatch.setattr(M2Encoder, "encode_image", encode)
        return seen

    return start


_ENCODE = M2Encoder.encode_image


def test_wrong_settings_are_listed_at_once(made: Path, evaluate: Evaluate) -> None:
    """Before a set or a model is read."""
    one, picture = made / "one", made / "own" / "0.png"
    wanted = {
        f"model=[{one},{one},nowhere]": [f"names {one} twice; give each model once", "model=nowhere: no such folder"],
        "evaluation.own.sets.more=here": ["evaluation.own.sets={own: {layout: own, path: "],
        "+evaluation.own.measures=[nope]": ["evaluation.own.measures=[nope]: must be a list of retrieval, text_retr"],
        "+evaluation.own.protocols=[]": ["evaluation.own.protocols=[]: must be a list of standard, m2-release"],
        "+evaluation.own.directions=[nope]": ["evaluation.own.directions=[nope]: must be a list of t2i, i2t"],
        "+evaluation.own.languages=zh": ["evaluation.own.languages=zh: must be a list of texts or null"],
        f"page={picture}": [f"page={picture}: exists; choose another name, or replace it with overwrite=true"],
        f"output={picture}/x": [f"output={picture}/x: cannot be written, because {picture} is no folder"],
    }
    given = [f"+{line}" if line.startswith("evaluation.own.sets.more") else line for line in wanted]
    found = evaluate(*own(made / "own"), *given)
    assert found.code == 2
    lines = found.err.splitlines()
    assert lines[0] == f"m2-evaluate: {len(lines) - 1} problems:"
    assert len(lines) == 1 + sum(map(len, wanted.values())), found.err
    for rule in (rule for rules in wanted.values() for rule in rules):
        assert rule in found.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("model=???", "evaluation=[emoji]"), "m2-evaluate: model=???: must be given; add model="),
        (("model=ONE", "evaluation=[]"), "evaluation=[]: measures nothing; choose a task or a suite"),
        (("model=ONE", "evaluation=[own]", "page=a.html", "output=./a.html"), "page=a.html: is given for two outputs"),
    ],
)
def test_wrong_choices(made: Path, evaluate: Evaluate, given: tuple[str, ...], said: str) -> None:
    found = evaluate(*(line.replace("ONE", str(made / "one")) for line in given))
    assert found.code == 2
    assert said in found.err


@pytest.mark.parametrize(
    ("model", "tasks", "page", "said"),
    [
        ([], [SUITE], None, "names no model; give one, or several as model=[A,B]"),
        (["hf:a", "hf:b"], [RETRIEVAL, SUITE], None, "evaluation.0 measures one model of this project; choose suites"),
        ("features:a.npz", [RETRIEVAL], None, "evaluation.0 measures one model of this project; choose suites"),
        ("m2-encoder-1b", [RETRIEVAL], "a.html", "m2_encoder_1B.ckpt is not on this machine"),
        ("hf:a", [SUITE], None, None),
        (["hf:a", "features:a.npz"], [SUITE], None, "model=features:a.npz: no such file or folder: a.npz"),
        (["hf:a", "hf:./a"], [SUITE], None, "model=hf:./a: no such file or folder: ./a"),
    ],
)
def test_wrong_models(model: Any, tasks: list[str], page: str | None, said: str | None) -> None:
    evaluation = {str(number): {"_target_": each} for number, each in enumerate(tasks)}
    cfg = {"model": model, "evaluation": evaluation, "weights": None, "tokenizer": None, "page": page, "device": "cpu"}
    problems = [format_problem(each) for each in check_models(cfg)]
    assert not problems if said is None else any(said in each for each in problems)
    assert any("page=a.html: is of what suites find" in each for each in problems) == (page is not None)


SETS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"path": "nowhere"}, {}, "evaluation.x.sets: no such folder or file: .*nowhere; put them there"),
    ({"layout": "nope"}, {}, "evaluation.x.sets.own.layout=nope: one of clip_benchmark, "),
    ({"layout": "xtd", "labels": None}, {}, "sets.own: .*own: layout xtd is a folder with test_image_names.txt"),
    ({"split": "x"}, {"layout": "own"}, "evaluation.x.sets.own.split: no setting of layout own; it has labels, name"),
    ({"train": "nowhere"}, {}, "evaluation.x.sets: no such folder or file: .*nowhere"),
    ({"path": "empty"}, {"layout": "own"}, "layout own is tars, a table, or a folder.* It holds nothing"),
    ({"path": "classes"}, {"layout": "own"}, "layout own is .* It holds c0, c1, c2; it fits layout image_folder"),
    ({"path": "classes", "labels": "names.txt"}, {}, "evaluation.x.sets.own: .* has 2 names, 3 folders are there"),
    ({"path": "half"}, {"layout": "clip_benchmark"}, "0.tar: is no whole tar: .*; download it again"),
    ({"path": "lacking"}, {"layout": "clip_benchmark"}, "1 of 2 tars are missing: 1.tar; complete the download"),
]


@pytest.mark.parametrize(("settings", "more", "said"), SETS)
def test_sets_that_cannot_be_read(
    made: Path, tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").symlink_to(made / "own")
    (tmp_path / "classes").symlink_to(made / "classes")
    (tmp_path / "names.txt").write_text("红色\n绿色\n", encoding="utf-8")
    for part, count in (("half", 1), ("lacking", 2)):
        (tmp_path / part / "test").mkdir(parents=True)
        (tmp_path / part / "classnames.txt").write_text("red\n", encoding="utf-8")
        (tmp_path / part / "test" / "nshards.txt").write_text(f"{count}\n", encoding="utf-8")
        (tmp_path / part / "test" / "0.tar").write_bytes(_half_a_tar(made / "own"))
    own_settings = {"path": "own", **more, **settings}
    if settings.get("labels"):
        own_settings["labels"] = str(tmp_path / settings["labels"])
    with pytest.raises(UserError, match=said):
        prepare_tasks({"x": Suite(sets={"own": own_settings})}, lambda path: tmp_path / path)


def test_all_missing_sets_are_named(tmp_path: Path) -> None:
    suites = {name: Suite(sets={"a": None, "b": {"path": "c"}}, root=name) for name in ("one", "two")}
    with pytest.raises(UserError) as caught:
        prepare_tasks(suites, lambda path: tmp_path / path)
    assert [problem.key for problem in caught.value.problems] == ["evaluation.one.sets", "evaluation.two.sets"]
    assert f"no such folder or file: {tmp_path}/two/a, {tmp_path}/c; put them there" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"templates": ["nope"]}, "evaluation.x.templates=nope: no such family or file; choose general"),
        ({"languages": ["xx", "zz"]}, r"evaluation.x.languages=\[xx, zz\]: none of these is in its sets; there are"),
    ],
)
def test_what_does_not_fit_the_sets(made: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare_tasks({"x": Suite(sets={"own": {"path": str(made / "own")}}, **settings)}, Path)


def test_a_set_without_a_usable_picture(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    captioned(tmp_path / "garbage", 4, broken=(0, 1, 2, 3))
    found = evaluate(f"model={made / 'one'}", *own(tmp_path / "garbage"))
    assert found.code == 2
    assert found.err.startswith("m2-evaluate: own: no picture could be used: 0.png (not an image that is read here")
    assert len(found.err.splitlines()) == 1


def _half_a_tar(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(6):
            tar.add(folder / f"{number}.png", f"{number}.png")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
    return buffer.getvalue()[:3000]


def test_pictures_that_do_not_decode_are_counted_and_named_everywhere(made: Path, evaluate: Evaluate) -> None:
    found = evaluate(f"model={made / 'one'}", *own(made / "damaged", f"page={evaluate.page}"))
    assert (found.code, found.err) == (0, "")
    assert list(found.report["left_out"]) == ["own"]
    assert [line.split(":")[0] for line in found.report["left_out"]["own"]] == ["0.png", "3.png"]
    assert {(each["left_out"], each["remark"]) for each in found.report["records"]} == {
        (2, "2 of 6 pictures could not be used")
    }
    assert found.number("t2i_r@1", language="en")["n"] == 8
    assert "own: pictures that could not be used: 2, such as 0.png: not an image" in found.out
    page = evaluate.page.read_text(encoding="utf-8")
    assert "<li>own: 2 of 6 pictures could not be used</li>" in page
    assert "<li>3.png: not an image" in page
    assert found.report["models"][0]["ms_per_image"] > 0, "costs are measured on pictures that decode"


def test_a_model_that_fails_does_not_take_the_others_with_it(made: Path, evaluate: Evaluate) -> None:
    models = [made / "broken", made / "one", f"features:{made / 'pictures.npz'}"]
    given = f"model=[{','.join(map(str, models))}]"
    found = evaluate(given, *own(made / "own", f"page={evaluate.page}"))
    assert found.code == 2
    first, *rest = found.err.splitlines()
    assert first == "m2-evaluate: 2 problems:"
    assert f"model={models[0]}: " in rest[0]
    assert "damaged or not a safetensors file" in rest[0]
    assert f"model={models[2]}: " in rest[1]
    assert "names no file of texts" in rest[1]
    assert {each["model"] for each in found.report["records"]} == {"one"}
    assert len(found.report["failed"]) == 2
    assert "not measured" in evaluate.page.read_text(encoding="utf-8")
    assert "Retrieval, percent" in found.out


def test_an_error_of_somebody_elses_code_keeps_the_finished_models(
    made: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(self: M2Encoder, images: Tensor) -> Tensor:
        if met.setdefault(self.logit_scale.data_ptr(), len(met)):
            raise RuntimeError("CUDA out of memory")
        return _ENCODE(self, images)

    met: dict[int, int] = {}
    monkeypatch.setattr(M2Encoder, "encode_image", encode)
    found = evaluate(f"model=[{made / 'one'},{made / 'two'}]", *own(made / "own"))
    assert found.code == 1
    assert "CUDA out of memory" in found.err
    assert {each["model"] for each in found.report["records"]} == {"one"}
    assert found.report["failed"] == ["CUDA out of memory"]


def test_pictures_alone_suffice_for_what_needs_no_texts(made: Path, evaluate: Evaluate) -> None:
    lines = own(made / "classes", "evaluation.own.sets.own.layout=image_folder", "+evaluation.own.measures=[probes]")
    train = f"+evaluation.own.sets.own.train={made / 'classes'}"
    model = f"features:{made / 'pictures.npz'}"
    found = evaluate(f"model=[{made / 'one'},{model}]", *lines, train)
    assert (found.code, found.err) == (0, "")
    assert [each["value"] for each in found.numbers("knn_top1")] == [100, 100], "each is its own neighbour"
    assert {each["name"]: each["parameters"] for each in found.report["models"]}["pictures.npz"] is None


@pytest.mark.slow
def test_peers_stand_beside_ours_in_the_order_given(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    peers = [f"open_clip:{save_open_clip(tmp_path / 'oc')}", f"hf:{save_transformers(tmp_path / 'sg', 'siglip')}"]
    found = evaluate(f"model=[{made / 'two'},{','.join(peers)}]", *own(made / "own"))
    assert found.code == 0
    assert "m2-evaluate" not in found.err
    assert [each["name"] for each in found.report["models"]] == ["two", "oc", "sg"]
    assert [each["model"] for each in found.numbers("mean_recall", language="zh")] == ["two", "oc", "sg"]
    table = found.out.rpartition("Models")[2].split("─")[-1]
    assert [line.split()[0] for line in table.splitlines() if line.strip()][:3] == ["two", "oc", "sg"]
    assert all(each["peak_mb"] > 0 and each["ms_per_text"] > 0 for each in found.report["models"])


def test_models_of_one_name_keep_their_paths(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    other = shutil.copytree(made / "two", tmp_path / "one" / "export")
    found = evaluate(f"model=[{made / 'one'},{other}]", *own(made / "own"))
    assert found.code == 0
    assert [each["name"] for each in found.report["models"]] == [str(made / "one"), str(other)]
    assert len(found.numbers("mean_recall", language="zh")) == 2


def test_an_interrupted_run_goes_on_and_a_finished_one_encodes_nothing(
    made: Path, evaluate: Evaluate, count_encoded: Callable[..., list[int]]
) -> None:
    lines = (f"model={made / 'one'}", *own(made / "own"), "batch_size=2")
    seen = count_encoded(interrupt_at=2)
    assert evaluate(*lines).code == 130
    assert seen == [2, 2]
    seen = count_encoded()
    first = evaluate(*lines)
    assert (first.code, seen) == (0, [2])
    second = evaluate(*lines, number="second")
    assert (second.code, seen) == (0, [2])
    for each in (*first.report["records"], *second.report["records"]):
        assert each.pop("seconds") >= 0
    assert second.report["records"] == first.report["records"]


def test_full_disk_while_features_are_stored(
    made: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, count_encoded: Callable[..., list[int]]
) -> None:
    write, written = os.pwrite, []

    def refuse(file: int, content: Any, offset: int) -> int:
        if len(written) > 2:
            raise OSError(28, "No space left on device")
        written.append(file)
        return write(file, content, offset)

    lines = (f"model={made / 'one'}", *own(made / "own"), "batch_size=2")
    monkeypatch.setattr(os, "pwrite", refuse)
    found = evaluate(*lines)
    monkeypatch.setattr(os, "pwrite", write)
    assert found.code == 2
    assert "No space left on device; make room there and start again; what is finished is kept" in found.err
    seen = count_encoded()
    assert evaluate(*lines).code == 0
    assert sum(seen) == 2, "four were stored"


def test_full_disk_at_the_page_loses_no_number(made: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def refuse(path: Path, *given: Any, **more: Any) -> int:
        if "page.html" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *given, **more)

    monkeypatch.setattr(Path, "write_text", refuse)
    found = evaluate(f"model={made / 'one'}", *own(made / "own", f"page={evaluate.page}"))
    assert found.code == 2
    assert f"m2-evaluate: page={evaluate.page}: cannot be written (No space left on device)" in found.err
    assert not evaluate.page.exists()
    assert found.numbers("mean_recall")
