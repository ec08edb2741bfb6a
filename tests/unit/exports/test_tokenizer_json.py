"""A tokenizer of ours and the file that other libraries read: the same ids."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.exports.tokenizer_json import write_tokenizer_json
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

transformers = pytest.importorskip("transformers", reason="opens what is written")

ORDINARY = [
    "a cat", "  Two   cats,\tand a DOG! ", "一只猫", "红色 的 T恤，XL 码", "戴着帽子的狗 a dog with a hat",
    "", " ", "\u3000\n", "ＡＢＣ１２！", "①½ﬁ", "～波浪～", "naïve café", "Ｈello　世界", "繁體中文 龍",
    "line one\r\nline two\rthree\n", "\x00a\x07b\x1f", "葛\U000e0100城 \ufeffx", "\u202ba\u202c", "क\u200dष",
    "👩\u200d🚀 ❤\ufe0f 🏳\ufe0f\u200d🌈 👍🏽 🇨🇳", "https://example.com/?q=猫&n=10", "1,234.5 + 6 = ？", "x" * 300,
    "[SEP] [sep] a[SEP]b", "a [MASK] b[CLS]", "<|endoftext|> [UNK]", "<|blank_2|> <|blank_11|>", "<n><unk> <s> </s>",
    "a" + " " * 23 + "b", "한국어 ไทย हिन्दी", "¨ a", "▁a▁▁b▁",
]  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tidied", "raw"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    ours = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=24, normalise=request.param)
    return ours, open_written(ours, tmp_path_factory.mktemp("shipped"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small file of the official kind: pairs merged, pieces of words and parts of words that are found first."""
    content = train_bpe(
        ["[CLS]", "[MASK]", "[UNK]", "<|endoftext|>", "<|blank_2|>", "<|blank_3|>", "▁the", "the", "猫"]
    )
    ours = SentencePieceTokenizer(content, normalise=False)
    return ours, open_written(ours, tmp_path_factory.mktemp("pairs"))


def train_bpe(symbols: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    words = [f"the cat {n} sat on the other mat with 一只猫 和 两只狗 the{n}" for n in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, model_type="bpe", vocab_size=120, minloglevel=2,
        remove_extra_whitespaces=False, user_defined_symbols=symbols, num_threads=1, **options,
    )  # fmt: skip
    return model.getvalue()


def open_written(ours: SentencePieceTokenizer, folder: Path) -> Any:
    write_tokenizer_json(ours, folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def ids_of(theirs: Any, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_and_odd_texts_have_the_same_ids(shipped: tuple[Any, Any], text: str) -> None:
    ours, theirs = shipped
    assert ids_of(theirs, text) == ours.encode(text)


def test_captions_of_the_shipped_drawings_have_the_same_ids(shipped: tuple[Any, Any], repo_root: Path) -> None:
    ours, theirs = shipped
    lines = (repo_root / "src/m2_encoder/assets/emoji/concepts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in lines[::8] for text in strings_in(json.loads(line))]
    assert len(texts) > 1000
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode_all(texts)


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for inner in (value.values() if isinstance(value, dict) else value) for text in strings_in(inner)]
    return [value] if isinstance(value, str) else []


# All characters but those of which the module says that it depends on what stands beside them.
ODD = st.characters(exclude_categories=["Cs", "Cf", "Cn", "Mn", "Mc", "Me"], exclude_characters="İﾞﾟ\x1c\x1d\x1e\x1f\x85")
TEXTS = st.lists(
    st.one_of(
        st.text(ODD, max_size=6),
        st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=6),
        st.text(st.sampled_from("abcXYZ  .,!?<>[]|_0123\t\n"), max_size=12),
        st.sampled_from(["  ", "\u3000", "\n", "[SEP]", "[CLS]", " <|endoftext|> ", "<|blank_2|>", "👩\u200d🚀"]),
    ),
    max_size=6,
).map("".join)


@given(text=TEXTS)
def test_any_text_has_the_same_ids(shipped: tuple[Any, Any], text: str) -> None:
    ours, theirs = shipped
    assert ids_of(theirs, text) == ours.encode(text)


@given(text=st.text(st.sampled_from("thecao mx猫狗一只两和 \t[]<|_3>AＡ"), max_size=30))
def test_pairs_are_merged_alike(pairs: tuple[Any, Any], text: str) -> None:
    ours, theirs = pairs
    assert ids_of(theirs, text) == ours.encode(text)


@pytest.mark.parametrize("text", [*ORDINARY, "the  the   other[MASK] the", "<|blank_2|>the", "\x07", "猫猫 一只猫"])
def test_a_file_of_the_official_kind_has_the_same_ids(pairs: tuple[Any, Any], text: str) -> None:
    ours, theirs = pairs
    assert ids_of(theirs, text) == ours.encode(text)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_and_cut_alike(tmp_path: Path, side: Any) -> None:
    ours = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=9, truncation_side=side)
    theirs = open_written(ours, tmp_path)
    texts = ["a cat", "", "one two three four five six seven eight nine ten", "一只戴着红色帽子的黑色的猫"]
    expected, found = ours(texts), theirs(texts, padding=True, truncation=True, return_tensors="pt")
    assert found["input_ids"].equal(expected.ids)
    assert found["attention_mask"].bool().equal(expected.mask)
    assert sorted(found) == ["attention_mask", "input_ids"]
    full = theirs(texts, padding="max_length", truncation=True)
    assert {len(row) for row in full["input_ids"]} == {9}


def test_opened_tokenizer_says_what_ours_says(shipped: tuple[Any, Any]) -> None:
    ours, theirs = shipped
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert (theirs.cls_token_id, theirs.eos_token_id, theirs.mask_token_id) == (ours.cls_id, ours.end_id, ours.mask_id)
    assert (theirs.pad_token_id, theirs.model_max_length) == (ours.end_id, ours.context_length)
    assert theirs.decode(theirs("一只猫 and a dog")["input_ids"], skip_special_tokens=True) == "一只猫 and a dog"


@pytest.mark.parametrize("text", ["İ", "<0x41>", "[CL\u200bS]", "ｶﾞ", "  \x1f[MASK]", "\ufdd0a"])
def test_texts_that_are_said_to_differ_do(tmp_path: Path, text: str) -> None:
    ours = SentencePieceTokenizer(load_emoji_tokenizer_model(), normalise="\x1f" not in text)
    assert ids_of(open_written(ours, tmp_path), text) != ours.encode(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"add_dummy_prefix": False}, "before a text"), ({"treat_whitespace_as_suffix": True}, "as prefixes")],
)
def test_files_that_cut_otherwise_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    content = train_bpe(["[CLS]", "[MASK]", "<|endoftext|>"], **options)
    with pytest.raises(UserError, match=message):
        write_tokenizer_json(SentencePieceTokenizer(content), tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_changed_pieces_than_stand_ins_are_refused(tmp_path: Path) -> None:
    symbols = ["[CLS]", "[MASK]", "<|endoftext|>", *(f"<Ａ{n}>" for n in range(40))]
    with pytest.raises(UserError, match="40 user-defined pieces"):
        write_tokenizer_json(SentencePieceTokenizer(train_bpe(symbols)), tmp_path)
