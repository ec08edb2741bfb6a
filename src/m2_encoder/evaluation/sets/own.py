"""The user's own pictures: tars, tables and folders, as `m2-data pack` and validation sets read them.

Which samples show the same is decided as for validation sets (`data.retrieval_contents`): equal files are one picture
of the gallery, all pictures of a content are right for its captions, and each caption of a content is one query.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from stat import S_ISREG

import torch
from torch import Tensor

from m2_encoder.checkpoints.formats import read_small_json
from m2_encoder.data.emoji.dataset import EMOJI_SPLITS, EmojiStyle, Split
from m2_encoder.data.emoji.folder import EMOJI_MARKER
from m2_encoder.data.packing.records import URL_SCHEMES
from m2_encoder.data.retrieval_contents import SetContents, SetRows, check_sample, hash_picture
from m2_encoder.data.retrieval_source import ImagePlace, SetSample, read_place, read_samples
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import Classes, EvaluationSet, Texts
from m2_encoder.evaluation.sets.image_folder import read_image_folder
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import Pictures
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, pair_rows


class PlacedPictures(Pictures):
    """Pictures wherever they lie: in files, tars and tables."""

    def __init__(self, names: Sequence[str], places: Sequence[ImagePlace]) -> None:
        super().__init__(names)
        self.places = places

    def read(self, number: int) -> bytes:
        """The content of a picture's file."""
        return read_place(self.places[number])


def read_own(
    path: str | os.PathLike[str], *, labels: str | Mapping[str, str] | None = None, name: str | None = None
) -> EvaluationSet:
    """Read pictures with captions, or, with `labels`, pictures in a folder for each class.

    Nothing is decoded. Of pictures in files, those of equal size are hashed to find equal ones.

    Args:
        path: of a folder, a tar, a pattern of tars, or a table.
        labels: names of the classes, as `image_folder.read_image_folder` takes them, such as "names.txt" with a folder,
            its Chinese and its English name a line.
        name: in tables; by default that of the folder or file.

    Raises:
        UserError: for another layout, and for the first sample that cannot be used: an evaluation skips nothing.
    """
    own = name or _name_of(path)
    if labels is not None:
        return read_image_folder(path, labels=labels, name=own)
    root = path if _is_pattern(path) else expect(path, "own")
    return compare_size(_read_samples(str(root), own))


def read_emoji(
    path: str | os.PathLike[str],
    *,
    split: Split | None = None,
    heldout_style: EmojiStyle | None = None,
    name: str | None = None,
) -> EvaluationSet:
    """Read a split of the unpacked built-in set, whose Chinese and English names of a concept say the same.

    Its classes are its concepts, by their names.

    Args:
        path: of the folder of a split; or of the whole set, with `split`.
        split: which one.
        heldout_style: the style that the set must keep from training; None for whichever it does.
        name: in tables; by default "emoji_" and the split.

    Raises:
        UserError: for another layout, and a split that is not there.
    """
    root = expect(path, "emoji")
    if (root / EMOJI_MARKER).is_file():
        if split is None or split not in EMOJI_SPLITS:
            raise UserError(f"one of {', '.join(EMOJI_SPLITS)}; {root} is the whole set", key="split", value=split)
        root = expect(root / split, "emoji")
    elif split not in (None, root.resolve().name):
        raise UserError(f"{root} is a split itself", key="split", value=split)
    styles = read_small_json(root / "index.json").get("styles")
    style = str(styles[0]) if isinstance(styles, list) and len(styles) == 1 else ""
    if heldout_style is not None and style not in ("", heldout_style):
        raise UserError(f"the drawings in {root} are of {style}", key="heldout_style", value=heldout_style)
    found = compare_size(_read_samples(str(root), name or f"emoji_{root.resolve().name}", is_marked=True))
    return dataclasses.replace(found, style=style)


def _read_samples(where: str, name: str, *, is_marked: bool = False) -> EvaluationSet:
    contents = SetContents(is_marked=is_marked)
    names: list[str] = []
    places: list[ImagePlace] = []
    hashes: dict[int, bytes] = {}  # of pictures that were read with their rows
    for sample in read_samples(where, images=False):
        check_sample(sample)
        contents.add(sample)
        if sample.image:
            hashes[len(places)] = hash_picture(sample.image)
        names.append(_name_picture(sample, where))
        places.append(sample.place)
    numbers = _number(places, names, hashes, where)
    rows = contents.rows(numbers, where=where)
    first: dict[int, int] = {}
    for sample_number, picture in enumerate(numbers):
        first.setdefault(picture, sample_number)
    shown = [first[picture] for picture in rows.pictures]
    texts, contents_of = _texts(rows)
    return EvaluationSet(
        name=name,
        pictures=PlacedPictures([names[each] for each in shown], [places[each] for each in shown]),
        texts=texts,
        parallel=_pair_names(contents_of) if is_marked else {},
        classes=_classes(rows) if is_marked else None,
        source=where,
        counts={**rows.reading._asdict(), "pictures": len(shown), **count_texts(texts)},
    )


