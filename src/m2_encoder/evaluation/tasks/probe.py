"""What frozen features give on pictures by class, from one picture of each to all: is fine-tuning worth it?"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

import torch
from annotated_types import Ge, Gt, Le, Lt

from m2_encoder.bounds import Rule, Text, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.evaluation.features import EncodedSet
from m2_encoder.evaluation.measures.few_shot import FewShot, Prototypes, measure_few_shot, split_classes
from m2_encoder.evaluation.measures.probes import Labelled
from m2_encoder.evaluation.measures.result import Measurement
from m2_encoder.evaluation.sets.reducing import keep_pictures
from m2_encoder.evaluation.tasks.suite import Sets, Suite
from m2_encoder.evaluation.tasks.suite_measures import ClassPrompts, Found, Part, class_prompts, measure_zero_shot

_MOST_SHOTS: Final = 1024
_LARGEST_SCALE: Final = 100.0  # of CLIP, for models that do not say theirs


def _are_shots(given: Sequence[Any]) -> bool:
    return bool(given) and all(type(each) is int and 1 <= each <= _MOST_SHOTS for each in given)


Shots = Annotated[Sequence[int], Rule(_are_shots, f"a list of whole numbers in 1..{_MOST_SHOTS}", "[1,4,16]")]


class Probe(Suite):
    """Compares zero-shot classification with baselines on frozen features, none of which changes the model.

    They are k nearest neighbours, a linear probe, and a linear probe that starts at the class names and is held near
    them (CLAP), from K training pictures of each class, with several draws, and from all. All are measured on the same
    test pictures.

    Args:
        sets: as of a suite, folders of classes or other sets with classes; `train` names the pictures that are learnt
            from. Without it, part of each class is held out for the test.
        only: names of the sets that are measured; None for all.
        root: folder of sets without a path of their own.
        shots: numbers K.
        seeds: draws of each K.
        test: share of each class that is asked for, in sets without `train`.
        languages: of class names; None for all of a set.
        templates: families of `evaluation.prompts`, or files, as of a suite.
    """

    @check_bounds
    def __init__(
        self,
        *,
        sets: Sets,
        only: Sequence[str] | None = None,
        root: Text = "outputs/benchmarks",
        shots: Shots = (1, 2, 4, 8, 16),
        seeds: Annotated[int, Ge(1), Le(100)] = 5,
        test: Annotated[float, Gt(0), Lt(1)] = 0.5,
        languages: Sequence[str] | None = None,
        templates: Sequence[Any] = ("general",),
    ) -> None:
        wishes: dict[str, Any] = {"languages": languages, "templates": templates}
        super().__init__(sets=sets, only=only, root=root, measures=["zero_shot"], **wishes)
        self._shots, self._seeds, self._test = sorted(set(shots)), seeds, test

    def _measure_part(self, part: Part) -> Iterator[Found]:
        classes = part.encoded.dataset.classes
        if part.subset or classes is None:
            return
        if classes.targets.dim() == 2:
            raise UserError("its pictures have several classes each; a probe wants one")
        asked, train = self._sides(part)
        reads_texts = not part.encoder.model.no_texts
        if reads_texts:
            yield from measure_zero_shot(asked)
        assert asked.encoded.dataset.classes is not None
        num_classes = len(next(iter(classes.names.values())))
        prompts = [each for each in class_prompts(asked, classes) if bool(each.known.all())] if reads_texts else []
        prototypes = [Prototypes(each.vectors, _scale_of(part)) for each in prompts]
        test = Labelled(asked.encoded.images, asked.encoded.dataset.classes.targets)
        found = measure_few_shot(train, test, prototypes, num_classes=num_classes, shots=self._shots, seeds=self._seeds)
        yield from _rows(found, prompts, classes.label_set, len(test.targets), num_classes, self._seeds)

    def _sides(self, part: Part) -> tuple[Part, Labelled]:
        """What is asked for, and what is learnt from."""
        encoded = part.encoded
        assert encoded.dataset.classes is not None
        if part.train is not None and part.train.dataset.classes is not None:
            _check_same_classes(part)
            return part, Labelled(part.train.images, part.train.dataset.classes.targets)
        targets = encoded.dataset.classes.targets
        is_asked = split_classes(targets, self._test)
        if not is_asked.any():
            raise UserError("no class has two pictures, one to learn from and one to ask for")
        rows = is_asked.nonzero()[:, 0]
        dataset = keep_pictures(encoded.dataset, rows)
        held = EncodedSet(dataset, encoded.images[rows], encoded.kept[rows], {}, ())
        return dataclasses.replace(part, encoded=held), Labelled(encoded.images[~is_asked], targets[~is_asked])


def _check_same_classes(part: Part) -> None:
    assert part.train is not None
    own, other = part.encoded.dataset.classes, part.train.dataset.classes
    assert own is not None
    assert other is not None
    if {len(names) for names in own.names.values()} != {len(names) for names in other.names.values()}:
        counts = [len(next(iter(each.names.values()))) for each in (own, other)]
        raise UserError(f"has {counts[0]:,} classes, and its training pictures {counts[1]:,}; both want the same")


def _scale_of(part: Part) -> float:
    """exp(logit_scale) of the model; 100 where it does not say one."""
    scale: object = getattr(part.encoder.model.model, "logit_scale", None)
    if not isinstance(scale, torch.Tensor) or scale.numel() != 1:
        return _LARGEST_SCALE
    return min(float(scale.detach().float().exp()), _LARGEST_SCALE)


def _rows(
    found: Sequence[FewShot], prompts: Sequence[ClassPrompts], label_set: str, n: int, num_classes: int, seeds: int
) -> Iterator[Found]:
    """For each way, means over draws, and their standard deviations."""
    remark = f"K pictures of each class: means of {seeds} draws, and their standard deviations"
    ways: list[tuple[str, str, str, list[tuple[float, ...]]]] = [
        ("knn", "", "", [each.knn for each in found]),
        ("linear", "", "", [each.linear for each in found]),
        *(
            ("clap", each.language, each.templates, [row.clap[number] for row in found])
            for number, each in enumerate(prompts)
        ),
    ]
    names = ["top1_all" if each.shots is None else f"top1_{each.shots}_shot" for each in found]
    chance = 100.0 / num_classes
    for way, language, templates, values in ways:
        draws = list(zip(names, values, strict=True))
        means = [Measurement(name, statistics.fmean(own), n, chance=chance) for name, own in draws]
        spread = [Measurement(name, statistics.stdev(own), n) for name, own in draws if len(own) > 1]
        for protocol, measurements in ((way, means), (f"{way}_std", spread)):
            if measurements:
                yield Found(
                    "few shots", measurements, language, protocol, "", label_set, templates, remark, as_published=False
                )
