"""m2-search from the command line on, with a small exported model and files as users have them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2_encoder import load
from m2_encoder.cli import search
from m2_encoder.cli.search import name_places
from m2_encoder.config.overrides import parse_override
from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import open_index
from m2_encoder.picture_search.model import open_search_model
from m2_encoder.picture_search.update import update_index
from tests.support.graphs import small_graphs
from tests.support.pictures import export_small, write_picture

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_small(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["m2-search", *arguments])
        code = search.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_index_made_and_brought_up_to_date(run: Run, exported: Path, tmp_path: Path) -> None:
    for number in range(3):
        write_picture(tmp_path / "my photos" / f"{number}.png", number)
    code, out, _ = run("index", "my photos", f"model={exported}", "num_workers=0", "batch_size=2")
    assert (code, out) == (0, "3 pictures (3 new, 0 changed, 0 deleted): my photos.index\n")
    assert open_index("my photos.index").names == ["0.png", "1.png", "2.png"]
    (tmp_path / "my photos" / "bad.png").write_text("none")
    code, out, err = run("index", "my photos", "num_workers=0")
    assert (code, out) == (1, "3 pictures (0 new, 0 changed, 0 deleted): my photos.index\n")
    assert "1 skipped:\n  bad.png: not an image that is read here" in err


@pytest.fixture(scope="session")
def place(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos.index` of six pictures and two copies of the first one, of which one is smaller."""
    folder = tmp_path_factory.mktemp("indexed")
    for number in range(6):
        write_picture(folder / "photos" / f"{number} 图.png", number, side=48)
    whole = Image.open(folder / "photos" / "0 图.png")
    whole.save(folder / "photos" / "copy.bmp")
    whole.resize((36, 36), Image.Resampling.BICUBIC).save(folder / "photos" / "small.webp", lossless=True)
    model = open_search_model(exported)
    update_index(folder / "photos.index", folder / "photos", model, dtype="float32", num_workers=0)
    return folder


