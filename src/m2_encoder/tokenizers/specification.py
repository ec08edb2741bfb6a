"""What a SentencePiece file says about itself: its pieces, its algorithm and how it changes characters."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2

from m2_encoder.errors import UserError

_SPACE: Final = "▁"
PieceKind = Literal["normal", "unknown", "control", "user_defined", "byte", "unused"]

_ALGORITHMS: Final = {1: "unigram", 2: "bpe"}
_KINDS: Final[dict[int, PieceKind]] = {
    1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte",
}  # fmt: skip


class Piece(NamedTuple):
    """One row of the vocabulary."""

    text: str
    score: float
    kind: PieceKind


class Specification(NamedTuple):
    """Content of a SentencePiece file, as plain values."""

    algorithm: str  # "unigram" or "bpe"
    pieces: list[Piece]  # by id
    characters: bytes  # table of what characters become: a trie, and the texts it leads to
    folds_case: bool
    trims_blanks: bool  # spaces around a text go, and of several in a row all but one
    byte_fallback: bool
    changed: tuple[str, ...]  # user-defined pieces that the table would change; they are exempt from it


def read_specification(content: bytes) -> Specification:
    """Read the content of a SentencePiece file.

    Raises:
        UserError: for an algorithm other than unigram and BPE, or texts that do not begin with a `▁`.
    """
    model: Any = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in _ALGORITHMS or trainer.treat_whitespace_as_suffix:
        raise UserError("the SentencePiece file must be of the kind unigram or bpe, with blanks as prefixes of words")
    if not (normalizer.add_dummy_prefix and normalizer.escape_whitespaces):
        raise UserError("the SentencePiece file must put `▁` before a text and in place of spaces")
    pieces = [Piece(piece.piece, piece.score, _KINDS[piece.type]) for piece in model.pieces]
    change = SentencePieceNormalizer(
        model_proto=content, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    ).Normalize
    exempt = [piece.text for piece in pieces if piece.kind == "user_defined"]
    return Specification(
        algorithm=_ALGORITHMS[trainer.model_type],
        pieces=pieces,
        characters=normalizer.precompiled_charsmap,
        folds_case=normalizer.name.endswith("_cf"),
        trims_blanks=normalizer.remove_extra_whitespaces,
        byte_fallback=trainer.byte_fallback,
        changed=tuple(text for text in exempt if change(text) != text.replace(_SPACE, " ")),
    )
