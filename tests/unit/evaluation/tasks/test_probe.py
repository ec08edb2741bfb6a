"""The probe task through `m2-evaluate`: a folder of classes, two folders, files of features, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from m2_encoder.evaluation.measures.few_shot import measure_few_shot, split_classes
from m2_encoder.evaluation.measures.probes import Labelled
from tests.support.suites import Evaluate, by_class, captioned, save_features, small_export

FEW = ("evaluation.probe.shots=[1,2]", "evaluation.probe.seeds=3")


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(tmp_path, capsys)


def probe(path: Path, *lines: str) -> list[str]:
    return ["evaluation=[probe]", f"evaluation.probe.sets.own.path={path}", *FEW, *lines]


def test_a_folder_of_classes_and_its_names_in_two_languages(evaluate: Evaluate, tmp_path: Path) -> None:
    model = small_export(tmp_path / "model")
    pictures = by_class(tmp_path / "pictures", 3, 6)
    (tmp_path / "names.txt").write_text("c0\t圆\tcircle\nc1\t方\tsquare\nc2\t点\tdot\n", encoding="utf-8")
    done = evaluate(*probe(pictures, f"evaluation.probe.sets.own.labels={tmp_path / 'names.txt'}"), f"model={model}")
    assert done.code == 0, done.err
    for language in ("zh", "en"):
        assert done.number("top1", language=language)["n"] == 9
        assert done.number("top1_all", protocol="clap", language=language)["n"] == 9
        assert done.number("top1_1_shot", protocol="clap_std", language=language)["value"] >= 0
    for way in ("knn", "linear"):
        for metric in ("top1_1_shot", "top1_2_shot", "top1_all"):
            assert done.number(metric, protocol=way)["chance"] == pytest.approx(100 / 3)
    assert not done.numbers("top1_all", protocol="linear_std"), "all pictures are drawn once"
    assert "Few shots, percent" in done.out
    assert "means of 3 draws, and their standard deviations" in done.out


def test_numbers_are_those_of_the_features(evaluate: Evaluate, tmp_path: Path) -> None:
    """Of a file of features, without any text: the split and the draws can be done again."""
    pictures = by_class(tmp_path / "pictures", 3, 8)
    torch.manual_seed(0)
    targets = torch.arange(24) // 8
    features = torch.randn(3, 8)[targets] + 0.8 * torch.randn(24, 8)
    table = save_features(tmp_path / "f.npz", {f"c{n // 8}/{n % 8}.png": features[n] for n in range(24)})
    done = evaluate(*probe(pictures, "evaluation.probe.test=0.25"), f"model=features:{table}")
    assert done.code == 0, done.err
    asked = split_classes(targets, 0.25)
    assert int(asked.sum()) == 6
    unit = normalize(features, dim=1)
    train, test = Labelled(unit[~asked], targets[~asked]), Labelled(unit[asked], targets[asked])
    for each in measure_few_shot(train, test, [], num_classes=3, shots=[1, 2], seeds=3):
        metric = "top1_all" if each.shots is None else f"top1_{each.shots}_shot"
        for way, own in (("knn", each.knn), ("linear", each.linear)):
            assert done.number(metric, protocol=way)["value"] == pytest.approx(sum(own) / len(own))
            if len(own) > 1:
                spread = float(torch.tensor(own, dtype=torch.float64).std())
                assert done.number(metric, protocol=f"{way}_std")["value"] == pytest.approx(spread)
    assert not done.numbers("top1"), "no text, no zero-shot"


def test_another_folder_to_learn_from(evaluate: Evaluate, tmp_path: Path) -> None:
    asked, learnt = by_class(tmp_path / "asked", 2, 3), by_class(tmp_path / "learnt", 2, 5)
    model = small_export(tmp_path / "model")
    done = evaluate(*probe(asked, f"evaluation.probe.sets.own.train={learnt}"), f"model={model}")
    assert done.code == 0, done.err
    assert done.number("top1_all", protocol="linear")["n"] == 6


def test_what_cannot_be_is_said_in_a_line(evaluate: Evaluate, tmp_path: Path) -> None:
    model = small_export(tmp_path / "model")
    lines = probe(by_class(tmp_path / "pictures", 2, 3), f"model={model}")
    for wrong, said in (
        (["evaluation.probe.shots=[0]"], "evaluation.probe.shots=[0]: must be a list of whole numbers in 1..1024"),
        ([f"evaluation.probe.sets.own.train={by_class(tmp_path / 'three', 3, 2)}"], "has 2 classes, and its training"),
        ([f"evaluation.probe.sets.own.path={by_class(tmp_path / 'single', 2, 1)}"], "no class has two pictures"),
        ([f"evaluation.probe.sets.own.path={captioned(tmp_path / 'own', 2)}"], "evaluation.probe.sets.own"),
    ):
        done = evaluate(*lines, *wrong)
        assert done.code != 0
        assert said in done.err, done.err
        assert len(done.err.strip().splitlines()) == 1
