"""Which samples must stay on one side of a split, and which side each group of them goes to."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from m2_encoder.curation.near import find_pairs

By: TypeAlias = Literal["identity", "folder", "hash", "picture"]
BYS: Final = get_args(By)
"""How samples are split."""


class SplitSample(NamedTuple):
    """What a split knows of a sample."""

    shard: int  # place among the shards
    number: int  # in the shard's index
    image: bytes  # digest of the picture's bytes
    look: int | None  # its perceptual hash, 64 bits; None for a plain area
    color: int  # its mean colour, 0xRRGGBB
    captions: frozenset[str]  # in the form that equal ones share
    identity: str  # of what it shows, as in training
    folder: str  # of its original path, or else of its name
    languages: tuple[str, ...]  # of its captions


class GlueOptions(NamedTuple):
    """What keeps samples together, beside equal pictures, captions and identities."""

    by_folder: bool = False  # the folder of their original path
    by_picture: bool = False  # equal and similar pictures alone
    near_images: int | None = 2  # pictures that differ in so many of 64 bits; None: equal bytes alone
    near_color: int = 16  # and in so much of their mean colour, in each channel
    max_repeats: int | None = None  # captions of more samples do not keep them together; None: all do


class Glue(NamedTuple):
    """The cause that keeps most samples of a group together."""

    kind: str  # picture, caption, identity or folder
    value: str  # the caption, identity or folder; "" for a picture
    samples: int  # that share it


class Groups(NamedTuple):
    """Samples that stay together."""

    members: list[list[int]]  # places of samples by group; each sample is in one
    glued: dict[str, int]  # by kind of cause, how many samples share one with another sample
    frequent: dict[str, int]  # captions that were too frequent to keep samples together, with their samples
    cause: Glue | None  # of the largest group; None if nothing is shared

    @property
    def largest(self) -> int:
        """Samples of the largest group."""
        return max(map(len, self.members), default=0)


def group_samples(samples: Sequence[SplitSample], options: GlueOptions) -> Groups:
    """Connect samples that share a picture, a caption or an identity, over others if need be."""
    causes: dict[str, dict[str | bytes, list[int]]] = {"picture": _classes((each.image,) for each in samples)}
    captions = _classes(each.captions for each in samples)
    limit = len(samples) if options.max_repeats is None else options.max_repeats
    if not options.by_picture:
        causes["identity"] = _classes((each.identity,) for each in samples)  # first: max_repeats does not undo it
        causes["caption"] = {text: places for text, places in captions.items() if len(places) <= limit}
    if options.by_folder:
        causes["folder"] = _classes((each.folder,) for each in samples)
    parents = list(range(len(samples)))
    for classes in causes.values():
        for places in classes.values():
            for other in places[1:]:
                join(parents, places[0], other)
    glued = {kind: sum(map(len, classes.values())) for kind, classes in causes.items()}
    if options.near_images is not None:
        near = set()
        for first, second in _near_pairs(samples, options.near_images, options.near_color):
            near |= {first, second}
            join(parents, first, second)
        glued["similar picture"] = len(near - {place for places in causes["picture"].values() for place in places})
    members: dict[int, list[int]] = {}
    for place in range(len(samples)):
        members.setdefault(find_root(parents, place), []).append(place)
    is_frequent = {} if options.by_picture else captions
    frequent = {str(text): len(places) for text, places in is_frequent.items() if len(places) > limit}
    groups = list(members.values())
    cause = _find_cause(max(groups, key=len, default=[]), causes)
    return Groups(groups, {kind: count for kind, count in glued.items() if count}, frequent, cause)


def choose_sides(samples: Sequence[SplitSample], groups: Groups, *, share: float, by: By, seed: int) -> list[bool]:
    """For each sample, whether it is held out.

    With `hash`, a group is held out if a hash of itself and the seed says so, whatever else there is. Otherwise groups
    are taken in the order of that hash until `share` is reached, as nearly as groups allow.
    """
    held = [False] * len(samples)
    hashed = sorted(
        (_hash(seed, min(samples[place].image for place in members)), members) for members in groups.members
    )
    if by == "hash":
        chosen = [members for value, members in hashed if value < share]
    else:
        chosen = _fill([members for _, members in hashed], round(share * len(samples)))
    for members in chosen:
        for place in members:
            held[place] = True
    return held


def _fill(groups: Sequence[list[int]], target: int) -> list[list[int]]:
    chosen, left_out, missing = [], [], target
    for members in groups:
        if len(members) <= missing:
            chosen.append(members)
            missing -= len(members)
        else:
            left_out.append(members)
    smallest = min(left_out, key=len, default=[])
    if smallest and (len(smallest) - missing < missing or not chosen):
        chosen.append(smallest)  # too many by less than are missing
    return chosen


def _hash(seed: int, image: bytes) -> float:
    """From 0 up to 1."""
    digest = hashlib.blake2b(image, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def _classes(keys_of_samples: Iterable[Iterable[str | bytes]]) -> dict[str | bytes, list[int]]:
    """Places of samples by what several of them share."""
    classes: dict[str | bytes, list[int]] = {}
    for place, keys in enumerate(keys_of_samples):
        for key in keys:
            classes.setdefault(key, []).append(place)
    return {key: places for key, places in classes.items() if len(places) > 1}


def _near_pairs(samples: Sequence[SplitSample], distance: int, tolerance: int) -> Iterator[tuple[int, int]]:
    places = [place for place, each in enumerate(samples) if each.look is not None]
    hashes = np.array([samples[place].look for place in places], np.uint64)
    colors = np.array([samples[place].color for place in places], np.uint64)
    for first, second in find_pairs(hashes, colors, distance=distance, tolerance=tolerance).tolist():
        yield places[first], places[second]


def _find_cause(group: Sequence[int], causes: dict[str, dict[str | bytes, list[int]]]) -> Glue | None:
    inside = set(group)
    shared = Counter(
        {
            (kind, key): len(places)
            for kind, classes in causes.items()
            for key, places in classes.items()
            if places[0] in inside
        }
    )
    if not shared:
        return None
    (kind, key), count = shared.most_common(1)[0]
    return Glue(kind, key.rpartition("\0")[2] if isinstance(key, str) else "", count)


def find_root(parents: list[int], place: int) -> int:
    """The least place of the group that a place is in; `parents` begin as `range(n)`."""
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = parents[place]
    return place


def join(parents: list[int], first: int, second: int) -> None:
    """Makes one group of those of two places."""
    first, second = sorted((find_root(parents, first), find_root(parents, second)))
    parents[second] = first
