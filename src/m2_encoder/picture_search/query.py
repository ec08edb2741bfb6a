"""Queries: words in Chinese or English, a picture, or a combination of both.

    红色的水果                          words
    beach/pool.jpg                      a picture: a file, or one of the index
    2*"狗" + pool.jpg - "水果"          a weighted sum

In a combination words stand in quotes (straight, curly, or 「」), and what ends like a picture is a picture. What does
not read like a combination is words as they are: `New York - skyline` takes nothing away. A picture that is there is
found by its own name, whatever that reads like.

Letters: D feature dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.errors import ImageError, UserError, abridge
from m2_encoder.evaluation.encode import encode_images, encode_texts
from m2_encoder.evaluation.models.base import EvaluatedModel

MAX_TERMS: Final = 16
MAX_WEIGHT: Final = 100.0
MAX_CHARACTERS: Final = 4096

_QUOTED: Final = r'"[^"]*"|“[^”]*”|「[^」]*」'
_SUFFIX: Final = "|".join(re.escape(suffix) for suffix in PICTURE_SUFFIXES)
_NUMBER: Final = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_TIMES: Final = r"\s*[*×＊]\s*"
_SIGN: Final = "[+＋－-]"
_WEIGHT: Final = rf"(?:(?P<weight>{_NUMBER}){_TIMES})?"
_CONTENT: Final = rf"(?P<content>{_QUOTED}|[^\s\"“”「」]+?(?:{_SUFFIX}))"
_TERM: Final = re.compile(rf"\s*(?P<sign>{_SIGN}?)\s*{_WEIGHT}{_CONTENT}(?=\s|{_SIGN}|$)", re.IGNORECASE)
_PICTURE: Final = re.compile(rf".*(?:{_SUFFIX})", re.IGNORECASE | re.DOTALL)
_JOINED: Final = re.compile(
    rf"^{_SIGN}?\s*(?:{_NUMBER}){_TIMES}|^{_SIGN}?\s*(?:{_QUOTED})|(?:{_QUOTED})\s*{_SIGN}"
    rf"|(?:^|\s){_SIGN}\s*{_WEIGHT}[\"“「]|[0-9]{_TIMES}[\"“「]"
)
"""What only a combination has; of one that cannot be read, a part is enough."""


class Term(NamedTuple):
    """A part of a query."""

    weight: float  # not 0
    kind: Literal["words", "picture"]
    content: str  # the words, or the name of a picture

    def __str__(self) -> str:
        shown = f'"{self.content}"' if self.kind == "words" else self.content
        return shown if self.weight == 1 else f"{self.weight:g}*{shown}"


def parse_query(text: str, *, is_picture: Callable[[str], bool] = lambda _: False) -> list[Term]:
    """The terms of a query; nothing is opened or read.

    Args:
        text: of the query.
        is_picture: whether a picture has this name; a query that is such a name is that picture.

    >>> [str(term) for term in parse_query('2*"狗" + pool.jpg - "水果"')]
    ['2*"狗"', 'pool.jpg', '-1*"水果"']
    >>> parse_query("New York - skyline")
    [Term(weight=1.0, kind='words', content='New York - skyline')]

    Raises:
        UserError: for one without words, too long, or a combination that cannot be read; its key is `query`.
    """
    if not text.strip():
        raise UserError("is empty; give words, or the name of a picture", key="query", value=repr(text))
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read", key="query")
    for name in (text, text.strip()):
        if is_picture(name):
            return [Term(1.0, "picture", name)]
    shown, content = abridge(text, 120), text.strip()
    terms, end = _read_terms(content)
    if end < len(content) or not terms:
        if _JOINED.search(content):
            rest = abridge(content[end:].strip(), 60)
            rule = f'cannot be read from {rest} on; a combination is such as 2*"dog" + pool.jpg - "fruit"'
            raise UserError(rule, key="query", value=shown)
        return [Term(1.0, "picture" if _PICTURE.fullmatch(content) else "words", content)]
    if len(terms) > MAX_TERMS:
        raise UserError(f"has {len(terms)} terms, at most {MAX_TERMS} are read", key="query", value=shown)
    for term in terms:
        if not term.content.strip():
            raise UserError("has a term without words", key="query", value=shown)
        if not 0 < abs(term.weight) <= MAX_WEIGHT:
            rule = f"has the weight {abs(term.weight):g}; weights are above 0, at most {MAX_WEIGHT:g}"
            raise UserError(rule, key="query", value=shown)
    return terms


def _read_terms(text: str) -> tuple[list[Term], int]:
    """The terms that a text begins with, and where they end; each but the first has a sign."""
    terms: list[Term] = []
    end = 0
    while found := _TERM.match(text, end):
        if terms and not found["sign"]:
            break
        weight = float(found["weight"] or 1) * (-1 if found["sign"] in ("-", "－") else 1)
        content = found["content"]
        is_quoted = content[0] in '"“「'
        content = content[1:-1] if is_quoted else content
        terms.append(Term(weight, "picture" if _PICTURE.fullmatch(content) else "words", content))
        end = found.end()
    return terms, end


def encode_query(
    terms: Sequence[Term], model: EvaluatedModel, *, picture: Callable[[str], bytes | npt.NDArray[np.floating]]
) -> npt.NDArray[np.float32]:
    """The feature of a query: the weighted sum of its terms' features, normalised, (D,).

    Args:
        terms: of `parse_query`.
        model: with a text tower, if there are words.
        picture: gives the content of a picture's file by its name, or its feature, (D,), if that is known; raises
            `UserError` for a name that it does not serve.

    Raises:
        UserError: for a picture that cannot be used, and terms that cancel each other; its key is `query`.
    """
    words = [term.content for term in terms if term.kind == "words"]
    if words:
        model.require_texts()
        assert model.model is not None
    encoded = iter(encode_texts(model.model, words, model.tokenizer) if words and model.model else ())
    total = torch.zeros(model.facts.embed_dim, dtype=torch.float64)
    for term in terms:
        feature = next(encoded) if term.kind == "words" else _encode_picture(term.content, model, picture)
        total += term.weight * feature.double()
    length = float(total.norm())
    if not math.isfinite(length) or length < 1e-3:
        raise UserError("its terms cancel each other; nothing is left to search for", key="query")
    return np.asarray((total / length).float().numpy())


def _encode_picture(
    name: str, model: EvaluatedModel, picture: Callable[[str], bytes | npt.NDArray[np.floating]]
) -> Tensor:
    content = picture(name)
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content.astype(np.float32))
    assert model.model is not None
    try:
        pixels = model.preprocess(content)
    except ImageError as error:
        said = error.text.removeprefix("image bytes: ")
        raise UserError(f"{abridge(name, 120)}: {said}", key="query") from error
    return encode_images(model.model, pixels[None])[0]
