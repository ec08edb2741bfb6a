"""Captions with their words and masks as text for the eye, and the golden files of them.

`python -m tests.support.word_masks [sp.model]` prints the file again, from its own first column.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.masking.text_masking import choose_words
from m2_encoder.data.order.keyed_random import mix
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, WordSegmenter

FOLDER = Path(__file__).resolve().parents[1] / "data"
EMOJI_FILE = FOLDER / "word_masks.txt"
OFFICIAL_FILE = FOLDER / "word_masks_official.txt"
RATIO = 0.5

_ESCAPED = re.compile(r"\\(\\|u[0-9a-f]{4})")


class GoldenLine(NamedTuple):
    """A line of a golden file.

    Attributes:
        text: the caption.
        words: its normalised words, hidden ones in square brackets, what is no word in angle brackets.
    """

    text: str
    words: str


def read_golden(path: Path) -> list[GoldenLine]:
    """The lines of a golden file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [GoldenLine(_unescape(text), words) for text, words in (line.split("\t") for line in lines)]


def write_golden(lines: list[GoldenLine]) -> str:
    """The content of a golden file."""
    return "".join(f"{_escape(line.text)}\t{line.words}\n" for line in lines)


def show_words(segmenter: WordSegmenter, text: str, *, key: int) -> str:
    """The second column of a golden file.

    Args:
        segmenter: cuts the text.
        text: a caption.
        key: decides what is hidden, without a random generator whose numbers another version might change.
    """
    pieces = segmenter.segment(text, context_length=256)
    hidden = choose_words(
        pieces.words.numpy()[None],
        RATIO,
        order=_keyed_numbers(key, 0, len(pieces.words)),
        chance=_keyed_numbers(key, 1, len(pieces.words)),
    )[0]
    shown = [
        f"[{word}]" if is_hidden else word for word, is_hidden in _words(segmenter.tokenizer, text, pieces, hidden)
    ]
    return " ".join(shown)


def _words(
    tokenizer: SentencePieceTokenizer, text: str, pieces: WordPieces, hidden: npt.NDArray[np.bool_]
) -> list[tuple[str, bool]]:
    parts = ["", *tokenizer.split(text), ""]
    words: list[tuple[str, bool]] = []
    numbers = pieces.words.tolist()
    for place in range(1, len(parts) - 1):
        number = numbers[place]
        if number == NO_WORD:
            if parts[place] != "▁":
                words.append((f"<{parts[place].lstrip('▁')}>", False))
        elif place and number == numbers[place - 1]:
            assert hidden[place] == words[-1][1], f"{text!r}: half a word is hidden"
            words[-1] = (words[-1][0] + parts[place], words[-1][1])
        else:
            words.append((parts[place].lstrip("▁"), bool(hidden[place])))
    return [(_read_bytes(word), is_hidden) for word, is_hidden in words]


def _read_bytes(word: str) -> str:
    """A word with its byte pieces, such as <0xE2>, as the characters they are."""
    return re.sub(
        r"(?:<0x[0-9A-F]{2}>)+",
        lambda match: bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(),
        word,
    )


def _keyed_numbers(key: int, stream: int, count: int) -> npt.NDArray[np.float64]:
    return np.array([[(mix(key, stream, place) >> 11) / 2**53 for place in range(count)]])


def _escape(text: str) -> str:
    def escape(character: str) -> str:
        if character == "\\":
            return "\\\\"
        return character if character.isprintable() or ord(character) > 0xFFFF else f"\\u{ord(character):04x}"

    return "".join(map(escape, text))


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: "\\" if match[1] == "\\" else chr(int(match[1][1:], 16)), text)


def main(arguments: list[str]) -> None:
    tokenizer = SentencePieceTokenizer(arguments[0] if arguments else load_emoji_tokenizer_model())
    segmenter = WordSegmenter(tokenizer)
    texts = [line.text for line in read_golden(EMOJI_FILE)]
    lines = [GoldenLine(text, show_words(segmenter, text, key=key)) for key, text in enumerate(texts)]
    sys.stdout.write(write_golden(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