def _number(places: Sequence[ImagePlace], names: Sequence[str], hashes: Mapping[int, bytes], where: str) -> list[int]:
    """The number of each sample's picture; equal files have equal ones. Only files of equal size can be equal."""
    if remote := [place.path for place in places if place.path.startswith(URL_SCHEMES)]:
        raise UserError(
            f"{where}: {len(remote):,} pictures are urls, such as {remote[0]}; fetch them once with m2-data pack "
            f"source={where} output=TARS, and evaluate TARS"
        )
    sizes = [_size(place) for place in places]
    if missing := [name for name, size in zip(names, sizes, strict=True) if size is None]:
        raise UserError(f"{where}: {len(missing):,} of {len(names):,} pictures are not there: {name_some(missing, 3)}")
    common = {size for size, count in Counter(sizes).items() if count > 1}
    numbers: dict[object, int] = {}
    found = []
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        mark: object = hashes.get(number) or size
        if size in common and number not in hashes:
            mark = hash_picture(read_place(place))
        found.append(numbers.setdefault(mark, len(numbers)))
    return found


def _size(place: ImagePlace) -> int | None:
    if place.size is not None:
        return place.size
    try:
        status = os.stat(place.path)
    except (OSError, ValueError):
        return None
    return status.st_size if S_ISREG(status.st_mode) else None


def _texts(rows: SetRows) -> tuple[dict[str, Texts], dict[str, list[str]]]:
    """Each caption of a content once, with all pictures of that; and by language which content each one describes."""
    pictures: dict[str, list[int]] = {}
    for row, key in enumerate(rows.keys):
        pictures.setdefault(key, []).append(row)
    texts, contents = {}, {}
    for language, captions in rows.captions.items():
        queries = list(dict.fromkeys((rows.keys[row], text) for row, own in enumerate(captions) for text in own))
        pairs = [(number, row) for number, (key, _) in enumerate(queries) for row in pictures[key]]
        texts[language] = Texts(tuple(text for _, text in queries), pair_rows(*zip(*pairs, strict=True)))
        contents[language] = [key for key, _ in queries]
    return texts, contents


def _classes(rows: SetRows) -> Classes:
    """The contents of pictures as classes, named by the first caption of each in a language."""
    numbers: dict[str, int] = {}
    targets = [numbers.setdefault(key, len(numbers)) for key in rows.keys]
    names = {language: [""] * len(numbers) for language in rows.captions}
    for language, captions in rows.captions.items():
        for target, own in zip(targets, captions, strict=True):
            names[language][target] = names[language][target] or next(iter(own), "")
    return Classes("concepts", {key: tuple(each) for key, each in names.items()}, torch.tensor(targets))


def _pair_names(contents: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Tensor]:
    """Texts of one content in both languages."""
    if set(contents) != {"zh", "en"}:
        return {}
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(contents["en"]):
        rows.setdefault(key, []).append(row)
    pairs = [(row, other) for row, key in enumerate(contents["zh"]) for other in rows.get(key, ())]
    return {("zh", "en"): pair_rows(*zip(*pairs, strict=True))}


def _name_picture(sample: SetSample, where: str) -> str:
    """Its path below the source, or its sample's name in a tar or table."""
    place = sample.place
    if place.rows is not None or not place.path:
        return sample.key
    folder = where if os.path.isdir(where) else os.path.dirname(where)
    name = os.path.relpath(place.path, folder).replace(os.sep, "/") if "://" not in place.path else place.path
    return name if place.size is None else f"{name}:{sample.key}"


def _is_pattern(path: str | os.PathLike[str]) -> bool:
    return not Path(path).expanduser().exists() and any(sign in os.fspath(path) for sign in "*?[{")


def _name_of(path: str | os.PathLike[str]) -> str:
    return Path(path).expanduser().resolve().name.partition(".")[0] or "own"
