"""Trains a SentencePiece model on captions, with the pieces that `SentencePieceTokenizer` needs.

The same captions, options and version of sentencepiece give the same bytes. Characters that are too rare for a piece of
their own become their UTF-8 bytes, so that no character is unknown.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal

import sentencepiece
from annotated_types import Ge, Gt, Le

from m2_encoder.bounds import check_bounds
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import CLS_PIECE, END_PIECE, MASK_PIECE, UNKNOWN_PIECE

SYMBOLS: Final = (CLS_PIECE, "[SEP]", MASK_PIECE, UNKNOWN_PIECE, END_PIECE, *(f"<|blank_{n}|>" for n in range(2, 11)))
"""Pieces that stand for no text."""

FEWEST_PIECES: Final = 275  # those, 256 bytes and [UNK] leave room for a few
_BOUNDARY = "¦"  # where no piece may cross; it is not learned
_HAN = re.compile(r"([\u3007\u3400-\u4dbf\u4e00-\u9fff])")
_MOST_CHARACTERS = 500  # of a caption; sentencepiece passes over lines of more than 4,192 bytes

VocabSize = Annotated[int, Ge(FEWEST_PIECES), Le(1_000_000)]
Coverage = Annotated[float, Gt(0.5), Le(1)]
Chinese = Literal["characters", "words"]
"""Whether Chinese is cut into characters, which unseen words share with seen ones, or into frequent pieces."""


@check_bounds
def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: VocabSize,
    coverage: Coverage = 0.9995,
    fold_case: bool = True,
    chinese: Chinese = "characters",
) -> bytes:
    """Train a unigram model.

    Args:
        texts: captions, as the tokenizer will get them; of a longer one, the first 500 characters count.
        vocab_size: pieces, special ones and 256 bytes included.
        coverage: share of the characters in the texts that get pieces; the rarest others become bytes.
        fold_case: whether upper case is read as lower case.
        chinese: whether Chinese characters are pieces, or may be joined to longer ones.

    Returns:
        The content of a SentencePiece file.

    Raises:
        UserError: if there is no text, or too few or too many for so many pieces.

    Reference: SentencePiece (arXiv:1808.06226), unigram language model (arXiv:1804.10959).
    """
    model = io.BytesIO()
    lines = (_prepare(text, chinese) for text in texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in lines if line),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf" if fold_case else "nmt_nfkc",
            add_dummy_prefix=True,
            user_defined_symbols=list(SYMBOLS),
            pretokenization_delimiter=_BOUNDARY,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from error
    return model.getvalue()


def _prepare(text: str, chinese: str) -> str:
    text = text[:_MOST_CHARACTERS].replace(_BOUNDARY, " ")
    if chinese == "words":
        return text
    return _HAN.sub(rf"{_BOUNDARY}\1{_BOUNDARY}", text).replace(_BOUNDARY * 2, _BOUNDARY).rstrip(_BOUNDARY)


def _explain(said: str, vocab_size: int) -> UserError:
    """What sentencepiece found wrong, with what to give instead."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", said):
        rule = f"the captions give at most {found[1]} pieces; give that or fewer, or more captions"
    elif found := re.search(r"required_chars\. \d+ vs (\d+)", said):
        rule = f"the captions have too many characters: give {found[1]} or more, or a coverage such as 0.99"
    elif "sentences_.empty" in said or "no sentence" in said.lower():
        return UserError("no caption to train a tokenizer on; give a source with captions in Chinese or English")
    else:
        rule = f"sentencepiece refuses: {' '.join(said.split())[:200]}"
    return UserError(rule, key="vocab_size", value=vocab_size)
