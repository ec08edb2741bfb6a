"""What a suite can measure on a set, by name: each takes a part of a set and gives numbers, or none.

Letters: n pictures · m texts · C classes · T templates · E feature dim.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from m2_encoder.data.images.transforms import open_image
from m2_encoder.errors import UserError, abridge
from m2_encoder.evaluation.feature_store import text_key
from m2_encoder.evaluation.features import EncodedSet, FeatureEncoder
from m2_encoder.evaluation.measures.classification import class_vectors, measure_classification, measure_multilabel
from m2_encoder.evaluation.measures.geometry import measure_alignment, measure_gap, measure_uniformity
from m2_encoder.evaluation.measures.nearest import find_nearest
from m2_encoder.evaluation.measures.parallel import measure_parallel
from m2_encoder.evaluation.measures.probes import Labelled, measure_linear, measure_neighbours
from m2_encoder.evaluation.measures.protocols import M2_RELEASE, Protocol, clean_caption, find_positives
from m2_encoder.evaluation.measures.result import Measurement
from m2_encoder.evaluation.measures.retrieval import Retrieval, measure_retrieval
from m2_encoder.evaluation.prompts import FAMILIES, Templates, digest_texts, expand, load_templates
from m2_encoder.evaluation.report.page import Found as FoundPictures
from m2_encoder.evaluation.report.page import Gallery, thumbnail
from m2_encoder.evaluation.sets.base import Classes, EvaluationSet
from m2_encoder.evaluation.sets.reducing import keep_pictures
from m2_encoder.pictures import STANDARD

EACH: Final = "/each"
"""Behind a family: each of its templates alone."""

_SHOWN: Final = 5  # queries of a gallery, of each kind
_FOUND: Final = 4  # pictures beside each
_QUERY_CHARACTERS: Final = 300  # of a query in a gallery


class Wishes(NamedTuple):
    """What is asked of all sets of a suite."""

    protocols: tuple[str, ...]
    languages: tuple[str, ...] | None  # None for all
    directions: tuple[str, ...]


class Found(NamedTuple):
    """Numbers of one measure in one language."""

    task: str
    measurements: Sequence[Measurement]
    language: str = ""
    protocol: str = ""
    subset: str = ""
    label_set: str = ""
    templates: str = ""
    remark: str = ""
    as_published: bool = True  # whether published numbers may stand beside these; not with templates of our writing
    gallery: Gallery | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A set with its features, or a subset of it.

    Attributes:
        encoder: for more texts.
        encoded: the features.
        wishes: of the suite.
        templates: families, files, or mappings of languages to files.
        train: what probes learn from.
        total: pictures of the whole set.
        subset: its name; "" for the whole.
    """

    encoder: FeatureEncoder
    encoded: EncodedSet
    wishes: Wishes
    templates: tuple[Any, ...]
    train: EncodedSet | None
    total: int
    subset: str = ""

    def of_subset(self, name: str) -> Iterator[Part]:
        """The pictures of a subset, and the texts that belong to them alone; nothing if it has none."""
        rows = self.encoded.dataset.subsets[name].sort().values
        if not len(rows):
            return
        dataset = keep_pictures(self.encoded.dataset, rows)
        texts = {}
        for language, kept in dataset.texts.items():
            if language in self.encoded.texts:
                all_rows = self.encoded.dataset.texts[language]
                left = torch.isin(all_rows.pairs[:, 1], rows)
                texts[language] = self.encoded.texts[language][all_rows.pairs[left, 0].unique()]
                assert len(texts[language]) == len(kept.rows)
        encoded = EncodedSet(dataset, self.encoded.images[rows], self.encoded.kept[rows], texts, ())
        yield dataclasses.replace(self, encoded=encoded, subset=name, train=None)


def measure_retrievals(part: Part) -> Iterator[Found]:
    """Both directions, in every language and protocol; with a gallery of the whole set under the first protocol."""
    encoded = part.encoded
    for language, features in encoded.texts.items():
        texts = encoded.dataset.texts[language]
        for number, protocol in enumerate(part.wishes.protocols):
            own = features
            if protocol == M2_RELEASE:
                own = part.encoder.encode_texts([clean_caption(text) for text in texts.rows])
            right = find_positives(cast("Protocol", protocol), texts.rows, texts.pairs)
            found = measure_retrieval(encoded.images, own, right.t2i, right.i2t)
            gallery = None if number or part.subset else _gallery(part, language, found, own)
            yield Found(
                "retrieval", _wanted(found, part.wishes.directions), language, protocol, part.subset, gallery=gallery
            )


