"""Samples the captions that a step trains on: first a language, then a role.

Captions are of several languages and roles: a name, an alias, a keyword; or the original caption of a web page, one
that a model has rewritten, a translation. The role "mixed" is a list of keywords, as people type into a search box.

Reference: sampling among several captions per image, LaCLIP (arXiv:2305.20088); original and rewritten ones in turn,
VeCLIP (arXiv:2310.07699); sentences and keywords, HQ-CLIP (arXiv:2507.22431); a long and a short one together,
Long-CLIP (arXiv:2403.15378).
"""

from __future__ import annotations

import hashlib
import re
import typing
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from m2_encoder.bounds import Count, NotNegative, Rule, check_bounds
from m2_encoder.data.samples.parse import CaptionText, SampleProblem, SampleText
from m2_encoder.types import LANGUAGES

StoredRole: TypeAlias = Literal["name", "alias", "keyword", "original", "rewritten", "translated"]
Role: TypeAlias = StoredRole | Literal["mixed"]
STORED_ROLES = typing.get_args(StoredRole)
"""What a stored caption can be: what something is called, or a sentence about an image and where that comes from."""

CAPTION_ROLES = (*STORED_ROLES, "mixed")
"""One caption of a role; or, for "mixed", several keywords as a list, sometimes with the name among them."""

_SHOWN_CHARACTERS = 64  # of a caption's form
_PLAIN_ROLE = "original"  # of a caption without a role
_SEPARATOR = {"en": ", ", "zh": "，"}
_SENTENCE_END = re.compile(r"[。！？\n]+|[.!?]+(?=\s|$)")  # "3.5 m" is none


LanguageWeights: TypeAlias = Annotated[
    Mapping[Literal["en", "zh"], NotNegative],
    Rule(
        lambda weights: any(weights.values()),
        f"numbers, 0 or more and not all 0, for some of {', '.join(LANGUAGES)}",
        "{zh: 0.5, en: 0.5}",
    ),
]
RoleWeights: TypeAlias = Annotated[
    Mapping[Role, NotNegative],
    Rule(
        lambda weights: any(weights.values()),
        f"numbers, 0 or more and not all 0, for some of {', '.join(CAPTION_ROLES)}",
        "{name: 0.5, keyword: 0.5}",
    ),
]


class Caption(NamedTuple):
    """A sampled caption."""

    text: str  # what the tokenizer gets
    language: str  # one of `LANGUAGES`


