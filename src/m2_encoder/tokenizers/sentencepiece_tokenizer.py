"""Text to token ids with one SentencePiece file, exactly as the official tokenizer does it.

The recipe (parity tests compare its ids with the official ones):

0. with `normalise`, which the official recipe lacks, white space and invisible characters are tidied (`spaces`);
1. literal special pieces (`[CLS]`, `<|endoftext|>`, `[MASK]`, `[UNK]`) are cut out of the text and become
   their ids; the white space next to them is dropped;
2. in what is left, runs of ASCII spaces become `<|blank_10|>` … `<|blank_2|>`, longest first;
3. every segment goes through SentencePiece on its own, so each gets the dummy prefix;
4. a text longer than the context keeps its *last* pieces;
5. the template is `[CLS]` + pieces + `<|endoftext|>`, padded on the right with the id of `<|endoftext|>`.

Letters: B texts · T tokens of the longest text, template included.
"""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.tokenizers.model_file import build_processor, find_piece, read_model
from m2_encoder.tokenizers.spaces import normalise_spaces
from m2_encoder.types import TextTokens

TruncationSide = Literal["left", "right"]

CLS_PIECE = "[CLS]"
END_PIECE = "<|endoftext|>"
MASK_PIECE = "[MASK]"
UNKNOWN_PIECE = "[UNK]"
REQUIRED_PIECES = (CLS_PIECE, END_PIECE, MASK_PIECE)

TEMPLATE_LENGTH = 2  # [CLS] and <|endoftext|>
OFFICIAL_CONTEXT_LENGTH = 52
OFFICIAL_VOCAB_SIZE = 115_244

# Characters that normalisation may change: width, case, ligatures, circled numbers, accents apart, blanks.
_ODD_TEXTS = ("ＡＢＣ１２，！　", "ABC abc", "ﬁ ① ½ ﾅｲｷ", "é e\u0301 ß İ", " a  b\tc\n", "繁體 龍")
_LONGEST_BLANK = 10  # the longest run of spaces that has a piece of its own
_SURROGATE = re.compile("[\ud800-\udfff]")
# A call with a list costs SentencePiece a thread pool, 0.1 ms: below this many segments, a call for each is
# faster (16 captions: 0.03 ms against 0.13 ms); above, a list takes half the time.
_MIN_SEGMENTS_FOR_LIST = 100


