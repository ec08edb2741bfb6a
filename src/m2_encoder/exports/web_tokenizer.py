"""A tokenizer of ours as data for `assets/web/tokenizer.js`, which gives the same ids.

`tokenizer.json` would do, if a library for browsers read all of it: they lack pieces for bytes in unigram models, and
come only close to the table of characters.
"""

from __future__ import annotations

from typing import Any, Final

from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.spaces import space_rules
from m2_encoder.tokenizers.specification import PieceKind, read_specification

_KINDS: Final[dict[PieceKind, str]] = {
    "normal": "n", "unknown": "?", "control": "c", "user_defined": "d", "byte": "b", "unused": "u",
}  # fmt: skip


def describe_tokenizer(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], bytes]:
    """What the script needs, as JSON, and the table of characters.

    Raises:
        UserError: for a SentencePiece file of another kind than unigram, such as the official one.
    """
    specification = read_specification(tokenizer.model_bytes)
    if specification.algorithm != "unigram":
        rule = f"the tokenizer is of the kind {specification.algorithm}; the page reads the kind unigram"
        raise UserError(f"{rule}, which m2-data tokenizer makes")
    pieces = specification.pieces
    recipe = {
        "pieces": [piece.text for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "kinds": "".join(_KINDS[piece.kind] for piece in pieces),
        "literals": tokenizer.literal_ids,
        "blanks": tokenizer.blanks,
        "rules": space_rules() if tokenizer.normalise else [],
        "trims_blanks": specification.trims_blanks,
        "byte_fallback": specification.byte_fallback,
        "context_length": tokenizer.context_length,
        "truncation_side": tokenizer.truncation_side,
        "cls_id": tokenizer.cls_id,
        "end_id": tokenizer.end_id,
        "unknown_id": tokenizer.unknown_id,
    }
    return recipe, specification.characters