class CaptionSampler:
    """Samples captions of an image for one step.

    Args:
        language_weights: relative frequency of each language, e.g. {"zh": 0.5, "en": 0.5}.
        role_weights: relative frequency of each of `CAPTION_ROLES`, among those that the image has.
        max_keywords: longest list of keywords.
        every_language: one caption in each language, in the order of `LANGUAGES`, instead of one in all; a language
            that the image lacks is replaced by another. The image is encoded once for all its captions.
        short: what follows each of these captions as a short one in the same language: its first sentence, without the
            mark that ends it; or a caption of a role, which then is no long one where there are others, and the first
            sentence where the image has none of that role. None for no short ones.

    Attributes:
        captions_per_image: number of sampled captions.
        languages: those with a weight, in the order of `LANGUAGES`.
    """

    @check_bounds
    def __init__(
        self,
        *,
        language_weights: LanguageWeights,
        role_weights: RoleWeights,
        max_keywords: Count = 4,
        every_language: bool = False,
        short: Literal["first_sentence"] | StoredRole | None = None,
    ) -> None:
        self.language_weights = _in_order(language_weights, LANGUAGES)
        self.role_weights = _in_order(role_weights, CAPTION_ROLES)
        self.max_keywords = max_keywords
        self.every_language = every_language
        self.languages = tuple(language for language, weight in self.language_weights.items() if weight > 0)
        self.short = short
        self.captions_per_image = (len(self.languages) if every_language else 1) * (1 if short is None else 2)

    def __call__(self, text: SampleText, *, rng: np.random.Generator) -> tuple[Caption, ...]:
        """Sample `captions_per_image` captions.

        Raises:
            SampleProblem: missing_caption, if there is none in a language with a weight; wrong_type for unknown roles.
        """
        spoken = {caption.language for caption in text.captions}
        available = {name: self.language_weights[name] for name in self.languages if name in spoken}
        if not available:
            raise SampleProblem("missing_caption", f"no caption in {' or '.join(self.languages)}")
        if self.every_language:
            languages = [name if name in available else _draw(available, rng) for name in self.languages]
        else:
            languages = [_draw(available, rng)]
        said: list[Caption] = []
        for language in languages:
            by_role = _group_by_role(text, language)
            said.append(Caption(self._speak(by_role, language, rng), language))
            if self.short is not None:
                short = by_role.get(self.short) or [first_sentence(said[-1].text)]
                said.append(Caption(short[int(rng.integers(len(short)))], language))
        return tuple(said)

    def _speak(self, by_role: Mapping[str, Sequence[str]], language: str, rng: np.random.Generator) -> str:
        choices = {
            role: weight
            for role, weight in self.role_weights.items()
            if weight > 0 and role != self.short and by_role.get("keyword" if role == "mixed" else role)
        }
        if not choices:
            every = [text for texts in by_role.values() for text in texts]
            return every[int(rng.integers(len(every)))]
        role = _draw(choices, rng)
        if role != "mixed":
            return by_role[role][int(rng.integers(len(by_role[role])))]
        words = by_role["keyword"]
        count = 1 + int(rng.integers(min(self.max_keywords, len(words))))
        chosen = [words[i] for i in rng.permutation(len(words))[:count]]
        if by_role.get("name") and rng.random() < 0.5:
            chosen.insert(int(rng.integers(len(chosen) + 1)), by_role["name"][0])
        return _SEPARATOR[language].join(chosen)


def first_sentence(text: str) -> str:
    """A text up to the first mark that ends a sentence, Chinese or English, or the end of the line.

    >>> first_sentence("A 3.5 m boat. It is red.")
    'A 3.5 m boat'
    """
    parts = (part.strip() for part in _SENTENCE_END.split(text))
    return next(filter(None, parts), text)


def check_roles(captions: Iterable[CaptionText]) -> None:
    """Refuse roles that `CaptionSampler` does not know.

    Raises:
        SampleProblem: wrong_type.
    """
    for caption in captions:
        if caption.role is not None and caption.role not in STORED_ROLES:
            known = ", ".join(STORED_ROLES)
            raise SampleProblem("wrong_type", f"unknown role {caption.role} of {caption.language!r}; known: {known}")


def _group_by_role(text: SampleText, language: str) -> dict[str, list[str]]:
    captions = [caption for caption in text.captions if caption.language == language]
    check_roles(captions)
    by_role: dict[str, list[str]] = {}
    for caption in captions:
        by_role.setdefault(caption.role or _PLAIN_ROLE, []).append(caption.text)
    return by_role


def _in_order(weights: Mapping[Any, float], names: Sequence[str]) -> dict[str, float]:
    return {name: float(weights[name]) for name in names if name in weights}


def _draw(weights: Mapping[str, float], rng: np.random.Generator) -> str:
    share = list(accumulate(weights.values()))  # of a few: arrays would cost ten times as much
    return list(weights)[bisect_right(share, rng.random() * share[-1])]


def caption_form(text: str) -> str:
    """A form that equal captions share: case, width, spaces and invisible characters do not tell them apart."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join("".join(sign for sign in plain if unicodedata.category(sign) != "Cf").split())
    if len(plain) <= _SHOWN_CHARACTERS:
        return plain
    return f"{plain[:_SHOWN_CHARACTERS]}…{hashlib.blake2b(plain.encode(), digest_size=12).hexdigest()}"


def name_captions(captions: Iterable[CaptionText]) -> str:
    """A name that samples share whose captions are all equal, in any order."""
    return " | ".join(sorted({caption_form(caption.text) for caption in captions}))
