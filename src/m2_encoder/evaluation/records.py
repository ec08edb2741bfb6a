"""One record per number, and the published number beside it."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


class Published(NamedTuple):
    """What somebody published of a model on a set."""

    value: float
    source: str  # such as "arXiv:2401.15896"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One number, and all that it takes to read it.

    Attributes:
        model: as it was named on the command line.
        dataset: the set's name.
        language: of texts or class names; "" where there is none.
        task: such as "retrieval", "classification".
        protocol: such as "standard", "m2-release".
        metric: such as "t2i_r@1", "top1".
        value: percent, unless the metric says otherwise.
        low: lower end of its 95 % interval; None if there is none.
        high: upper end.
        n: queries, pictures or pairs that it is a mean over.
        chance: what a model that knows nothing gets; None where that has no meaning.
        subset: of the set; "" for the whole.
        label_set: of classes.
        templates: the set of templates.
        published: the published number, if this one measures the same thing.
        source: where that was published.
        remark: why this number is not to be compared with others; "" if it may be.
        left_out: pictures that could not be used.
        ties: percent of the queries whose best right item ties with a wrong one.
        seconds: that the task took.
        preprocessing: what was made of pictures.
        checkpoint: fingerprint of the model.
    """

    model: str
    dataset: str
    task: str
    metric: str
    value: float
    n: int
    language: str = ""
    protocol: str = ""
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    subset: str = ""
    label_set: str = ""
    templates: str = ""
    published: float | None = None
    source: str = ""
    remark: str = ""
    left_out: int = 0
    ties: float | None = None
    seconds: float | None = None
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without what is empty."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, "", {})}


def find_published(model: str, dataset: str, language: str, metric: str, *, protocol: str = "") -> Published | None:
    """The published number of a model on a set under a protocol; None if there is none.

    `model` is a name or a path that holds one: "m2_encoder_1b" and "weights/m2-encoder-1b" are the same model. Recalls
    of the family were published under `m2-release`, those of others under `standard`; accuracies have no protocol.
    """
    plain = model.lower().replace("_", "-")
    for name in sorted({key[0] for key in _published()}, key=len, reverse=True):
        if plain == name or plain.endswith(f"/{name}"):
            return _published().get((name, dataset, language, protocol, metric))
    return None


@cache
def _published() -> Mapping[tuple[str, ...], Published]:
    text = (files("m2_encoder") / "assets" / "published" / "numbers.csv").read_text(encoding="utf-8")
    keys = ("model", "dataset", "language", "protocol", "metric")
    return {
        tuple(row[key] for key in keys): Published(float(row["value"]), row["source"])
        for row in csv.DictReader(text.splitlines())
    }
