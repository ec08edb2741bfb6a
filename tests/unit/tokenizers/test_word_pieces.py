from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, WordSegmenter, special_ids
from tests.support.word_masks import EMOJI_FILE, OFFICIAL_FILE, GoldenLine, read_golden, show_words, write_golden

pytest.importorskip("jieba", reason="words of Chinese texts need the extra `words`")


@pytest.fixture(scope="module")
def segmenter() -> WordSegmenter:
    return WordSegmenter(SentencePieceTokenizer(load_emoji_tokenizer_model(), normalise=False))  # blanks stay pieces


@pytest.fixture(scope="module")
def official(parity_dir: Path) -> WordSegmenter:
    return WordSegmenter(SentencePieceTokenizer(parity_dir / "tokenizer" / "sp.model"))


def _groups(segmenter: WordSegmenter, pieces: WordPieces) -> list[str]:
    """Pieces of each word joined by +, those of none after _."""
    groups: list[str] = []
    last = NO_WORD
    for piece, number in zip(segmenter.tokenizer.pieces(pieces.ids), pieces.words.tolist(), strict=True):
        if number == NO_WORD:
            groups.append("_" + piece)
        elif number == last:
            groups[-1] += "+" + piece
        else:
            groups.append(piece)
        last = number
    return groups[1:-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只红色的苹果", ["_▁", "一+只", "红+色", "的", "苹+果"]),
        ("The cat isn't 3.14", ["_▁", "th+e", "▁cat", "_▁", "is+n+'+t", "_▁", "3+.+1+4"]),
        ("[MASK]猫  [CLS]", ["_[MASK]", "_▁", "猫", "_[CLS]"]),
        ("ﬁsh ＡＢＣ", ["▁fish", "▁abc"]),
        ("", []),
        ("   ", ["_▁", "_<|blank_3|>"]),
        # Bytes of one character are one word, and a character that continues a word belongs to it.
        ("麒麟", ["_▁", "+".join(f"<0x{byte:02X}>" for byte in "麒麟".encode())]),
        ("aǎ", ["_▁", "a+<0xC7>+<0x8E>"]),
        ("！！……", ["_▁", "!+!", ".+.+.+.+.+."]),
    ],
)
def test_words_of_the_embedded_tokenizer(segmenter: WordSegmenter, text: str, expected: list[str]) -> None:
    assert _groups(segmenter, segmenter.segment(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只红色的苹果", ["▁一只", "红色的", "苹果"]),  # 红色的 reaches over two words, which become one
        ("3.14 1,000", ["▁3.+14", "▁1,+000"]),
        # Several unknown characters are one piece, and make the word they are in unpredictable.
        ("㐀㐁字", ["_▁", "_<unk>", "字"]),
        ("x👍🏽y", ["▁x", "_👍", "_<unk>", "y"]),
        ("[SEP]a<|blank_2|>", ["_▁", "_[SEP]", "a", "_<|blank_2|>"]),
        ("白色T恤", ["▁白色", "T+恤"]),
    ],
)
def test_words_of_the_official_tokenizer(official: WordSegmenter, text: str, expected: list[str]) -> None:
    assert _groups(official, official.segment(text)) == expected


def test_batch_is_padded_as_by_the_tokenizer(segmenter: WordSegmenter) -> None:
    texts = ["一只猫", "", "a very long caption about cats and dogs", "[MASK]"]
    batch = segmenter.segment_batch(texts)
    tokens = segmenter.tokenizer(texts)
    assert _equal(batch.ids, tokens.ids)
    assert _equal(batch.mask, tokens.mask)
    assert _equal(batch.text.mask, tokens.mask)
    assert batch.words.dtype == torch.int32
    assert bool((batch.words[~batch.mask] == NO_WORD).all())
    for row, text in enumerate(texts):
        alone = segmenter.segment(text)
        length = len(alone.ids)
        assert _equal(batch.words[row, :length], alone.words)


def test_no_texts(segmenter: WordSegmenter) -> None:
    batch = segmenter.segment_batch([])
    assert [tuple(part.shape) for part in batch] == [(0, 0)] * 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("context_length", [2, 3, 5, 9])
def test_truncation_keeps_the_words_of_the_whole_text(segmenter: WordSegmenter, side: str, context_length: int) -> None:
    text = "乒乓球拍卖完了 unbelievable"
    whole = segmenter.segment(text)
    cut = segmenter.segment(text, context_length=context_length, truncation_side=side)  # type: ignore[arg-type]
    tokens = segmenter.tokenizer(text, context_length, side)  # type: ignore[arg-type]
    assert _equal(cut.ids, tokens.ids[0])
    kept = whole.words[1:-1]
    count = context_length - 2
    expected = kept[len(kept) - count :] if side == "left" else kept[:count]
    assert _equal(cut.words[1:-1], expected)


