"""m2-search from the command line on, with a small exported model and files as users have them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli import search
from m2_encoder.cli.search import name_places
from m2_encoder.config.overrides import parse_override
from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import open_index
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


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["photos=???: must be given"]),
        (("nowhere",), ["photos=nowhere: no such folder"]),
        (("photos",), ["model: must be given for a new index; add model=FOLDER"]),
        (("photos", "model=nowhere/export"), ["model=nowhere/export: no such folder"]),
        (("photos", "output=photos/0.png", "model=tiny"), ["photos/0.png: is a file; give the name of a folder"]),
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
