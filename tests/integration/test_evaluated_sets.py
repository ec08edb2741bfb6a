"""Which sets `m2-evaluate` measures, what they are called, and what it does with those that it cannot measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.suites import Evaluate, by_class, captioned, own, small_export


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one that cannot be opened, a set with captions, and one of classes; never written to."""
    folder = tmp_path_factory.mktemp("sets")
    small_export(folder / "one")
    weights = shutil.copytree(folder / "one", folder / "broken") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    captioned(folder / "own", 6)
    by_class(folder / "classes", 3, 3)
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(tmp_path, capsys)


def test_a_style_that_was_trained_on_is_said(evaluate: Evaluate, emoji_folder: Path, tmp_path: Path) -> None:
    honest = small_export(tmp_path / "honest", provenance={"heldout_style": "twemoji"})
    other = small_export(tmp_path / "other", provenance={"heldout_style": "noto"}, seed=1)
    places = f"evaluation.own.sets.own.path={emoji_folder}", "+evaluation.own.sets.own.split=heldout_families"
    more = "evaluation.own.sets.own.layout=emoji", "+evaluation.own.measures=[retrieval]"
    found = evaluate(f"model=[{honest},{other}]", "evaluation=[own]", *places, *more)
    assert found.code == 0, found.err
    remarks = {each["model"]: each.get("remark", "") for each in found.report["records"]}
    assert remarks == {"honest": "", "other": "other was trained on drawings of twemoji"}
    assert "own: other was trained on drawings of twemoji" in " ".join(found.out.split())


def test_a_set_that_fails_does_not_take_the_others_with_it(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    captioned(tmp_path / "bad", 2, broken=(0, 1))
    more = f"+evaluation.own.sets.bad={{layout: own, path: {tmp_path / 'bad'}}}"
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), more, f"page={evaluate.page}")
    assert found.code == 2
    assert "evaluation.own.sets.bad: bad: no picture could be used" in found.err
    assert "bad: no picture could be used" in found.report["failed"][0]
    assert {each["dataset"] for each in found.report["records"]} == {"own"}
    assert "mean recall" in found.out
    assert evaluate.page.is_file()


def test_a_first_set_that_fails_costs_no_number(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    bad = captioned(tmp_path / "bad", 2, broken=(0, 1))
    more = f"+evaluation.own.sets.good={{layout: own, path: {made / 'own'}}}"
    found = evaluate(f"model={made / 'one'}", *own(bad), more, f"page={evaluate.page}")
    assert found.code == 2
    assert {each["dataset"] for each in found.report["records"]} == {"good"}
    assert found.report["models"][0]["ms_per_image"] > 0, "measured on pictures of the other set"
    assert evaluate.page.is_file()


def test_a_set_has_the_name_that_it_is_given_and_no_two_have_one(made: Path, evaluate: Evaluate) -> None:
    named = "+evaluation.own.sets.own.name=我的/照片"
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), named)
    assert {each["dataset"] for each in found.report["records"]} == {"我的/照片"}
    twice = f"+evaluation.own.sets.again={{path: {made / 'own'}, name: '我的/照片'}}"
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), named, twice)
    assert found.code == 2
    assert "evaluation.own.sets.again: its set is called 我的/照片, as that of evaluation.own.sets.own" in found.err


def test_some_sets_are_chosen(made: Path, evaluate: Evaluate) -> None:
    missing = "+evaluation.own.sets.far={path: /no/such/place}"
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), missing)
    assert "no such folder or file: /no/such/place" in found.err
    assert "measure what is there by only=[own]" in found.err
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), missing, "+evaluation.own.only=[own]")
    assert found.code == 0, found.err
    found = evaluate(f"model={made / 'one'}", *own(made / "own"), "+evaluation.own.only=[else]")
    assert "evaluation.own.only=else: no such set; there are own" in found.err


def test_a_language_without_a_caption_is_said_and_left_out(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    place = tmp_path / "xm3600"
    (place / "images").mkdir(parents=True)
    lines = []
    for row in range(4):
        shutil.copy(made / "own" / f"{row}.png", place / "images" / f"{row}.jpg")
        captions = {"en": {"caption": [f"one {row}"]}, "zh": {"caption": [f"图 {row}"]}, "de": {"caption": []}}
        lines.append(json.dumps({"image/key": str(row), **captions}))
    (place / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    where = f"evaluation.xm3600.sets.xm3600.path={place}"
    found = evaluate(f"model={made / 'one'}", "evaluation=[xm3600]", where, "evaluation.xm3600.languages=[zh,de]")
    assert found.code == 0, found.err
    assert "xm3600: no set has texts in de" in found.out
    assert {each["language"] for each in found.report["records"] if each["task"] == "retrieval"} == {"zh"}


def test_templates_of_equal_names_and_languages_without_any(made: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    for folder, row in (("a", "a picture of {}"), ("b", "{} here")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text(row, encoding="utf-8")
    (tmp_path / "names.txt").write_text("folder\tde\ten\nc0\tHund\tdog\nc1\tKatze\tcat\nc2\tHaus\thouse\n")
    labels = f"evaluation.own.sets.own.labels={tmp_path / 'names.txt'}"
    both = f"+evaluation.own.templates=[general,{tmp_path / 'a' / 't.txt'},{tmp_path / 'b' / 't.txt'}]"
    found = evaluate(f"model={made / 'one'}", *own(made / "classes"), labels, both)
    assert found.code == 0, found.err
    own_files = {str(tmp_path / folder / "t.txt") for folder in "ab"}
    assert {each["templates"] for each in found.numbers("top1", language="en")} == {"general", *own_files}
    found = evaluate(f"model={made / 'one'}", *own(made / "classes"), labels)
    (german,) = found.numbers("top1", language="de")
    assert (german["templates"], german["remark"]) == ("none", "names alone, as no template is in de")


def test_nothing_to_measure_is_said_before_a_model_is_opened(made: Path, evaluate: Evaluate) -> None:
    found = evaluate(f"model={made / 'broken'}", *own(made / "own"), "+evaluation.own.measures=[probes]")
    assert found.err == "m2-evaluate: evaluation.own.sets: nothing to measure: own has nothing for probes\n"
