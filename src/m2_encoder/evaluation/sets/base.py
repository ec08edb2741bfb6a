"""What an evaluation set is: pictures, texts in any language, classes, and which of them belong together.

A set holds no pixels: pictures are read when they are encoded, so that a set of any size fits. (`RetrievalSet` is what
training validates on: small sets whose images are in memory.)

Letters: n pictures · m texts of a language · P pairs · C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Picture(NamedTuple):
    """One picture, as a file."""

    name: str  # its path in the set; in messages, lists and galleries
    read: Callable[[], bytes]  # the file's content; raises OSError or UserError


class Texts(NamedTuple):
    """The texts of one language; each is a query."""

    rows: tuple[str, ...]  # length m
    pairs: Tensor  # a text and a picture that is right for it, (P, 2) int64; every text has at least one


class Classes(NamedTuple):
    """What pictures are to be sorted into."""

    label_set: str  # which names these are; named in every row of results
    # By language, length C. A class without a name in a language has "": it and its pictures are not in what is
    # measured there.
    names: Mapping[str, tuple[str, ...]]
    targets: Tensor  # the class of each picture, (n,) int64; for several at once (n, C) bool
    templates: Mapping[str, tuple[str, ...]] = {}  # the set's own, by language, with {} for a name; maybe none


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A set as its reader found it.

    Attributes:
        name: in tables and records, such as "flickr30k_cn".
        pictures: length n.
        texts: by language tag, such as "zh", "en", "zh_TW".
        classes: if there is something to classify.
        subsets: rows of pictures by name, such as "letters" of a set of stamps.
        source: the folder or file that it was read from.
        parallel: texts of two languages that say the same, as pairs of rows, (P, 2) int64, by (language, language).
        counts: what became of the samples, for records: read, left out and why.
        comparable: whether its size and rules are those of the published benchmark; a reason if they are not.
        style: the drawing style of all its pictures, where they are of the built-in set.
    """

    name: str
    pictures: Sequence[Picture]
    texts: Mapping[str, Texts] = dataclasses.field(default_factory=dict)
    classes: Classes | None = None
    subsets: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    source: str = ""
    parallel: Mapping[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    comparable: str = ""
    style: str = ""