class SentencePieceTokenizer:
    """The official text recipe on a SentencePiece model; pickles, so it can live in data loading workers.

    Special ids are looked up by piece name: the official file of 115,244 pieces and a small model of our own
    work with the same class, if the latter has `[CLS]`, `<|endoftext|>` and `[MASK]` as user-defined symbols.
    `[UNK]` and `<|blank_2|>` … `<|blank_10|>` are used where the model has them.

    Lone surrogates (half of an emoji, as careless truncation leaves them) have no UTF-8 form and become U+FFFD, the
    replacement character; a pair of surrogates becomes its character.

    Args:
        path_or_bytes: a SentencePiece `.model` file, or its content.
        context_length: most tokens of a text, template included; at least 2. The official models use 52.
        truncation_side: where a longer text loses pieces: "left" keeps its end, as the official models
            expect; "right" keeps its beginning.
        normalise: whether texts go through `normalise_spaces` first, so that blanks and characters that nobody sees,
            which captions for training do not teach, change nothing. None does so but for the official vocabulary,
            whose ids must stay: there a run of blanks becomes blank pieces, which the official model knows.

    Attributes:
        cls_id: id of `[CLS]`, the first token of every text.
        end_id: id of `<|endoftext|>`, the last token of every text, and padding.
        mask_id: id of `[MASK]`, for masked objectives.

    Raises:
        UserError: if the model cannot be read, is no SentencePiece model or lacks a required piece, or if
            `context_length` or `truncation_side` is not allowed.

    Reference: M2-Encoder (arXiv:2401.15896); SentencePiece (arXiv:1808.06226).
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        context_length: int = OFFICIAL_CONTEXT_LENGTH,
        truncation_side: TruncationSide = "left",
        normalise: bool | None = None,
    ) -> None:
        self.context_length = _checked_context_length(context_length)
        self.truncation_side = _checked_truncation_side(truncation_side)
        self._model_bytes, name = read_model(path_or_bytes)
        self._processor = build_processor(self._model_bytes, name)
        literals = {piece: find_piece(self._processor, piece) for piece in (*REQUIRED_PIECES, UNKNOWN_PIECE)}
        self._literal_ids = {piece: index for piece, index in literals.items() if index is not None}
        missing = [piece for piece in REQUIRED_PIECES if piece not in self._literal_ids]
        if missing:
            raise UserError(
                f"{name}: the SentencePiece model lacks the pieces {', '.join(missing)}; "
                "train it with them as user_defined_symbols, or give the official sp.model"
            )
        self._literals = re.compile("(" + "|".join(map(re.escape, self._literal_ids)) + ")")
        self.cls_id = self._literal_ids[CLS_PIECE]
        self.end_id = self._literal_ids[END_PIECE]
        self.mask_id = self._literal_ids[MASK_PIECE]
        blanks = [(" " * length, f"<|blank_{length}|>") for length in range(_LONGEST_BLANK, 1, -1)]
        self.normalise = self.vocab_size != OFFICIAL_VOCAB_SIZE if normalise is None else normalise
        self._blanks = [(spaces, piece) for spaces, piece in blanks if find_piece(self._processor, piece) is not None]

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return int(self._processor.get_piece_size())

    @property
    def digest(self) -> str:
        """SHA-256 of the SentencePiece file, in hexadecimal."""
        return hashlib.sha256(self._model_bytes).hexdigest()

    def count_foreign(self, ids: list[int]) -> int:
        """How many ids stand for bytes or for what the vocabulary lacks."""
        unknown = self.unknown_id
        return sum(
            is_byte or index == unknown for index, is_byte in zip(ids, self._processor.is_byte(ids), strict=True)
        )

    @property
    def unknown_id(self) -> int:
        """Id of what the vocabulary has no piece for."""
        return int(self._processor.unk_id())

    @property
    def textless_ids(self) -> frozenset[int]:
        """Ids that the model gives to no text: its control pieces, such as `<s>`, and those it marks as unused."""
        processor, ids = self._processor, list(range(self.vocab_size))
        flags = zip(ids, processor.is_control(ids), processor.is_unused(ids), strict=True)
        return frozenset(index for index, is_control, is_unused in flags if is_control or is_unused)

    @property
    def literal_ids(self) -> dict[str, int]:
        """Ids of the literal pieces that are cut out of a text, by piece."""
        return dict(self._literal_ids)

    @property
    def blanks(self) -> list[tuple[str, str]]:
        """Runs of spaces and the pieces that stand for them, longest first."""
        return list(self._blanks)

    @property
    def model_bytes(self) -> bytes:
        """Content of the SentencePiece file."""
        return self._model_bytes

    def __call__(
        self,
        texts: str | Iterable[str],
        context_length: int | None = None,
        truncation_side: TruncationSide | None = None,
    ) -> TextTokens:
        """Token ids and mask of one or many texts, padded to the longest of them.

        Returns:
            ids (B, T) int64 and mask (B, T) bool; both (0, 0) without texts.

        Raises:
            UserError: if `texts` is neither a string nor an iterable of strings (the message names the type
                and the index), or an option is not allowed.
        """
        kept = self.kept_pieces(context_length, truncation_side)
        rows = [[self.cls_id, *pieces[kept], self.end_id] for pieces in self.encode_all(texts)]
        if not rows:
            return TextTokens(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        # NumPy turns nested lists into an array several times faster than torch does.
        ids = np.array([row + [self.end_id] * (longest - len(row)) for row in rows], dtype=np.int64)
        mask = np.arange(longest) < lengths[:, None]
        return TextTokens(torch.from_numpy(ids), torch.from_numpy(mask))

    def encode(self, text: str) -> list[int]:
        """Ids of all pieces of a text: no template, no truncation.

        Raises:
            UserError: if `text` is not a string.
        """
        if not isinstance(text, str):
            raise UserError(f"text must be a string, got {type(text).__name__}; for many, call the tokenizer")
        return self.encode_all([text])[0]

    def encode_all(self, texts: str | Iterable[str]) -> list[list[int]]:
        """Ids of all pieces of every text, as `encode` of each; many texts go through SentencePiece in one pass.

        Raises:
            UserError: if `texts` is neither a string nor an iterable of strings.
        """
        plans, segments = self._plan(_checked_texts(texts))
        encoded = iter(self._encode_segments(segments))
        rows = []
        for plan in plans:
            row: list[int] = []
            for part in plan:
                if part is None:
                    row += next(encoded)
                else:
                    row.append(part)
            rows.append(row)
        return rows

    def split(self, text: str) -> list[str]:
        """The piece of each id of `encode(text)`; for unknown ids the normalised text that they stand for."""
        plans, segments = self._plan([text])
        cut = iter([self._processor.encode(self._name_blanks(segment), out_type=str) for segment in segments])
        parts: list[str] = []
        for part in plans[0]:
            parts += next(cut) if part is None else self.pieces([part])
        return parts

    def kept_pieces(
        self, context_length: int | None = None, truncation_side: TruncationSide | None = None
    ) -> slice[int | None, int | None, None]:
        """Which pieces of a text stay in a call with these options: a slice of `encode(text)`.

        Raises:
            UserError: if an option is not allowed.
        """
        length = self.context_length if context_length is None else _checked_context_length(context_length)
        side = self.truncation_side if truncation_side is None else _checked_truncation_side(truncation_side)
        kept = length - TEMPLATE_LENGTH
        # Minus zero would be the beginning.
        return slice(-kept, None) if side == "left" and kept else slice(None, kept)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of a sequence of ids.

        The template and padding (`[CLS]`, `<|endoftext|>`) give no text, blank pieces become their spaces,
        other special pieces (`[MASK]`) stay visible. What the normaliser of the model changed stays changed.

        Raises:
            UserError: if an id is not an integer of the vocabulary.
        """
        checked = self._checked_ids(ids)
        text = str(self._processor.decode([i for i in checked if i not in (self.cls_id, self.end_id)]))
        for spaces, piece in self._blanks:
            text = text.replace(piece, spaces)
        return text

    def pieces(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The piece of every id, for example to find word boundaries ("▁").

        Raises:
            UserError: if an id is not an integer of the vocabulary.
        """
        return [str(self._processor.id_to_piece(index)) for index in self._checked_ids(ids)]

    def cuts_like(self, other: SentencePieceTokenizer) -> bool:
        """Whether another file gives every text the same ids: equal pieces, scores and normalisation of characters."""
        ids = range(self.vocab_size)
        if self.vocab_size != other.vocab_size or self.pieces(ids) != other.pieces(ids):
            return False
        own, others = (each._processor.get_score(list(ids)) for each in (self, other))
        return own == others and self.encode_all(_ODD_TEXTS) == other.encode_all(_ODD_TEXTS)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the SentencePiece file, byte for byte as it was read.

        Raises:
            UserError: if the file cannot be written.
        """
        try:
            Path(path).write_bytes(self._model_bytes)
        except OSError as error:
            raise UserError(f"cannot write the tokenizer to {os.fspath(path)}: {error.strerror}") from error

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, int, TruncationSide, bool]]:
        return type(self), (self._model_bytes, self.context_length, self.truncation_side, self.normalise)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(vocab_size={self.vocab_size}, context_length={self.context_length}, "
            f"truncation_side={self.truncation_side!r})"
        )

    def _plan(self, texts: list[str]) -> tuple[list[list[int | None]], list[str]]:
        """Per text its literal special pieces as their id and None for a segment; and the segments of all texts."""
        segments: list[str] = []
        plans: list[list[int | None]] = []
        for text in texts:
            if not text.isascii() and _SURROGATE.search(text):
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            if self.normalise:
                text = normalise_spaces(text)
            if "[" in text or "<|" in text:
                plans.append(self._cut_literals(text, segments))
            else:
                segments.append(text)
                plans.append([None])
        return plans, segments

    def _cut_literals(self, text: str, segments: list[str]) -> list[int | None]:
        """Cut the literal special pieces out of a text; append its segments, return its plan."""
        parts = self._literals.split(text)  # segment, literal, segment, …, segment
        plan: list[int | None] = []
        last = len(parts) - 1
        for position, part in enumerate(parts):
            if position % 2:
                plan.append(self._literal_ids[part])
                continue
            part = part.lstrip() if position > 0 else part
            part = part.rstrip() if position < last else part
            if part:
                segments.append(part)
                plan.append(None)
        return plan

    def _encode_segments(self, segments: list[str]) -> list[list[int]]:
        """SentencePiece ids of segments that hold no literal special pieces."""
        segments = [self._name_blanks(text) if "  " in text else text for text in segments]
        if len(segments) < _MIN_SEGMENTS_FOR_LIST:
            return [self._processor.encode(text) for text in segments]
        # One thread: data loading workers already occupy every core.
        ids: list[list[int]] = self._processor.encode(segments, num_threads=1)
        return ids

    def _name_blanks(self, text: str) -> str:
        """Replace runs of spaces by blank pieces, longest first."""
        for spaces, piece in self._blanks:
            text = text.replace(spaces, piece)
        return text

    def _checked_ids(self, ids: Iterable[int] | Tensor) -> list[int]:
        """Ids as a list of integers of the vocabulary."""
        if isinstance(ids, Tensor):
            ids = ids.tolist()
        vocab_size = self.vocab_size
        checked = []
        try:
            for index, value in enumerate(ids):
                checked.append(operator.index(value))
                if not 0 <= checked[-1] < vocab_size:
                    raise UserError(
                        f"id {checked[-1]} at index {index} is outside the vocabulary of {vocab_size} pieces"
                    )
        except TypeError as error:
            raise UserError(f"ids must be a sequence of integers of one text, got {ids!r:.80}") from error
        return checked


