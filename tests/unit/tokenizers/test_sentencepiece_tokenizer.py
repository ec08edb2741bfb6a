"""The tokenizer's recipe and its guards, on a small SentencePiece model trained here."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

SPECIALS = ("<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"<|blank_{k}|>" for k in range(2, 11)))
SENTENCES = (
    "a photo of a cat on a sofa",
    "a red car drives on the road",
    "the quick brown fox jumps over the lazy dog",
    "一只猫坐在沙发上",
    "两只狗在草地上奔跑",
    "一辆红色的汽车在路上",
)
# Ordinary text, and text made of the very parts that the recipe treats apart.
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*SPECIALS, " ", "  ", " " * 11, "\n", "　", "cat", "一只猫", "[", "<|", "😀"]),
        max_size=30,
    ).map("".join),
)


def train_model(user_defined_symbols: tuple[str, ...] = SPECIALS) -> bytes:
    """A SentencePiece model of about 150 pieces with the official normaliser settings."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=content,
        model_type="bpe",
        vocab_size=150,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=list(user_defined_symbols),
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return content.getvalue()


MODEL = train_model()
TOKENIZER = SentencePieceTokenizer(MODEL, normalise=False)  # the official recipe


def reference_ids(text: str) -> list[int]:
    """The recipe once more, a character at a time, on SentencePiece alone."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    segments: list[tuple[bool, str]] = [(False, "")]
    while text:
        literal = next((s for s in ("<|endoftext|>", "[CLS]", "[MASK]", "[UNK]") if text.startswith(s)), None)
        if literal is None:
            segments[-1] = (False, segments[-1][1] + text[0])
            text = text[1:]
        else:
            segments += [(True, literal), (False, "")]
            text = text[len(literal) :]
    ids: list[int] = []
    for index, (is_literal, segment) in enumerate(segments):
        if is_literal:
            ids.append(processor.piece_to_id(segment))
            continue
        segment = segment.lstrip() if index > 0 else segment
        segment = segment.rstrip() if index < len(segments) - 1 else segment
        for length in range(10, 1, -1):
            segment = segment.replace(" " * length, f"<|blank_{length}|>")
        ids += processor.encode(segment) if segment else []
    return ids


def test_template_padding_and_mask() -> None:
    texts = ["a cat", "", "一只猫坐在沙发上"]
    ids, mask = TOKENIZER(texts)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape
    for text, row, valid in zip(texts, ids, mask, strict=True):
        expected = [TOKENIZER.cls_id, *reference_ids(text), TOKENIZER.end_id]
        assert row[valid].tolist() == expected
        assert (row[~valid] == TOKENIZER.end_id).all()
    assert mask[1].tolist() == [True, True] + [False] * (ids.shape[1] - 2)


def test_special_ids_come_from_the_model() -> None:
    shuffled = ("[MASK]", "[UNK]", "[CLS]", "<|endoftext|>")
    tokenizer = SentencePieceTokenizer(train_model(shuffled), normalise=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    assert tokenizer.cls_id == processor.piece_to_id("[CLS]") != TOKENIZER.cls_id
    assert tokenizer.end_id == processor.piece_to_id("<|endoftext|>")
    assert tokenizer.mask_id == processor.piece_to_id("[MASK]")
    assert tokenizer.vocab_size == processor.get_piece_size()
    # Without blank pieces, spaces stay spaces.
    assert tokenizer.encode("a  cat") == processor.encode("a  cat")


@given(text=TEXTS)
def test_pieces_follow_the_recipe(text: str) -> None:
    assert TOKENIZER.encode(text) == reference_ids(text)


@given(
    texts=st.lists(TEXTS, max_size=5),
    context_length=st.integers(2, 60),
    side=st.sampled_from(["left", "right"]),
)
def test_invariants_of_a_call(texts: list[str], context_length: int, side: Any) -> None:
    ids, mask = TOKENIZER(texts, context_length, side)
    assert ids.shape == mask.shape
    if not texts:
        assert ids.shape == (0, 0)
        return
    lengths = mask.sum(1)
    assert ids.shape == (len(texts), int(lengths.max()))
    assert ids.shape[1] <= context_length
    assert 0 <= int(ids.min()) <= int(ids.max()) < TOKENIZER.vocab_size
    for text, row, valid, length in zip(texts, ids.tolist(), mask, lengths.tolist(), strict=True):
        assert valid[:length].all()  # the mask is a prefix
        assert row[length:] == [TOKENIZER.end_id] * (len(row) - length)
        assert (row[0], row[length - 1]) == (TOKENIZER.cls_id, TOKENIZER.end_id)
        pieces, kept = TOKENIZER.encode(text), row[1 : length - 1]
        assert len(kept) == min(len(pieces), context_length - 2)
        assert kept == (pieces[len(pieces) - len(kept) :] if side == "left" else pieces[: len(kept)])
        alone = TOKENIZER(text, context_length, side)
        assert alone.ids.tolist() == [row[:length]]
        assert alone.mask.all()


@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_large_calls_equal_small_ones(texts: list[str]) -> None:
    # More than a hundred texts take SentencePiece's list interface.
    repeated = TOKENIZER(texts * 120)
    small = TOKENIZER(texts)
    assert torch.equal(repeated.ids, small.ids.repeat(120, 1))
    assert torch.equal(repeated.mask, small.mask.repeat(120, 1))


def test_every_kind_of_iterable_gives_the_same() -> None:
    texts = ["a cat", "一只猫"]

    def generate() -> Iterator[str]:
        yield from texts

    expected = TOKENIZER(texts)
    arrays = [np.array(texts), np.array(texts, dtype=object), np.array(texts, dtype=np.dtypes.StringDType())]
    for given_texts in (tuple(texts), generate(), dict.fromkeys(texts).keys().__iter__(), *arrays):
        got = TOKENIZER(given_texts)
        assert torch.equal(got.ids, expected.ids)
        assert torch.equal(got.mask, expected.mask)
    assert torch.equal(TOKENIZER(np.str_("a cat")).ids, TOKENIZER(["a cat"]).ids)


@pytest.mark.parametrize("empty", [[], (), iter([]), np.array([], dtype=str)])
def test_no_texts(empty: Any) -> None:
    ids, mask = TOKENIZER(empty)
    assert ids.shape == mask.shape == (0, 0)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (None, "NoneType"),
        (3, "int"),
        (2.5, "float"),
        (True, "bool"),
        (b"a cat", "bytes"),
        (bytearray(b"a"), "bytearray"),
        ({"a": 1}, "dict"),
        ({"a"}, "set"),
        (object(), "object"),
        (np.array("a cat"), "ndarray"),
        (torch.tensor(1), "Tensor"),
        (["a", None], r"texts\[1\] is NoneType"),
        (["a", "b", 3], r"texts\[2\] is int"),
        ([b"a"], r"texts\[0\] is bytes"),
        ([["a"]], r"texts\[0\] is list"),
        (np.array([1.0]), r"texts\[0\] is float64"),
        (np.array([["a"]]), r"texts\[0\] is ndarray"),
        (np.array([b"a"]), r"texts\[0\] is bytes_"),
        (torch.tensor([1, 2]), r"texts\[0\] is Tensor"),
    ],
)
def test_what_is_not_text_is_one_clear_error(texts: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        TOKENIZER(texts)
    assert "string" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_generator_is_not_hidden() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        TOKENIZER(broken())


@pytest.mark.parametrize("context_length", [1, 0, -5, 2.0, "52", True])
def test_context_length_is_validated(context_length: Any) -> None:
    with pytest.raises(UserError, match=f"at least 2.*got {re.escape(repr(context_length))}"):
        TOKENIZER("a", context_length)
    with pytest.raises(UserError, match="at least 2"):
        SentencePieceTokenizer(MODEL, context_length)


@pytest.mark.parametrize("side", ["middle", "Left", "", 1])
def test_truncation_side_is_validated(side: Any) -> None:
    with pytest.raises(UserError, match=r"'left', 'right', got"):
        TOKENIZER("a", truncation_side=side)
    with pytest.raises(UserError, match=r"'left', 'right', got"):
        SentencePieceTokenizer(MODEL, truncation_side=side)


def test_shortest_context_keeps_the_template_only() -> None:
    ids, mask = TOKENIZER(["a cat on a sofa", ""], 2)
    assert ids.tolist() == [[TOKENIZER.cls_id, TOKENIZER.end_id]] * 2
    assert mask.all()


def test_options_of_the_constructor_are_the_defaults_of_a_call() -> None:
    text = "a photo of a cat on a sofa"
    tokenizer = SentencePieceTokenizer(MODEL, np.int64(6), "right")
    assert torch.equal(tokenizer(text).ids, TOKENIZER(text, 6, "right").ids)
    assert torch.equal(tokenizer(text, 52, "left").ids, TOKENIZER(text).ids)
    assert tokenizer(text).ids.shape == (1, 6)


def test_surrogates_become_text() -> None:
    assert TOKENIZER.encode("cat \ud83d\ude00") == TOKENIZER.encode("cat 😀")
    for broken in ("cat \ud83d", "\udc00cat", "\ud83d\ud83d\ude00", "\udfff\ud800"):
        replaced = re.sub("[\ud800-\udfff]", "�", broken.replace("\ud83d\ude00", "😀"))
        assert TOKENIZER.encode(broken) == TOKENIZER.encode(replaced)
    ids, mask = TOKENIZER(["a", "\ud800"])
    assert ids.shape[0] == mask.shape[0] == 2


@given(text=st.text(st.characters(), max_size=20))
def test_any_code_points_tokenise(text: str) -> None:
    # Surrogates included, which st.text() leaves out by itself.
    ids, _ = TOKENIZER(text)
    assert int(ids.max()) < TOKENIZER.vocab_size


def test_decode_and_pieces() -> None:
    (ids,) = TOKENIZER("a  cat [MASK] on 一只猫").ids
    assert TOKENIZER.decode(ids) == "a  cat[MASK] on 一只猫"
    assert TOKENIZER.decode([]) == ""
    pieces = TOKENIZER.pieces(ids)
    assert len(pieces) == len(ids)
    assert pieces[0] == "[CLS]"
    assert pieces[-1] == "<|endoftext|>"
    assert "<|blank_2|>" in pieces
    assert TOKENIZER.pieces(ids.tolist()) == TOKENIZER.pieces(ids.numpy()) == pieces


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([0, -1], "id -1 at index 1"),
        ([100_000], "id 100000 at index 0"),
        ([1.5], "integers"),
        ("cat", "integers"),
        (None, "integers"),
        (7, "integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "integers"),
    ],
)
def test_ids_are_validated(ids: Any, named: str) -> None:
    for method in (TOKENIZER.decode, TOKENIZER.pieces):
        with pytest.raises(UserError, match=named):
            method(ids)


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"]])
def test_encode_takes_one_string(text: Any) -> None:
    with pytest.raises(UserError, match=f"got {type(text).__name__}"):
        TOKENIZER.encode(text)


def test_path_bytes_and_saved_file_agree(tmp_path: Path) -> None:
    path = tmp_path / "模型 1.model"
    TOKENIZER.save(path)
    assert path.read_bytes() == MODEL == TOKENIZER.model_bytes
    for source in (path, str(path)):
        assert torch.equal(SentencePieceTokenizer(source)("a cat").ids, TOKENIZER("a cat").ids)


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        TOKENIZER.save(tmp_path / "absent" / "sp.model")


def test_unreadable_models_name_the_file(tmp_path: Path) -> None:
    cases = {
        "empty.model": b"",
        "text.model": b"this is no model",
        "pointer.model": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2270960\n",
        "truncated.model": MODEL[: len(MODEL) // 2],
        "zeros.model": bytes(1000),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            SentencePieceTokenizer(tmp_path / name)
    for path in (tmp_path / "absent.model", tmp_path, "\0"):
        with pytest.raises(UserError, match=re.escape(str(path))):
            SentencePieceTokenizer(path)
    with pytest.raises(UserError, match="empty"):
        SentencePieceTokenizer(b"")


@pytest.mark.parametrize("source", [None, 3, ["sp.model"]])
def test_sources_of_a_wrong_type(source: Any) -> None:
    with pytest.raises(UserError, match=type(source).__name__):
        SentencePieceTokenizer(source)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.model"
    path.write_bytes(train_model(("[CLS]",)))
    with pytest.raises(UserError, match=r"plain\.model.*lacks the pieces <\|endoftext\|>, \[MASK\];"):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize(
    "text", ["a  cat", " a cat", "a\u3000\tcat\n", "\ufeffa ca\u200bt", "a\u00a0ca\u00adt", "\u202aa cat\u202c"]
)
def test_blanks_and_invisible_characters_change_nothing(text: str) -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    assert tokenizer.normalise
    assert tokenizer.encode(text) == tokenizer.encode("a cat")
    assert tokenizer.encode("[MASK]" + text)[1:] == tokenizer.encode("a cat")
    assert tokenizer.encode("红色  的\u3000圆") == tokenizer.encode("红色的圆")
    untidy = SentencePieceTokenizer(load_emoji_tokenizer_model(), normalise=False)
    assert untidy.encode("a  cat") != untidy.encode("a cat")


def test_pieces_that_are_bytes_or_unknown_are_counted() -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    assert tokenizer.count_foreign(tokenizer.encode("a cat")) == 0
    assert tokenizer.count_foreign(tokenizer.encode("a \U0001f9ff")) == 4
    assert TOKENIZER.count_foreign(TOKENIZER.encode("a ∰")) == 1
    assert TOKENIZER.count_foreign([]) == 0


def test_copies_behave_alike() -> None:
    tokenizer = SentencePieceTokenizer(MODEL, 7, "right", normalise=False)
    texts = ["a photo of a cat on a sofa", "一只猫"]
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert repr(twin) == repr(tokenizer)
        assert not twin.normalise
        assert torch.equal(twin(texts).ids, tokenizer(texts).ids)
    assert "context_length=7" in repr(tokenizer)


def test_works_in_loader_workers() -> None:
    texts = list(SENTENCES)
    loader = DataLoader(
        texts,  # type: ignore[arg-type]
        batch_size=3,
        collate_fn=TOKENIZER,
        num_workers=1,
        # A spawned worker gets the tokenizer pickled; a forked one would merely inherit it.
        multiprocessing_context="spawn",
    )
    batches = list(loader)
    assert [batch.ids.tolist() for batch in batches] == [
        TOKENIZER(texts[:3]).ids.tolist(),
        TOKENIZER(texts[3:]).ids.tolist(),
    ]
