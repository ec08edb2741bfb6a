"""Whether the numbers of `m2-evaluate` on sets on disk are true, through the whole command."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import tarfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import m2_encoder
from m2_encoder.evaluation.records import Record
from m2_encoder.evaluation.sets import published
from tests.support.suites import Evaluate, by_class, captioned, captions_of, draw, own, save_features, small_export

NUMBER = 48  # pictures


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(tmp_path, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with captions and one of classes; never written to."""
    made = tmp_path_factory.mktemp("numbers")
    captioned(made / "own", NUMBER)
    by_class(made / "classes", 6, 8)
    (made / "names.txt").write_text("".join(f"c{row}\t类{row}\tclass {row}\n" for row in range(6)), encoding="utf-8")
    small_export(made / "one")
    return made


def _known_model(folder: Path, name: str, pictures: Tensor, texts: Tensor) -> str:
    """Files of features: row n for picture n and all its captions; and so for classes."""
    images = {f"{row}.png": pictures[row] for row in range(NUMBER)}
    images |= {f"c{row // 8}/{row % 8}.png": pictures[row // 8] for row in range(NUMBER)}
    words = {text: texts[row] for row in range(NUMBER) for own_words in captions_of(row).values() for text in own_words}
    words |= {text: texts[row] for row in range(6) for text in (f"类{row}", f"class {row}")}
    first = save_features(folder / f"{name}.npz", images)
    return f"features:{first},{save_features(folder / f'{name}_texts.npz', words)}"


def test_perfect_shuffled_and_collapsed_models(folder: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    features = functional.normalize(torch.randn(NUMBER, 64), dim=1)
    shuffled = torch.cat([torch.randperm(6), 6 + torch.randperm(NUMBER - 6)])
    same = features[:1].expand(NUMBER, -1)
    models = [
        _known_model(tmp_path, "perfect", features, features),
        _known_model(tmp_path, "shuffled", features, features[shuffled]),
        _known_model(tmp_path, "collapsed", same, same),
    ]
    classes = f"{{layout: own, path: {folder / 'classes'}, labels: {folder / 'names.txt'}}}"
    quoted = ",".join(f"'{each}'" for each in models)
    lines = own(folder / "own", f"+evaluation.own.sets.cls={classes}", "+evaluation.own.templates=[none]")
    found = evaluate(f"model=[{quoted}]", *lines, f"page={evaluate.page}")
    assert (found.code, found.err) == (0, "")
    recalls = [each for each in found.report["records"] if each["task"] in ("retrieval", "classification")]
    metrics = [f"{way}_r@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    assert {each["metric"] for each in recalls} == {*metrics, "mean_recall", "top1", "top5", "mean_per_class"}
    for each in recalls:
        assert each["low"] - 1e-9 <= each["value"] <= each["high"] + 1e-9
        if each["model"] == "perfect.npz":
            assert each["value"] == 100
        elif each["model"] == "collapsed.npz":
            assert each["value"] == 0, "ties count against it"
            assert each["ties"] == 100
    chance = [each for each in recalls if each["model"] == "shuffled.npz" and each["metric"] == "mean_recall"]
    assert [each["language"] for each in chance] == ["en", "zh"]
    for each in chance:
        assert 0 < each["chance"] < 15
        assert each["value"] == pytest.approx(each["chance"], abs=6)
        assert each["low"] < each["chance"] < each["high"]
    for language, texts in (("en", 2), ("zh", 1)):
        own_numbers = {each["metric"]: each for each in recalls if (each["model"], each["dataset"]) == (
            "shuffled.npz", "own") and each["language"] == language}  # fmt: skip
        assert own_numbers["t2i_r@1"]["n"] == texts * NUMBER
        assert own_numbers["i2t_r@1"]["n"] == NUMBER
        assert own_numbers["mean_recall"]["n"] == (texts + 1) * NUMBER
        mean = sum(own_numbers[name]["value"] for name in metrics) / 6
        assert own_numbers["mean_recall"]["value"] == pytest.approx(mean)
    known = {field.name for field in dataclasses.fields(Record)}
    for each in found.report["records"]:
        assert each.keys() <= known
        assert {"model", "dataset", "task", "metric", "value", "n", "checkpoint", "seconds"} <= each.keys()
        assert each["task"] != "retrieval" or {"language", "protocol", "low", "high", "chance", "ties"} <= each.keys()
        assert each["task"] != "classification" or each["templates"] == "none"
        assert each["task"] != "classification" or each["label_set"] == "names.txt"
    _check_page(evaluate.page.read_text(encoding="utf-8"))


def _check_page(page: str) -> None:
    assert "perfect.npz" in page
    assert "第0个圆" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(|<link|fetch\(""", page), "it needs nothing beside"
    results = page[page.index("<h2>Results") : page.index("<h2>Chinese beside")]
    assert [each for each in re.findall(r'<td class="word">([a-z]+)</td>', results) if each in ("zh", "en")] == [
        "zh", "en", "zh", "en"
    ]  # fmt: skip
    beside = page[page.index("<h2>Chinese beside") : page.index("<h2>Models")]
    assert beside.count("<tr>") == 1 + 2 * 3
    every = page[page.index("<h2>All numbers") :]
    tasks = list(dict.fromkeys(re.findall(r'<tr><td class="word">([a-z ]+)</td>', every)))
    assert tasks == ["retrieval", "classification", "geometry"]
    rows = [row for row in every.split("<tr>") if '<td class="word">geometry</td>' in row]
    assert rows
    assert not any("<svg" in row for row in rows), "they are no percentages"


def test_numbers_are_those_of_plain_code(folder: Path, evaluate: Evaluate) -> None:
    found = evaluate(f"model={folder / 'one'}", *own(folder / "own"))
    model, preprocess, tokenizer = m2_encoder.load(folder / "one")
    rows = range(NUMBER)
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(folder / "own" / f"{row}.png") for row in rows]))
        for language, each in (("zh", 1), ("en", 2)):
            words = [text for row in rows for text in captions_of(row)[language]]
            scores = model.encode_text(tokenizer(words)) @ images.T
            owner = torch.arange(len(words)) // each
            own_score = scores[torch.arange(len(words)), owner]
            ranks = (scores >= own_score[:, None] - 1e-7).sum(1)
            for k in (1, 5, 10):
                wanted = 100 * float((ranks <= k).float().mean())
                number = found.number(f"t2i_r@{k}", language=language, subset="")
                assert number["value"] == pytest.approx(wanted, abs=100 / len(words) + 1e-6)
                assert number["chance"] == pytest.approx(100 * k / NUMBER)


@pytest.mark.parametrize("name", ["plain", "ragged"])
def test_m2_release_gives_the_official_numbers(parity_dir: Path, evaluate: Evaluate, tmp_path: Path, name: str) -> None:
    source = parity_dir / "retrieval" / f"{name}.jsonl"
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    tensors = load_file(parity_dir / "retrieval" / f"{name}.safetensors")
    (tmp_path / "set").mkdir()
    for row, line in enumerate(lines):
        draw(row).save(tmp_path / "set" / line["image"])
    file = tmp_path / "set" / f"{name}.jsonl"
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    texts = [text for line in lines for text in line["caption"]]
    cleaned = [text.lower().replace("“", '"').replace("”", '"') for text in texts]
    images = save_features(
        tmp_path / "i.npz", {line["image"]: tensors["image_features"][row] for row, line in enumerate(lines)}
    )
    both = {text: feature for words in (texts, cleaned) for text, feature in zip(words, tensors["text_features"])}  # noqa: B905
    model = f"features:{images},{save_features(tmp_path / 't.npz', both)}"
    more = ("evaluation.own.sets.own.layout=caption_lines", "+evaluation.own.protocols=[m2-release,standard]")
    found = evaluate(f"model='{model}'", *own(file, *more, "+evaluation.own.measures=[retrieval]"))
    assert (found.code, found.err) == (0, "")
    wanted = json.loads((parity_dir / "retrieval" / "expected.json").read_text())[name]["official"]
    for metric, value in wanted.items():
        own_name = "mean_recall" if metric == "MR" else metric.lower()
        assert found.number(own_name, protocol="m2-release")["value"] == pytest.approx(value, abs=0.051)
    assert {each["protocol"] for each in found.report["records"]} == {"m2-release", "standard"}


def test_published_numbers_stand_beside_what_measures_the_same(
    folder: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = (tmp_path / "m2-encoder-0.4b").resolve()
    official.symlink_to(folder / "one")
    captioned(tmp_path / "zh", 8)
    captioned(tmp_path / "more", 9)
    captioned(tmp_path / "broken", 8, broken=(3,))
    sizes = {"flickr30k_cn": published._Size(8), "coco_cn": published._Size(8), "flickr30k": published._Size(8)}
    sizes["imagenet"] = published._Size(48, classes=6)
    monkeypatch.setattr(published, "_SIZES", {**published._SIZES, **sizes})
    (tmp_path / "clip.txt").write_text("a photo of {}.\n", encoding="utf-8")
    sets = {
        "flickr30k_cn": {"path": tmp_path / "zh"},
        "coco_cn": {"path": tmp_path / "more"},
        "flickr30k": {"path": tmp_path / "broken"},
        "another": {"path": tmp_path / "zh"},
        "imagenet": {"path": folder / "classes", "labels": folder / "names.txt"},
    }
    lines = [
        f"+evaluation.own.sets.{name}={{layout: own, {', '.join(f'{key}: {value}' for key, value in each.items())}}}"
        for name, each in sets.items()
    ]
    other = small_export(tmp_path / "other", seed=3)
    found = evaluate(
        f"model=[{official},{other}]", "evaluation=[own]", "~evaluation.own.sets.own", *lines,
        "+evaluation.own.protocols=[standard,m2-release]", f"+evaluation.own.templates=[general,{tmp_path}/clip.txt]",
        "+evaluation.own.measures=[retrieval,zero_shot]",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    shown = [
        (each["dataset"], each["language"], each.get("protocol", ""), each.get("templates", ""), each["metric"])
        for each in found.report["records"]
        if "published" in each
    ]
    metrics = [f"{way}_r@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)] + ["mean_recall"]
    wanted = [("flickr30k_cn", "zh", "m2-release", "", metric) for metric in metrics]
    assert sorted(shown) == sorted([*wanted, ("imagenet", "en", "", "clip", "top1")])
    assert found.number("t2i_r@1", protocol="m2-release", dataset="flickr30k_cn", language="zh", model=official.name)[
        "published"
    ] == pytest.approx(72.5)
    assert {each["remark"] for each in found.numbers("mean_recall", dataset="coco_cn")} == {"9 pictures, 8 published"}
    assert all(each["remark"] for each in found.numbers("mean_recall", dataset="flickr30k"))


def test_all_published_numbers_are_of_sets_of_known_size() -> None:
    text = (files("m2_encoder") / "assets" / "published" / "numbers.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["dataset"] for row in rows} <= published._SIZES.keys()
    assert {(row["task"], row["protocol"]) for row in rows} == {
        ("retrieval", "m2-release"), ("retrieval", "standard"), ("classification", "")
    }  # fmt: skip


def test_names_that_a_language_lacks(folder: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    """Babel-ImageNet: a class without a name in a language is not measured there, and that is said."""
    names = {"ZH": [[0, 2, 5], ["红", "绿", "蓝"]], "EN": [[0, 1, 2, 3, 4, 5], ["a", "b", "c", "d", "e", "f"]]}
    file = tmp_path / "babel.json"
    file.write_text(json.dumps({**names, "DE": [[1], ["eins"]]}), encoding="utf-8")
    found = evaluate(
        f"model={folder / 'one'}", "evaluation=[babel_imagenet]",
        f"evaluation.babel_imagenet.sets.babel_imagenet.path={file}",
        f"evaluation.babel_imagenet.sets.babel_imagenet.images={folder / 'classes'}",
        "evaluation.babel_imagenet.languages=[zh,en,de]",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    assert {(each["language"], each["templates"], each["n"]) for each in found.numbers("top1")} == {
        ("zh", "none", 24), ("zh", "general", 24), ("en", "none", 48), ("en", "general", 48), ("de", "none", 8)
    }  # fmt: skip
    assert "3 of 6 classes have a name" in found.numbers("top1", language="zh")[0]["remark"]
    assert found.numbers("top1", language="de")[0]["value"] == 100, "of one class"


def test_subsets_are_measured_among_themselves(evaluate: Evaluate, folder: Path, tmp_path: Path) -> None:
    stamps = tmp_path / "stamps"
    for place in ("animals", "symbols/numbers"):
        (stamps / place).mkdir(parents=True)
        for row in range(5):
            draw(row + len(place)).save(stamps / place / f"{row}.png")
            words = f"{place} {row}\nzh_CN.utf8=图{place}{row}\n"
            (stamps / place / f"{row}.txt").write_text(words, encoding="utf-8")
    found = evaluate(
        f"model={folder / 'one'}", "evaluation=[tuxpaint]", f"evaluation.tuxpaint.sets.tuxpaint.path={stamps}",
        "evaluation.tuxpaint.measures=[retrieval]",
    )  # fmt: skip
    assert (found.code, found.err) == (0, "")
    numbers = {each.get("subset", ""): each for each in found.numbers("t2i_r@1", language="en")}
    assert {name: each["n"] for name, each in numbers.items()} == {"": 10, "pictures": 5, "symbols": 5}
    assert {name: each["chance"] for name, each in numbers.items()} == pytest.approx(
        {"": 10, "pictures": 20, "symbols": 20}
    )


def test_names_are_no_markup(evaluate: Evaluate, folder: Path, tmp_path: Path) -> None:
    evil = """<script>alert("1")</script> & 'x' [bold]y[/bold] {{ 7*7 }}"""
    (tmp_path / "set").mkdir()
    for row in range(3):
        Image.new("RGB", (9 + row, 9), (row * 60, 9, 9)).save(tmp_path / "set" / f"{row}.png")
        (tmp_path / "set" / f"{row}.txt").write_text(f"{evil} {row}", encoding="utf-8")
    model = tmp_path / "<b>m'o"
    model.symlink_to(folder / "one")
    other = small_export(tmp_path / "other", seed=3)
    found = evaluate(f"""model=["{model}",{other}]""", *own(tmp_path / "set", f"page={evaluate.page}"))
    assert (found.code, found.err) == (0, "")
    page = evaluate.page.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<b>m" not in page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#39;x&#39; [bold]y[/bold] {{ 7*7 }} 0" in page
    assert "<b>m'o" in found.out


def test_several_classes_at_once(evaluate: Evaluate, tmp_path: Path) -> None:
    """A web dataset of CLIP_benchmark with npy labels; average precision by its definition."""
    labels = torch.rand(20, 4) < 0.4
    labels[0] = True
    folder = tmp_path / "wds"
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for row in range(20):
            for suffix, content in (("png", _png(row)), ("npy", _npy(labels[row]))):
                member = tarfile.TarInfo(f"{row:02d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name, text in (("test/nshards", "1"), ("dataset_type", "multilabel"), ("classnames", "ant\nbee\ncow\ndog")):
        (folder / f"{name}.txt").write_text(f"{text}\n", encoding="utf-8")
    pictures, names = (functional.normalize(torch.randn(number, 8), dim=1) for number in (20, 4))
    first = save_features(tmp_path / "i.npz", {f"0.tar:{row:02d}.png": pictures[row] for row in range(20)})
    second = save_features(tmp_path / "t.npz", dict(zip(("ant", "bee", "cow", "dog"), names, strict=True)))
    lines = own(folder, "evaluation.own.sets.own.layout=clip_benchmark", "+evaluation.own.templates=[none]")
    found = evaluate(f"model='features:{first},{second}'", *lines)
    assert (found.code, found.err) == (0, "")
    precisions = []
    for number in range(4):
        right = labels[(pictures @ names[number]).argsort(descending=True), number].float()
        precisions.append(float((right.cumsum(0) / torch.arange(1, 21))[right.bool()].mean()))
    assert found.number("map")["value"] == pytest.approx(100 * sum(precisions) / 4, abs=1e-3)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    draw(number).save(buffer, "png")
    return buffer.getvalue()


def _npy(values: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values.numpy().astype(np.int64))
    return buffer.getvalue()