def _checked_texts(texts: str | Iterable[str]) -> list[str]:
    """Texts as a list of strings, or one clear error."""
    if isinstance(texts, str):
        return [texts]
    allowed = "give a string or an iterable of strings"
    # A mapping gives its keys, a set has no order, bytes give numbers: all are mistakes.
    if isinstance(texts, bytes | bytearray | Mapping | Set):
        raise UserError(f"texts must not be {type(texts).__name__}; {allowed}")
    try:
        iterator = iter(texts)
    except TypeError as error:
        raise UserError(f"texts must not be {type(texts).__name__}; {allowed}") from error
    checked = list(iterator)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise UserError(f"texts[{index}] is {type(text).__name__}, not a string; {allowed}")
    return checked


def _checked_context_length(context_length: int) -> int:
    """Context length as an integer that holds at least the template."""
    if not isinstance(context_length, bool):
        try:
            length = operator.index(context_length)
        except TypeError:
            length = 0
        if length >= TEMPLATE_LENGTH:
            return length
    raise UserError(
        f"context_length must be an integer of at least {TEMPLATE_LENGTH} ([CLS] and <|endoftext|>), "
        f"got {context_length!r}"
    )


def _checked_truncation_side(truncation_side: TruncationSide) -> TruncationSide:
    """Truncation side if it is a known one."""
    if truncation_side not in get_args(TruncationSide):
        raise UserError(f"truncation_side must be one of 'left', 'right', got {truncation_side!r}")
    return truncation_side