def _wanted(found: Retrieval, directions: Sequence[str]) -> list[Measurement]:
    """All numbers; of a benchmark with one direction, those and their mean."""
    if len(directions) > 1:
        return list(found.measurements)
    (own,) = (each for each in found.directions if each.name == directions[0])
    return [*own.measurements, own.mean]


def measure_text_retrieval(part: Part) -> Iterator[Found]:
    """Texts of one language by those of another that say the same."""
    for (first, second), pairs in part.encoded.dataset.parallel.items():
        texts = part.encoded.texts
        if first in texts and second in texts and len(pairs):
            found = measure_parallel((first, second), texts[first], texts[second], pairs)
            for direction, (one, other) in zip(found.directions, ((first, second), (second, first)), strict=True):
                numbers = [_named(each, each.metric.rpartition("_")[2]) for each in direction.measurements]
                yield Found("text retrieval", numbers, f"{one}→{other}", "", part.subset)


def measure_zero_shot(part: Part) -> Iterator[Found]:
    """Classes by their names, in every language and set of templates."""
    classes = part.encoded.dataset.classes
    if classes is None:
        return
    for own in class_prompts(part, classes):
        if classes.targets.dim() == 2:
            measurements = [measure_multilabel(part.encoded.images, own.vectors, classes.targets[:, own.known])]
        else:
            numbers = torch.cumsum(own.known, 0) - 1
            rows = own.known[classes.targets]
            found = measure_classification(part.encoded.images[rows], own.vectors, numbers[classes.targets[rows]])
            measurements = list(found.measurements)
        more = (own.language, "", part.subset, classes.label_set, own.templates, own.remark)
        yield Found("classification", measurements, *more, as_published=not own.is_ours)


class ClassPrompts(NamedTuple):
    """Class vectors of one language and set of templates."""

    language: str
    templates: str  # their name
    is_ours: bool  # whether this package has the templates
    known: Tensor  # classes that have a name, (C,) bool
    vectors: Tensor  # of these, (number of them, E)
    remark: str


def class_prompts(part: Part, classes: Classes) -> Iterator[ClassPrompts]:
    """Of every wanted language in which a picture's class has a name, with every wanted set of templates."""
    for language, names in classes.names.items():
        if part.wishes.languages is not None and language not in part.wishes.languages:
            continue
        known = torch.tensor([bool(name) for name in names])
        if not bool(known.any()) or (classes.targets.dim() == 1 and not bool(known[classes.targets].any())):
            continue
        remarks = [] if bool(known.all()) else [f"{int(known.sum()):,} of {len(names):,} classes have a name"]
        wanted = list(_templates_of(part, language, classes.templates))
        if not wanted:
            remarks.append(f"names alone, as no template is in {language}")
            wanted = [(load_templates("none", language), True)]
        for templates, is_ours in wanted:
            vectors = _class_vectors(part.encoder, [name for name in names if name], language, templates)
            yield ClassPrompts(language, templates.name, is_ours, known, vectors, "; ".join(remarks))


def _class_vectors(encoder: FeatureEncoder, names: Sequence[str], language: str, templates: Templates) -> Tensor:
    """(C, E), kept by all that makes them."""

    def compute() -> Tensor:
        prompts = expand(names, templates.rows)
        features = encoder.encode_texts([text for texts in prompts for text in texts])
        return class_vectors(features.view(len(names), len(templates.rows), -1))

    digest = digest_texts(names, language, templates.rows)
    return encoder.cached_vectors([text_key(f"{digest}/{number}") for number in range(len(names))], compute)


def _templates_of(part: Part, language: str, own: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[Templates, bool]]:
    """The wanted sets of templates in a language, and whether this package has them; those of the set come first."""
    if language in own:
        yield Templates("of the set", own[language]), False
    sources = [each.get(language) if isinstance(each, Mapping) else each for each in part.templates]
    families = {str(source): str(source).removesuffix(EACH) for source in sources if source is not None}
    stems = Counter(Path(family).stem for family in {*families.values()})
    for source, family in families.items():
        try:
            templates = load_templates(family, language)
        except UserError:
            if family not in FAMILIES:
                raise
            continue  # a family of the package is in Chinese and English
        if stems[templates.name] > 1:  # files of one name in several folders
            templates = templates._replace(name=family)
        for one in [Templates(row, (row,)) for row in templates.rows] if source != family else [templates]:
            yield one, family in FAMILIES