@pytest.fixture
def indexed(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The index, beside which the commands run; nothing in either changes."""
    monkeypatch.chdir(place)
    return place / "photos.index"


def test_query_finds_what_the_model_says(run: Run, exported: Path, indexed: Path) -> None:
    model, preprocess, tokenizer = load(exported)
    index = open_index(indexed)
    with torch.no_grad():
        images = torch.cat([model.encode_image(preprocess(index.root / name)[None]) for name in index.names])
        words = model.encode_text(tokenizer(["红色的水果", "a dog"]))
    for query, feature in (("红色的水果", words[0]), ("2*“a dog” - 红.png", None)):
        if feature is None:
            (index.root.parent / "红.png").write_bytes((index.root / index.names[3]).read_bytes())
            feature = 2 * words[1] - images[3]
            feature = feature / feature.norm()
        expected = (images @ feature).sort(descending=True, stable=True)
        code, out, err = run("query", "photos.index", query, "format=json", "top=3")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert [row["name"] for row in found["results"]] == [index.names[row] for row in expected.indices[:3]]
        assert [row["score"] for row in found["results"]] == pytest.approx(expected.values[:3].tolist(), abs=1e-5)
        assert [row["is_likely"] for row in found["results"]] == [number < found["end"] for number in range(3)]


@pytest.mark.parametrize("name", ["holiday.jpg-1.png", "2*x.png", '中文/红 苹果 - "引号".png'])
def test_a_picture_is_found_by_its_own_name(run: Run, exported: Path, tmp_path: Path, name: str) -> None:
    for number, each in enumerate((name, "copy.png", "other.png")):
        write_picture(tmp_path / "photos" / each, max(number, 1))
    assert run("index", "photos", f"model={exported}", "num_workers=0")[0] == 0
    code, out, err = run("query", "photos.index", name, "format=json", "top=1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["query"], [row["name"] for row in found["results"]]) == (name, ["copy.png"])
    assert found["results"][0]["score"] <= 1
    write_picture(tmp_path / "1*mine.png", 2)
    code, out, _ = run("query", "photos.index", "1*mine.png", "format=paths", "top=1")
    assert (code, out.rstrip().rpartition("/")[2]) == (0, "other.png")


def test_graphs_in_place_of_weights(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_graphs(tmp_path_factory)
    for number in range(4):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
    write_picture(tmp_path / "other.png", 9)
    assert run("index", "photos", f"model={model}", "dtype=float32", "num_workers=0")[0] == 0
    by_torch = [json.loads(run("query", "photos.index", query, "format=json")[1]) for query in ("狗", "other.png")]
    monkeypatch.setattr("m2_encoder.picture_search.model.load", None)  # nobody opens the weights from now on
    assert run("index", "photos", f"model={model}", "dtype=float32", "output=graphs.index", "runtime=onnx",
               "num_workers=0")[0] == 0  # fmt: skip
    write_picture(tmp_path / "photos" / "4.png", 4)
    assert run("index", "photos", "runtime=onnx", "num_workers=0")[1].startswith("5 pictures (1 new, ")
    one, other = open_index("photos.index"), open_index("graphs.index")
    assert one.made_by == other.made_by
    assert np.abs(np.asarray(one.features[:4]) - np.asarray(other.features)).max() < 1e-5
    for query, expected in zip(("狗", "other.png"), by_torch, strict=True):
        code, out, err = run("query", "graphs.index", query, "format=json", "runtime=onnx")
        assert (code, err) == (0, "")
        found = json.loads(out)["results"]
        assert [row["name"] for row in found] == [row["name"] for row in expected["results"]]
        scores = [row["score"] for row in expected["results"]]
        assert [row["score"] for row in found] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    "command", [("index", "photos"), ("query", "photos.index", "a"), ("similar", "photos.index", "a")]
)
def test_folders_without_graphs(run: Run, indexed: Path, command: tuple[str, ...]) -> None:
    code, _, err = run(*command, "runtime=onnx")
    assert code == 2
    assert "runtime=onnx: " in err
    assert "missing; write them with m2-export model=" in err


def test_forms_of_results(run: Run, indexed: Path, tmp_path: Path) -> None:
    code, table, _ = run("query", "photos.index", "狗", f"sheet={tmp_path}/new/sheet.png")
    assert code == 0
    assert table.startswith("狗: the first 8 of 8 pictures\nrank  cosine  picture\n   1")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 1000
    code, paths, _ = run("query", "photos.index", "狗", "format=paths")
    assert code == 0
    assert len(paths.splitlines()) == 8
    assert all(Path(path).is_file() for path in paths.splitlines())
    code, likely, _ = run("query", "photos.index", "狗", "format=paths", "tail=false")
    assert code == 0
    assert paths.startswith(likely)
    end = json.loads(run("query", "photos.index", "狗", "format=json")[1])["end"]
    assert len(likely.splitlines()) == end < 8


def test_similar_needs_no_model_for_a_picture_of_the_index(run: Run, exported: Path, indexed: Path) -> None:
    gone = exported.rename(exported.with_name("gone"))
    try:
        code, out, _ = run("similar", "photos.index", "0 图.png", "format=json", "top=3")
        assert code == 0
        assert json.loads(out)["results"][0]["name"] == "copy.bmp"
        assert "0 图.png" not in out.split("results")[1]
        code, _, err = run("query", "photos.index", "狗")
        assert code == 2
        assert "no such folder" in err
        assert run("query", "photos.index", "狗", f"model={gone}")[0] == 0
    finally:
        gone.rename(exported)


def test_duplicates_are_copies_and_nothing_else(run: Run, indexed: Path, tmp_path: Path) -> None:
    code, out, _ = run("duplicates", "photos.index", "format=json", f"sheet={tmp_path}/twins.png")
    assert code == 0
    (group,) = json.loads(out)["groups"]
    assert group["names"] == ["copy.bmp", "small.webp", "0 图.png"], "the largest file first"
    assert 0.98 <= group["least"] <= 1
    assert (tmp_path / "twins.png").is_file()
    code, out, _ = run("duplicates", "photos.index", "threshold=1")
    assert code == 0
    assert "1 groups of near-equal pictures, 1 more than one of each" in out
    assert run("duplicates", "photos.index", "format=paths")[1].splitlines() == [
        str(indexed.with_name("photos") / name) for name in ("small.webp", "0 图.png")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("query", "photos.index"), "query=???: must be given"),
        (("query", "nowhere", "狗"), "index=nowhere: no such index"),
        (("query", "e.index", "狗"), "write an index with m2-search index PHOTOS output="),
        (("query", "photos", "狗"), "holds no index.json, so it is no index"),
        (("query", "photos.index", '"狗" + 水果'), "cannot be read from + 水果 on"),
        (("query", "photos.index", "none.jpg"), "none.jpg: no such file, and no picture of the index"),
        (("query", "photos.index", "狗", "top=0"), "top=0"),
        (("query", "photos.index", "狗", "sheet=a.jpg"), "sheet=a.jpg: must end in .png"),
        (("query", "photos.index", "狗", "sheet=old.png"), "old.png: exists"),
        (("query", "photos.index", "狗", "model=nowhere/export"), "model=nowhere/export: no such folder"),
        (("query", "photos.index", "狗", "tokenizer=old.png"), "belongs to a model; add model="),
        (("similar", "photos.index", "none.jpg"), "picture: none.jpg: no such file"),
        (("similar", "photos.index", "bad.png"), "bad.png: not an image that is read here"),
        (("duplicates", "photos.index", "threshold=2"), "threshold=2"),
    ],
)
def test_queries_that_cannot_be_answered(run: Run, indexed: Path, arguments: tuple[str, ...], message: str) -> None:
    indexed.with_name("old.png").touch()
    indexed.with_name("e.index").mkdir(exist_ok=True)
    indexed.with_name("bad.png").write_text("none")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("query", ["${oc.env:HOME}", "E=mc2", "{a}", "[b", "it's 100%", "-x", "a,b"])
def test_odd_words_are_words(run: Run, indexed: Path, query: str) -> None:
    code, out, err = run("query", "photos.index", query, "format=json")
    assert (code, err) == (0, "")
    assert json.loads(out)["query"] == query


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["photos=???: must be given"]),
        (("nowhere",), ["photos=nowhere: no such folder"]),
        (("photos",), ["model: must be given for a new index; add model=FOLDER"]),
        (("photos", "model=nowhere/export"), ["model=nowhere/export: no such folder"]),
        (("photos", "output=photos/0.png", "model=tiny"), ["photos/0.png: is a file; give the name of a folder"]),
        (("photos", "output=/dev/null", "model=tiny"), ["/dev/null: is a file; give the name of a folder"]),
        (("photos", "output=/proc/new/index", "model=tiny"), ["output=/proc/new/index: cannot be written"]),
        (("photos", "model=tiny"), ["a named model needs its checkpoint", "tokenizer=null: words need"]),
        (("photos", "dtype=int8", "batch_size=0"), ["dtype=int8", "batch_size=0"]),
        (("photos", "weights=x", "device=tpu"), ["model: must be given"]),
        (("photos", "more"), ["more: expected PHOTOS, then key=value"]),
        (("photos", "outptu=x"), ["outptu=x: expected PHOTOS"]),
    ],
)
def test_user_errors_exit_2_with_words(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], messages: list[str]
) -> None:
    write_picture(tmp_path / "photos" / "0.png", 0)
    code, out, err = run("index", *arguments)
    assert (code, out) == (2, "")
    assert all(message in err for message in messages), err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_help_and_unknown_words(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "index" in out
    assert run()[0] == 2
    code, _, err = run("find")
    assert code == 2
    assert "find: no such sub-command" in err
    code, out, _ = run("index", "--help")
    assert code == 0
    assert "Exit codes: 0 all pictures are in it" in out


@pytest.mark.parametrize(
    "text", ["a=b", "${oc.env:HOME}", "{a,b}", "[c", 'say "x\\"', "top=", "'", "\\", "-x", "+1", "$x"]
)
def test_any_text_is_a_place(text: str) -> None:
    places = ["index", "query"]
    named = name_places(["i", text, "top=5"], places, ["index", "query", "top"]) if text != "top=" else None
    if named is None:
        return
    override = parse_override(named[1])
    assert override is not None
    assert str(override.value()).replace("\\${", "${") == text


def test_too_many_places() -> None:
    with pytest.raises(UserError, match="expected INDEX QUERY, then key=value"):
        name_places(["i", "a", "b"], ["index", "query"], ["index", "query"])
    assert name_places(["a", "index=i"], ["index", "query"], ["index", "query"]) == ['query="a"', "index=i"]