def test_options_are_checked_as_by_the_tokenizer(segmenter: WordSegmenter) -> None:
    with pytest.raises(UserError, match="context_length"):
        segmenter.segment("a", context_length=1)
    with pytest.raises(UserError, match="truncation_side"):
        segmenter.segment("a", truncation_side="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"texts\[1\]"):
        segmenter.segment_batch(["a", 3])  # type: ignore[list-item]


def test_pickles(segmenter: WordSegmenter) -> None:
    text = "两只cat在窗台上"
    copied = pickle.loads(pickle.dumps(segmenter))
    assert all(map(_equal, copied.segment(text), segmenter.segment(text)))


def test_user_dictionary_reaches_the_pieces(segmenter: WordSegmenter, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("红色的苹果 10\nbig apple 5\n", encoding="utf-8")
    own = WordSegmenter(segmenter.tokenizer, user_dictionary=str(path))
    assert int(own.segment("红色的苹果").words.max()) == 0
    assert int(segmenter.segment("红色的苹果").words.max()) == 2
    assert int(own.segment("a big apple").words.max()) == 1


def _words(segmenter: WordSegmenter, text: str) -> list[str]:
    """The normalised words of a text without unknown characters or bytes."""
    numbers = segmenter.segment(text).words.tolist()[1:-1]
    found = [""] * (max(numbers) + 1)
    for number, part in zip(numbers, segmenter.tokenizer.split(text), strict=True):
        if number != NO_WORD:
            found[number] += part
    return [word.strip("▁") for word in found]


def test_user_words_are_found_as_the_tokenizer_writes_them(official: WordSegmenter, tmp_path: Path) -> None:
    cases = [
        ("黑神话：悟空 100 nz", "玩黑神话：悟空的人", "黑神话:悟空"),
        ("最终幻想:重生", "玩最终幻想：重生的人", "最终幻想:重生"),
        ("ＡＢＣ公司", "去ＡＢＣ公司上班", "ABC公司"),
        ("ＡＢＣ公司", "去ABC公司上班", "ABC公司"),
        ("Wi－Fi密码", "问Wi－Fi密码", "Wi-Fi密码"),
        ("Ⅳ号坦克 5", "一辆Ⅳ号坦克", "IV号坦克"),
        ("２０２４年会", "参加２０２４年会", "2024年会"),
        ("⼈⼼苹果", "吃⼈⼼苹果", "人心苹果"),  # radicals, which become characters that jieba joins
        ("人\u200b猫 5", "是人\u200b猫", "人▁猫"),
    ]
    path = tmp_path / "words.txt"
    path.write_text("\n".join([*(entry for entry, _, _ in cases), "\u200b", "[MASK]"]), encoding="utf-8")
    own = WordSegmenter(official.tokenizer, user_dictionary=str(path))
    for segmenter in (own, pickle.loads(pickle.dumps(own))):
        for _, text, expected in cases:
            assert expected in _words(segmenter, text)
            assert expected not in _words(official, text)
    assert _words(own, "cat[MASK]▁ dog") == ["cat", "dog"]


def test_user_words_of_characters_that_are_bytes_are_found(segmenter: WordSegmenter, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("麒麟：Ａ\n", encoding="utf-8")
    own = WordSegmenter(segmenter.tokenizer, user_dictionary=str(path))
    assert [int(of.segment("麒麟：A").words.max()) for of in (segmenter, own)] == [2, 0]


def test_special_ids(segmenter: WordSegmenter) -> None:
    tokenizer = segmenter.tokenizer
    names = tokenizer.pieces(sorted(special_ids(tokenizer)))
    blanks = [f"<|blank_{length}|>" for length in range(2, 11)]
    assert names == ["<unk>", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "<|endoftext|>", *blanks]


def test_special_ids_of_the_official_tokenizer(official: WordSegmenter) -> None:
    assert special_ids(official.tokenizer) == {0, 1, 2, 3, *range(50000, 50020)}


def test_pieces_that_no_text_has_are_special_whatever_their_name() -> None:
    """A model of somebody else's, with control pieces and numbered spare ones."""
    content = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat on the mat", "a dog in the sun", "[1] one"] * 20),
        model_writer=content,
        vocab_size=45,
        hard_vocab_limit=False,
        user_defined_symbols=["[CLS]", "[MASK]", "<|endoftext|>", "[unused12]", "[1]"],
        control_symbols=["PADDING", "<sep-1>"],
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(content.getvalue())
    names = set(tokenizer.pieces(sorted(special_ids(tokenizer))))
    assert names == {
        "<unk>", "<s>", "</s>", "[CLS]", "[MASK]", "<|endoftext|>", "[unused12]", "PADDING", "<sep-1>",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "path"), [("segmenter", EMOJI_FILE), ("official", OFFICIAL_FILE)])
def test_golden_lines(request: pytest.FixtureRequest, name: str, path: Path) -> None:
    segmenter: WordSegmenter = request.getfixturevalue(name)
    golden = read_golden(path)
    assert len(golden) == 200
    assert write_golden(golden) == path.read_text(encoding="utf-8")
    for key, line in enumerate(golden):
        assert GoldenLine(line.text, show_words(segmenter, line.text, key=key)) == line


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)