def measure_geometry(part: Part) -> Iterator[Found]:
    """Alignment, uniformity and gaps of the space."""
    encoded, texts = part.encoded, part.encoded.texts
    if part.subset or not texts or len(encoded.images) < 2:
        return
    yield Found("geometry", [_named(measure_uniformity(encoded.images), "image_uniformity")])
    for language, features in texts.items():
        pairs = encoded.dataset.texts[language].pairs
        numbers = [measure_alignment(features, encoded.images, pairs), measure_gap(encoded.images, features)]
        if len(features) > 1:
            numbers.append(_named(measure_uniformity(features), "text_uniformity"))
        yield Found("geometry", numbers, language)
    for first, second in encoded.dataset.parallel:
        if first in texts and second in texts:
            gap = measure_gap(texts[first], texts[second], metric="language_gap")
            yield Found("geometry", [gap], f"{first}-{second}")


def _named(found: Measurement, name: str) -> Measurement:
    return found._replace(metric=name)


def measure_probes(part: Part) -> Iterator[Found]:
    """Nearest neighbours and a linear probe, learnt from the set's training pictures."""
    own = part.encoded.dataset.classes
    train = None if part.train is None else part.train.dataset.classes
    if own is None or train is None or part.train is None or own.targets.dim() == 2:
        return
    number = len(next(iter(own.names.values())))
    learnt = Labelled(part.train.images, train.targets)
    asked = Labelled(part.encoded.images, own.targets)
    nearest = measure_neighbours(learnt, asked, num_classes=number)
    linear = measure_linear(learnt, asked, num_classes=number)
    measurements = [*nearest.measurements, *linear.classification.measurements]
    remark = f"learnt from a part: {part.train.dataset.comparable}" if part.train.left_out else ""
    yield Found("probe", measurements, label_set=own.label_set, remark=remark)


def has_something(measure: str, dataset: EvaluationSet, train: EvaluationSet | None) -> bool:
    """Whether a measure finds in a set what it needs."""
    if measure == "text_retrieval":
        return bool(dataset.parallel)
    if measure in ("zero_shot", "probes"):
        return dataset.classes is not None and (measure == "zero_shot" or train is not None)
    return bool(dataset.texts)


MEASURES: Final[Mapping[str, Callable[[Part], Iterator[Found]]]] = {
    "retrieval": measure_retrievals,
    "text_retrieval": measure_text_retrieval,
    "zero_shot": measure_zero_shot,
    "probes": measure_probes,
    "geometry": measure_geometry,
}
"""By the names that a suite takes; a measure that a set has nothing for gives nothing."""

PICTURES_ALONE: Final = frozenset({"probes"})
"""Measures that no text is encoded for."""


def _gallery(part: Part, language: str, found: Retrieval, features: Tensor) -> Gallery:
    """The queries that were found best and worst, in the order of the set."""
    encoded, direction = part.encoded, found.directions[0]
    order = direction.ranks.ranks.argsort(stable=True)
    best = order[:: max(1, int((direction.ranks.ranks == direction.ranks.ranks.min()).sum()) // _SHOWN)][:_SHOWN]
    worst = order.flip(0)[:_SHOWN]
    pairs = encoded.dataset.texts[language].pairs

    def show(rows: Tensor) -> list[FoundPictures]:
        nearest = find_nearest(features[direction.queries[rows]], encoded.images, _FOUND).rows
        shown = []
        for row, near in zip(rows.tolist(), nearest.tolist(), strict=True):
            text = int(direction.queries[row])
            right = int(pairs[pairs[:, 0] == text][0, 1])
            query = abridge(encoded.dataset.texts[language].rows[text], _QUERY_CHARACTERS)
            rank = int(direction.ranks.ranks[row])
            shown.append(
                FoundPictures(query, rank, _thumbnail(part, right), tuple(_thumbnail(part, each) for each in near))
            )
        return shown

    return Gallery(
        part.encoder.model.name, encoded.dataset.name, language, len(encoded.images), show(best), show(worst)
    )


def _thumbnail(part: Part, row: int) -> str:
    """Empty for a picture that cannot be shown, such as one of which only a feature is left."""
    try:
        return thumbnail(open_image(part.encoded.dataset.pictures[row].read(), pictures=STANDARD))
    except (UserError, OSError):
        return ""
