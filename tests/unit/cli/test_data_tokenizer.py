"""`m2-data tokenizer`: a SentencePiece model of the user's own captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2_encoder.config.model_choice import build_tokenizer
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.data_commands import Start
from tests.support.shards import make_sample, write_tar

COLOURS = (("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("purple", "紫色"))
THINGS = (("cat", "猫"), ("fish", "鱼"), ("balloon", "气球"), ("umbrella", "雨伞"), ("mountain", "山"))
CAPTIONS = [(f"a {one} {what}", f"{eins}的{was}") for one, eins in COLOURS for what, was in THINGS]


def _write(kind: str, folder: Path) -> str:
    """The same captions as a kind of source; gives its name."""
    if kind == "tars":
        metadata = [{"captions": {"en": [en], "zh-CN": [zh], "fr": ["chat"]}} for en, zh in CAPTIONS]
        members = [member for i, value in enumerate(metadata) for member in make_sample(f"{i}", i, metadata=value)]
        write_tar(folder / "tars" / "0.tar", members)
    elif kind == "texts.txt":
        lines = [text for pair in CAPTIONS for text in pair]
        (folder / kind).write_text("\ufeff" + "\n".join([*lines, "ねこ"]) + "\n", encoding="utf-8")
    else:
        rows = [{"image": f"{i}.png", "zh": zh, "en": en} for i, (en, zh) in enumerate(CAPTIONS)]
        (folder / kind).write_text("\n".join(map(json.dumps, [*rows, {"image": "x", "fr": "chat"}])), encoding="utf-8")
    return kind


@pytest.mark.parametrize("kind", ["tars", "texts.txt", "rows.jsonl"])
def test_a_tokenizer_of_any_source(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    source, output = _write(kind, Path.cwd()), tmp_path / "own.model"
    arguments = ("tokenizer", source, f"output={output}", "vocab_size=308", "context_length=10")
    assert start(*arguments) == 0
    said = capsys.readouterr().out
    assert "308 pieces from 50 captions" in said
    assert "a context of 10 holds 8, longer ones lose their beginning" in said
    assert f"model.tokenizer={output} model.vocab_size=308" in said
    noted = {"tars": "left out: 25 captions in fr", "texts.txt": "1 caption in ja", "rows.jsonl": "1 missing_caption"}
    assert noted[kind] in said
    tokenizer = build_tokenizer({"tokenizer": str(output)}, M2EncoderConfig(vocab_size=308, context_length=10))
    assert (tokenizer.vocab_size, tokenizer.normalise) == (308, True)
    assert tokenizer.unknown_id not in tokenizer.encode("a 龘 🧿")
    first = output.read_bytes()
    assert start(*arguments) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert start(*arguments, "overwrite=true") == 0
    assert output.read_bytes() == first, "the same captions give the same bytes"
    assert not list(tmp_path.glob(".*")), "no partial file stays"


def test_more_captions_than_are_read_are_told(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write("texts.txt", Path.cwd())
    output = tmp_path / "own.model"
    assert start("tokenizer", "texts.txt", f"output={output}", "vocab_size=306", "max_captions=40") == 0
    assert "from 40 captions (the first ones; max_captions=40)" in capsys.readouterr().out
    assert SentencePieceTokenizer(output).vocab_size == 306


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["vocab_size=9000"], "vocab_size=9000: the captions give at most"),
        (["vocab_size=275", "coverage=1.0"], "vocab_size=275: the captions have too many characters: give"),
        (["vocab_size=10"], "275..1000000"),
        (["coverage=0"], "coverage=0: must be"),
        (["chinese=pinyin"], "one of characters, words"),
        (["source=gone"], "source=gone: "),
        (["source=french.txt"], "source=french.txt: has no caption in en or zh"),
    ],
)
def test_mistakes(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    _write("texts.txt", Path.cwd())
    Path("french.txt").write_text("ねこ\nいぬ\n", encoding="utf-8")
    source = [] if argv[0].startswith("source") else ["source=texts.txt"]
    assert start("tokenizer", *source, f"output={tmp_path / 'own.model'}", *argv) == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said) < 500
    assert not list(tmp_path.glob("*.model"))
