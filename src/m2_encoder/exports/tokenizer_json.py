"""A tokenizer of ours as `tokenizer.json`, for libraries that know no SentencePiece.

The file holds the whole recipe of `SentencePieceTokenizer`: white space, blank pieces, characters, pieces, template.
It gives the same ids, except for texts that hold

- letters with separate accents, where a piece ends between both, or with several accents that have another order in
  Unicode's composed form; half-width kana with a voicing mark; with folded case the letter `İ`;
- a joiner (U+200D) that is dropped in one and part of a picture in the other, as behind a no-break space, which only a
  tokenizer without `normalise` leaves in;
- a literal piece that appears only as invisible characters are dropped, such as `[CL` + U+200B + `S]`, or stands
  beside a control character from U+001C to U+001F;
- the name of a byte piece in so many characters, such as `<0x41>`;
- the characters U+FDD0 to U+FDEF, which are for programs and stand for nothing;
- a lone surrogate, which a Python string can hold: the other library refuses it.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

from m2_encoder.errors import UserError
from m2_encoder.files import write_json, write_text
from m2_encoder.tokenizers.sentencepiece_tokenizer import CLS_PIECE, END_PIECE, MASK_PIECE, SentencePieceTokenizer
from m2_encoder.tokenizers.spaces import normalise_spaces, space_rules
from m2_encoder.tokenizers.specification import Piece, Specification, read_specification

TOKENIZER_JSON: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"

_SPACE = "▁"
_MARKER = "\ufdd0"
"""Stands before a piece that is found as it is, so that the normaliser puts no `▁` before it; a non-character."""
_STAND_INS = [chr(code) for code in range(0xFDD1, 0xFDF0)]
"""For such pieces that the table of characters would change: `[SEP]` would become `[sep]`."""


def write_tokenizer_json(tokenizer: SentencePieceTokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which open as `PreTrainedTokenizerFast`.

    Args:
        tokenizer: ours; its context length, side of truncation and tidying of white space are written, too.
        folder: where to write; must exist.

    Raises:
        UserError: for a SentencePiece file of a kind that has no equal there, or if the disk refuses.
    """
    content = json.dumps(build_tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":"))
    write_text(folder / TOKENIZER_JSON, content)
    write_json(folder / TOKENIZER_CONFIG, build_tokenizer_config(tokenizer))


def build_tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Content of `tokenizer.json`; errors as in `write_tokenizer_json`."""
    specification = read_specification(tokenizer.model_bytes)
    literals = tokenizer.literal_ids
    names = [_name(piece, literals) for piece in specification.pieces]
    added = [
        _added(index, names[index], is_literal=names[index] in literals)
        for index, piece in enumerate(specification.pieces)
        if piece.kind == "user_defined" and not (tokenizer.normalise and normalise_spaces(piece.text) != piece.text)
    ]  # pieces of characters that are dropped before are found in no text
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(tokenizer, specification)},
        "pre_tokenizer": None,
        "post_processor": _template(tokenizer),
        "decoder": {"type": "Sequence", "decoders": _decoders(tokenizer)},
        "model": _model(specification, names),
    }


def build_tokenizer_config(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "cls_token": CLS_PIECE,
        "eos_token": END_PIECE,
        "pad_token": END_PIECE,
        "mask_token": MASK_PIECE,
        "padding_side": "right",
        "truncation_side": tokenizer.truncation_side,
        "model_max_length": tokenizer.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _name(piece: Piece, literals: dict[str, int]) -> str:
    """What a piece is called: as it is if texts are cut into it, else so that no text spells it."""
    is_cut_into = piece.kind in ("normal", "byte") or piece.text in literals
    return piece.text if is_cut_into else _MARKER + piece.text


def _added(index: int, name: str, *, is_literal: bool) -> dict[str, Any]:
    """A piece that is found in a text before anything else: literals in the raw one, others in the normalised one."""
    return {
        "id": index,
        "content": name,
        "single_word": False,
        "lstrip": is_literal,
        "rstrip": is_literal,
        "normalized": not is_literal,
        "special": is_literal,
    }


def _normalizers(tokenizer: SentencePieceTokenizer, specification: Specification) -> list[dict[str, Any]]:
    steps = [_replace(pattern, text, is_regex=True) for pattern, text in space_rules()] if tokenizer.normalise else []
    steps += [_replace(spaces, piece) for spaces, piece in tokenizer.blanks]
    steps += [_replace(piece, stand_in) for piece, stand_in in _stand_ins(tokenizer, specification)]
    if not specification.trims_blanks:
        steps.append({"type": "Prepend", "prepend": " "})
    if specification.characters:
        # The library looks up what belongs together on the screen by its beginning: put it into one character each.
        steps += [_replace("\r", "\n"), {"type": "NFC"}]
        steps += [{"type": "Lowercase"}] if specification.folds_case else []
        table = base64.b64encode(specification.characters).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if specification.trims_blanks:
        steps += [_replace(" {2,}", " ", is_regex=True), _replace("^ | $", "", is_regex=True)]
        steps.append({"type": "Prepend", "prepend": " "})
    return [*steps, _replace(" ", _SPACE), _replace(_SPACE + _MARKER, "")]


def _stand_ins(tokenizer: SentencePieceTokenizer, specification: Specification) -> list[tuple[str, str]]:
    changed = [piece for piece in specification.changed if piece not in tokenizer.literal_ids]
    if len(changed) > len(_STAND_INS):
        rule = f"has {len(changed)} user-defined pieces that its own table of characters changes"
        raise UserError(f"the SentencePiece file {rule}; tokenizer.json holds {len(_STAND_INS)} of them at most")
    return list(zip(sorted(changed, key=len, reverse=True), _STAND_INS, strict=False))


def _replace(pattern: str, content: str, *, is_regex: bool = False) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex" if is_regex else "String": pattern}, "content": content}


def _template(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    def special(piece: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": piece, "type_id": 0}}

    single = [special(CLS_PIECE), {"Sequence": {"id": "A", "type_id": 0}}, special(END_PIECE)]
    ids = {CLS_PIECE: tokenizer.cls_id, END_PIECE: tokenizer.end_id}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}, special(END_PIECE)],
        "special_tokens": {piece: {"id": piece, "ids": [index], "tokens": [piece]} for piece, index in ids.items()},
    }


def _decoders(tokenizer: SentencePieceTokenizer) -> list[dict[str, Any]]:
    blanks = [_replace(piece, spaces) for spaces, piece in tokenizer.blanks]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [_replace(_MARKER, ""), *blanks, _replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip]


def _model(specification: Specification, names: list[str]) -> dict[str, Any]:
    pieces = specification.pieces
    unknown = next(index for index, piece in enumerate(pieces) if piece.kind == "unknown")
    if specification.algorithm == "unigram":
        vocab = [[name, piece.score] for name, piece in zip(names, pieces, strict=True)]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": specification.byte_fallback}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": specification.byte_fallback,
        "ignore_merges": False,
        "vocab": {name: index for index, name in enumerate(names)},
        "merges": _merges(pieces),
    }


def _merges(pieces: list[Piece]) -> list[list[str]]:
    """Pairs of pieces that make a piece, best first: of equal ones, that with the longer left part."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == "normal"}
    merges = [
        (-score, -at, text[:at], text[at:])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return [[left, right] for _, _, left, right in sorted(merges)]
