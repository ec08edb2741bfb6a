"""Which members of a tar belong to one sample.

A sample's name ends at the first dot of the file name, as in any WebDataset tar: `0001.jpg`, `0001.seg.png` and
`0001.json` are one sample. Names with dots of their own (`photo.1.jpg` beside `photo.1.txt`) would all be one sample
`photo`; where a picture and a caption share more than that, they are a sample named up to the last dot. A
caption without a picture belongs to the picture without a caption whose name differs in case alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from m2_encoder.data.shards.names import is_clutter, match_cases
from m2_encoder.data.shards.tar_scan import TarMember

TEXT_EXTENSIONS = ("json", "txt")
"""Extensions of the members that hold captions."""

_TEXTS = frozenset(TEXT_EXTENSIONS)


def group_members(
    members: Iterable[TarMember], *, pictures: Collection[str]
) -> tuple[dict[str, dict[str, TarMember]], dict[str, int]]:
    """Members by key and extension (lower case); of several with one name, the first.

    Files that systems leave behind, such as `._name`, are left out.

    Args:
        members: of one tar, in order.
        pictures: extensions of pictures.

    Returns:
        The members, and for each key with several members of a name, how many samples that costs.
    """
    found: dict[str, dict[str, TarMember]] = {}
    again: dict[str, dict[str, int]] = {}
    for member in members:
        if is_clutter(member.name):
            continue
        parent, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key, extension = f"{parent}{slash}{stem}", extension.lower()
        own = found.setdefault(key, {})
        if extension in own:
            counts = again.setdefault(key, {})
            counts[extension] = counts.get(extension, 0) + 1
        else:
            own[extension] = member
    grouped: dict[str, dict[str, TarMember]] = {}
    for key, own in found.items():
        dotted = _dotted_stems(own, pictures) if any("." in extension for extension in own) else ()
        grouped |= _divide(key, own, dotted) if dotted else {key: own}
    _join_cases(grouped, frozenset(pictures))
    return grouped, {key: max(counts.values()) for key, counts in again.items()}


def has_dotted_name(key: str) -> bool:
    """Whether a sample is named up to the last dot: other readers of WebDataset tars take the name up to the first."""
    return "." in key.rpartition("/")[2]


def _join_cases(grouped: dict[str, dict[str, TarMember]], pictures: frozenset[str]) -> None:
    """Give lonely texts to the picture whose name differs in case alone: `a.txt` to `A.jpg`."""
    lonely = [key for key, own in grouped.items() if pictures.isdisjoint(own) and not _TEXTS.isdisjoint(own)]
    if lonely:
        bare = [key for key, own in grouped.items() if _TEXTS.isdisjoint(own) and not pictures.isdisjoint(own)]
        for text, picture in match_cases(lonely, bare).items():
            grouped[picture] = grouped.pop(text) | grouped[picture]


def _dotted_stems(own: Mapping[str, TarMember], pictures: Collection[str]) -> list[str]:
    """What follows the first dot in names of pairs that are samples of their own, without the last extension."""
    stems: dict[str, set[str]] = {}
    for extension in own:
        stem, dot, last = extension.rpartition(".")
        if dot and (last in pictures or last in TEXT_EXTENSIONS):
            stems.setdefault(stem, set()).add(last)
    pairs = [stem for stem, kinds in stems.items() if kinds & set(pictures) and kinds & set(TEXT_EXTENSIONS)]
    if not pairs:
        return []
    has_picture, has_text = (any(name in own for name in kinds) for kinds in (pictures, TEXT_EXTENSIONS))
    if has_picture and has_text:  # `0001.jpg`, `0001.json` with `0001.seg.png`, `0001.seg.json`: further files
        return [stem for stem in pairs if "txt" in stems[stem] or stems[stem] <= own.keys()]
    if has_picture or has_text:
        return pairs
    # What lacks a partner is a sample, too, and counted as an unusable one.
    return [*pairs, *(stem for stem in stems if not any(f"{stem}.".startswith(f"{pair}.") for pair in pairs))]


def _divide(key: str, own: Mapping[str, TarMember], stems: Collection[str]) -> dict[str, dict[str, TarMember]]:
    divided: dict[str, dict[str, TarMember]] = {}
    wanted = set(stems)
    for extension, member in own.items():
        parts = extension.split(".")
        count = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in wanted), 0)
        # The name as it is written: extensions are in lower case.
        stem = member.name.rpartition("/")[2].split(".")[1 : count + 1]
        name, rest = ".".join([key, *stem]), ".".join(parts[count:])
        divided.setdefault(name, {}).setdefault(rest, member)
    return divided
