"""Sizes of published benchmarks: a set of another size gives numbers that are not comparable.

Sizes of the test splits, of MUGE the validation split, from the papers and pages of the sets: Karpathy and Fei-Fei
(arXiv:1412.2306), Flickr30K-CN (Lan et al., 2017), COCO-CN (arXiv:1805.08661), MUGE (tianchi.aliyun.com/muge),
Crossmodal-3600 (arXiv:2205.12522), XTD (arXiv:2012.05107), ImageNet (arXiv:1409.0575), CUB-200-2011 (CNS-TR-2011-001),
Stanford Dogs (Khosla et al., 2011), Stanford Cars (Krause et al., 2013).
"""

from __future__ import annotations

import dataclasses
from typing import Final, NamedTuple

from m2_encoder.evaluation.sets.base import EvaluationSet


class _Size(NamedTuple):
    pictures: int
    texts: int | None = None  # of each language
    classes: int | None = None


_SIZES: Final = {
    "flickr30k": _Size(1000, 5000),
    "flickr30k_cn": _Size(1000, 5000),
    "coco": _Size(5000, 25_010),
    "coco_cn": _Size(1000, 1053),
    "muge": _Size(29_806, 5008),
    "xm3600": _Size(3600),
    "xtd": _Size(1000, 1000),
    "imagenet": _Size(50_000, classes=1000),
    "imagenet_cn": _Size(50_000, classes=1000),
    "babel_imagenet": _Size(50_000, classes=1000),
    "cub": _Size(5794, classes=200),
    "stanford_dogs": _Size(8580, classes=120),
    "cars196": _Size(8041, classes=196),
}


_ALIASES: Final = {"mscoco_captions": "coco", "mscoco": "coco", "imagenet1k": "imagenet", "imagenet_1k": "imagenet"}


def compare_size(found: EvaluationSet) -> EvaluationSet:
    """The set with `comparable`: how its size differs from that of the published set of its name, if there is one."""
    return dataclasses.replace(found, comparable=_describe_difference(found))


def _describe_difference(found: EvaluationSet) -> str:
    name = found.name.lower().replace("-", "_")
    size = _SIZES.get(_ALIASES.get(name, name))
    if size is None:
        return ""  # nothing was published to compare with
    facts: list[tuple[str, int, int | None]] = [("pictures", len(found.pictures), size.pictures)]
    facts += [(f"{language} texts", len(texts.rows), size.texts) for language, texts in found.texts.items()]
    if found.classes is not None:
        facts += [(f"{language} names", len(names), size.classes) for language, names in found.classes.names.items()]
    differences = [f"{own:,} {what}, {other:,} published" for what, own, other in facts if other not in (None, own)]
    return "; ".join(differences)
