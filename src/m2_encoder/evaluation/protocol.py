"""What was measured against what: the protocol of retrieval, for records and for readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from m2_encoder.data.retrieval_contents import SetReading
from m2_encoder.data.retrieval_set import RetrievalSet, count_equal_captions
from m2_encoder.data.samples.language import describe_languages

NAME: Final = "standard"

_RULES: Final[Mapping[str, str]] = {
    "queries": "every caption is a query once; equal captions of one content count once, of different contents apart",
    "positives": "all pictures of the caption's content; of a picture, all captions of its content",
    "content": "equal identity; equal JSON key, unless it repeats the name of the files; equal files, unless different "
    "identities keep them apart",
    "left_out": "captions of the roles alias and keyword are no queries",
}


def describe_protocol(sets: Mapping[str, RetrievalSet]) -> dict[str, Any]:
    """The entry `protocol` of a record: its name, its rules, and what they did to each set."""
    return {"name": NAME, "rules": dict(_RULES), "sets": {name: describe_set(found) for name, found in sets.items()}}


def describe_set(dataset: RetrievalSet) -> dict[str, Any]:
    """Counts of a set.

    `samples` that were read; `images` in the gallery and their `contents`; `captions`, the queries by language;
    `repeated_images`, samples whose picture was there before; `kept_apart`, equal files under different identities;
    `repeated_captions`, that the same content has already; `equal_captions`, queries with the words of another content;
    `images_without_caption` in a language, which are in the gallery only; `left_out`, captions by role;
    `other_languages`, captions that are neither Chinese nor English, by language.
    """
    reading = dataset.reading or SetReading(len(dataset.keys))
    queries = {language: dataset.queries(language) for language in dataset.languages}
    rows = range(len(dataset.keys))
    counts = {name: [len(dataset.captions_of(row, name)) for row in rows] for name in queries}
    return {
        "samples": reading.samples,
        "images": len(dataset.keys),
        "contents": len(set(dataset.keys)),
        "captions": {name: len(found) for name, found in queries.items()},
        "repeated_images": reading.repeated_images,
        "kept_apart": reading.kept_apart,
        "repeated_captions": {name: sum(counts[name]) - len(found) for name, found in queries.items()},
        "equal_captions": {name: count_equal_captions(found) for name, found in queries.items()},
        "images_without_caption": {name: numbers.count(0) for name, numbers in counts.items()},
        "left_out": dict(reading.left_out),
        "other_languages": dict(reading.other_languages),
    }


def protocol_lines(sets: Mapping[str, RetrievalSet]) -> Iterator[str]:
    """A line for each set of the user's in which something is not one picture with one caption a sample."""
    for name, dataset in sets.items():
        if dataset.split:
            continue  # the built-in set is described in `data.emoji.dataset`
        found = describe_set(dataset)
        parts = []
        if found["repeated_images"] or found["kept_apart"]:
            parts.append(f"{found['samples']:,} samples show {found['images']:,} different pictures")
        if found["kept_apart"]:
            parts.append(f"{found['kept_apart']:,} equal files stay apart by their identities")
        for language, number in found["captions"].items():
            said = f"{number:,} {language} captions"
            notes = {
                "repeated": found["repeated_captions"][language],
                "with the words of another picture's": found["equal_captions"][language],
            }
            extra = [f"{count:,} {what}" for what, count in notes.items() if count]
            if without := found["images_without_caption"][language]:
                extra.append(f"pictures without one: {without:,}")
            if number != found["images"] or extra:
                parts.append(f"{said} ({', '.join(extra)})" if extra else said)
        if left_out := [f"{count:,} {role}" for role, count in found["left_out"].items()]:
            parts.append(f"no queries: {', '.join(left_out)}")
        if found["other_languages"]:
            parts.append(f"left out: {describe_languages(found['other_languages'])}")
        if parts:
            yield f"{name}: {'; '.join(parts)}"
