"""What a model's tokenizer makes of captions: which are cut, and how much is bytes or unknown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.tokenizers.sentencepiece_tokenizer import TEMPLATE_LENGTH, SentencePieceTokenizer
from m2_encoder.types import LANGUAGES

_MANY_FOREIGN = 0.05  # share of tokens that is worth a warning


class TokenSummary(NamedTuple):
    """What a tokenizer makes of the captions of one language."""

    captions: int  # how many were counted
    cut: int  # those of them that are longer than the context
    tokens: int  # of all, uncut and without start and end
    foreign: int  # tokens that are bytes or unknown
    with_foreign: int  # captions that have such tokens


class TokenReport(NamedTuple):
    """Captions as a model gets them."""

    context_length: int  # tokens that it reads, start and end included
    truncation_side: str  # where longer captions are cut
    vocab_size: int
    languages: dict[str, TokenSummary]

    @property
    def limit(self) -> int:
        """Tokens of a caption that is not cut, without start and end."""
        return self.context_length - TEMPLATE_LENGTH

    @property
    def lost(self) -> str:
        """What longer captions lose."""
        return "beginning" if self.truncation_side == "left" else "end"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return self._asdict() | {"languages": {name: own._asdict() for name, own in self.languages.items()}}

    def warnings(self) -> Iterator[str]:
        """What to know before training: captions that are cut, and which end they lose; many bytes."""
        for language, own in self.languages.items():
            if own.cut:
                yield (
                    f"{own.cut:,} of {own.captions:,} {language} captions ({own.cut / own.captions:.1%}) have more "
                    f"than the {self.limit} tokens that a context of {self.context_length} holds: they lose their "
                    f"{self.lost} (truncation_side={self.truncation_side})"
                )
            if own.foreign > _MANY_FOREIGN * own.tokens:
                yield (
                    f"{own.foreign / own.tokens:.1%} of the tokens of {language} captions are bytes or unknown to the "
                    f"tokenizer, in {own.with_foreign:,} of {own.captions:,} captions; m2-data tokenizer trains "
                    "another one, to which model.map_tokenizer=true carries weights over"
                )


def count_tokens(texts: Sequence[str], tokenizer: SentencePieceTokenizer) -> tuple[list[int], TokenSummary]:
    """Tokens of each text, uncut and without start and end, and their summary."""
    rows = tokenizer.encode_all(texts)
    lengths, foreign = [len(ids) for ids in rows], [tokenizer.count_foreign(ids) for ids in rows]
    cut = sum(length > tokenizer.context_length - TEMPLATE_LENGTH for length in lengths)
    return lengths, TokenSummary(len(rows), cut, sum(lengths), sum(foreign), sum(map(bool, foreign)))


def summarize_tokens(captions: npt.NDArray[np.void], tokenizer: SentencePieceTokenizer | None) -> TokenReport | None:
    """Sum up counts of `CAPTION_ROW`; None without a tokenizer."""
    if tokenizer is None:
        return None
    limit = tokenizer.context_length - TEMPLATE_LENGTH
    found = {}
    for number, language in enumerate(LANGUAGES):
        own = captions[captions["language"] == number]
        tokens, foreign = own["tokens"], own["foreign"]
        if len(own):
            counts = (np.count_nonzero(tokens > limit), tokens.sum(), foreign.sum(), np.count_nonzero(foreign))
            found[language] = TokenSummary(len(own), *map(int, counts))
    return TokenReport(tokenizer.context_length, tokenizer.truncation_side, tokenizer.vocab_size, found)
