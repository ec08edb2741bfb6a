"""The built-in bilingual set: emoji drawn in four styles, with human Chinese and English captions.

The package holds one file of drawings per style and one JSON line per concept (see `assets/emoji/ATTRIBUTION.md`).
`write_emoji_shards` unpacks them to ordinary WebDataset tars.

A *concept* is one emoji without skin tone; its *family* are the concepts that share the part before the first joiner; a
*style* is the artist's set that a drawing comes from. Each split has a folder with `000000.tar`, … and `index.json`:

==================  ==========  ==============  ================================================
split               concepts    styles          what for
==================  ==========  ==============  ================================================
`train`             train       all but one     training
`val`               val         all but one     choosing: unseen families
`val_style`         val         the held-out    choosing, see below: unseen families and style
`heldout_style`     train       the held-out    reporting: unseen style
`heldout_families`  heldout     the held-out    reporting: unseen families and style
==================  ==========  ==============  ================================================

With the default arguments only the first two may be used to choose anything. To choose by an unseen style,
leave the reported one out, `styles=("noto", "fluent", "openmoji"), heldout_style="noto"`, and read
`val_style`. Concepts that no training style draws are left out of `heldout_style`.

A sample is `<style>-<key>.webp` and `.json`: key, style, family, group, `captions` (by language: the name,
aliases, keywords) and `caption_roles` (parallel to it). Training samples come in a fixed shuffled order.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.data.emoji.folder import (
    EMOJI_MARKER,
    check_content,
    digest_files,
    partial_folder,
    publish,
    read_digests,
)
from m2_encoder.data.emoji.folder import EMOJI_SPLITS as EMOJI_SPLITS
from m2_encoder.data.emoji.folder import Split as Split
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

EmojiStyle: TypeAlias = Literal["noto", "twemoji", "fluent", "openmoji"]
EMOJI_STYLES = get_args(EmojiStyle)
"""Every drawing style of the package, in the order of `EmojiConcept.styles`."""

IMAGE_SIZE_PX = 64
"""Side of every shipped drawing."""

_LAYOUT_VERSION = 3  # part of the fingerprint: raise it when the written files change for the same assets


class EmojiCaptions(NamedTuple):
    """Captions of a concept in one language."""

    name: str  # the CLDR short name
    aliases: tuple[str, ...]  # other names, from the `emoji` package
    keywords: tuple[str, ...]  # CLDR search keywords, without those that repeat a name

    def texts(self) -> tuple[str, ...]:
        """All captions: the name, then the aliases, then the keywords."""
        return (self.name, *self.aliases, *self.keywords)

    def roles(self) -> tuple[str, ...]:
        """The role of each of `texts()`: "name", "alias" or "keyword"."""
        return ("name", *("alias" for _ in self.aliases), *("keyword" for _ in self.keywords))


class EmojiConcept(NamedTuple):
    """One emoji without skin tone."""

    key: str  # its code points without U+FE0F in lower-case hex, joined by "-"
    family: str  # key of the part before the first joiner; a flag is its own family. Splits never cut families.
    group: str  # Unicode's chapter, such as "Food & Drink"
    split: str  # "train", "val" or "heldout"
    styles: tuple[str, ...]  # the styles that draw it, a subset of `EMOJI_STYLES` in that order
    captions: Mapping[str, EmojiCaptions]  # by language, with the keys of `LANGUAGES`

    @property
    def character(self) -> str:
        """The emoji itself, without U+FE0F."""
        return "".join(chr(int(code, 16)) for code in self.key.split("-"))


class _Sample(NamedTuple):
    concept: EmojiConcept
    style: str

    @property
    def key(self) -> str:
        return f"{self.style}-{self.concept.key}"


def count_training_samples(heldout_style: str) -> int:
    """Training samples of the set without one style; reads no tar."""
    concepts = [concept for concept in load_emoji_concepts() if concept.split == "train"]
    return sum(style != heldout_style for concept in concepts for style in concept.styles)


def load_emoji_concepts() -> list[EmojiConcept]:
    """All concepts, ordered by code points, as `scripts/build_emoji_data.py` made them of CLDR and `emoji`."""
    return [_parse_concept(json.loads(line)) for line in _read_asset("concepts.jsonl").splitlines()]


def load_emoji_images(style: str) -> dict[str, bytes]:
    """WebP files of one style by concept key: `IMAGE_SIZE_PX` squared, RGB on white.

    Raises:
        UserError: if the style is unknown.
    """
    _check_styles([style])
    keys = [concept.key for concept in load_emoji_concepts() if style in concept.styles]
    images = list(_split_riff(_read_asset(f"{style}.webps")))
    assert len(images) == len(keys), f"{style}.webps holds {len(images)} images for {len(keys)} concepts"
    return dict(zip(keys, images, strict=True))


def load_emoji_tokenizer_model() -> bytes:
    """The SentencePiece model that `scripts/train_tokenizer.py` trained on the training captions."""
    return _read_asset("tokenizer.model")


@check_bounds
def write_emoji_shards(
    folder: str | os.PathLike[str],
    *,
    heldout_style: EmojiStyle = "twemoji",
    styles: Sequence[str] = EMOJI_STYLES,
    samples_per_shard: Count = 500,
) -> Path:
    """Unpack the built-in set to `folder`, unless it is there, and return `folder`.

    The bytes depend on the package and the arguments alone, and are compared with their SHA-256 if they are there. The
    folder appears by one rename. One of other arguments or another version is never replaced; a damaged one is, if it
    has the name of `default_emoji_folder`. `heldout_style`, one of `styles`, is kept from `train` and `val`.

    Raises:
        UserError: for an unknown style, too few styles, or a folder that holds anything else, is damaged, or cannot be
            written; the key of these is "folder".
    """
    settings = emoji_settings(heldout_style=heldout_style, styles=styles, samples_per_shard=samples_per_shard)
    target = Path(folder).resolve()
    try:
        check_content(target, settings)
        made = read_digests(target)
        if made is None or made != digest_files(target):
            with partial_folder(target) as partial:
                _write_splits(partial, settings)
                publish(partial, target, is_named=target.name == default_emoji_folder(settings).name)
    except OSError as error:
        rule = f"cannot unpack to it: {error}; give a folder that can be written"
        raise UserError(rule, key="folder", value=str(folder)) from error
    return Path(folder)


def emoji_settings(
    *, heldout_style: EmojiStyle = "twemoji", styles: Sequence[str] = EMOJI_STYLES, samples_per_shard: Count = 500
) -> dict[str, Any]:
    """All that decides the content of an unpacked folder, and the hash of that as `fingerprint`.

    Raises:
        UserError: for an unknown style, or too few styles.
    """
    ordered = [style for style in EMOJI_STYLES if style in _check_styles(styles)]
    if heldout_style not in ordered or len(ordered) < 2:
        raise UserError(
            f"heldout_style={heldout_style!r} must be one of styles={tuple(ordered)}, with another left to train on"
        )
    return {
        "fingerprint": _fingerprint(ordered, heldout_style, samples_per_shard),
        "heldout_style": heldout_style,
        "styles": ordered,
        "samples_per_shard": samples_per_shard,
    }


def default_emoji_folder(settings: Mapping[str, Any]) -> Path:
    """Where the set of `emoji_settings` belongs: `outputs/data/emoji-<held-out style>-<8 digits of a hash>`.

    The hash is over all that decides the content, so that other settings, or other drawings, have another name.
    """
    return Path(f"outputs/data/emoji-{settings['heldout_style']}-{settings['fingerprint'][:8]}")


def _write_splits(target: Path, settings: Mapping[str, Any]) -> None:
    styles, heldout_style = settings["styles"], settings["heldout_style"]
    images = {style: load_emoji_images(style) for style in styles}
    splits = {}
    for split, samples in _select_samples(styles, heldout_style).items():
        (target / split).mkdir()
        shards = _write_tars(target / split, samples, images, settings["samples_per_shard"])
        splits[split] = {
            "split": split,
            "samples": len(samples),
            "concepts": len({sample.concept.key for sample in samples}),
            "families": len({sample.concept.family for sample in samples}),
            "styles": sorted({sample.style for sample in samples}, key=EMOJI_STYLES.index),
            "languages": list(LANGUAGES),
            "shards": shards,
            "fingerprint": settings["fingerprint"],
        }
        _write_json(target / split / "index.json", splits[split])
    _write_json(target / EMOJI_MARKER, {**settings, "splits": splits, "sha256": digest_files(target)})


def _select_samples(styles: Sequence[str], heldout_style: str) -> dict[str, list[_Sample]]:
    concepts = load_emoji_concepts()
    training_styles = [style for style in styles if style != heldout_style]

    def pick(split: str, from_styles: Iterable[str]) -> list[_Sample]:
        chosen = set(from_styles)
        return [_Sample(c, style) for c in concepts if c.split == split for style in c.styles if style in chosen]

    train = pick("train", training_styles)
    seen = {sample.concept.key for sample in train}
    return {
        "train": sorted(train, key=lambda sample: hashlib.sha256(sample.key.encode()).digest()),
        "val": pick("val", training_styles),
        "val_style": pick("val", [heldout_style]),
        "heldout_style": [s for s in pick("train", [heldout_style]) if s.concept.key in seen],
        "heldout_families": pick("heldout", [heldout_style]),
    }


def _write_tars(
    target: Path,
    samples: Sequence[_Sample],
    images: Mapping[str, Mapping[str, bytes]],
    samples_per_shard: int,
) -> list[dict[str, Any]]:
    import webdataset  # slow to import, and only who unpacks needs it

    shards: list[dict[str, Any]] = []
    for start in range(0, len(samples), samples_per_shard):
        part = samples[start : start + samples_per_shard]
        path = target / f"{len(shards):06d}.tar"
        # A fixed time makes the bytes a function of the samples alone; the last block lets readers see a cut.
        with webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="", mode=0o644) as writer:
            for sample in part:
                writer.write(
                    {
                        "__key__": sample.key,
                        "webp": images[sample.style][sample.concept.key],
                        "json": _dump_json(_describe(sample)).encode(),
                    }
                )
        shards.append({"name": path.name, "samples": len(part), "bytes": path.stat().st_size})
    return shards


def _describe(sample: _Sample) -> dict[str, Any]:
    concept = sample.concept
    return {
        "key": concept.key,
        "style": sample.style,
        "family": concept.family,
        "group": concept.group,
        "captions": {language: concept.captions[language].texts() for language in LANGUAGES},
        "caption_roles": {language: concept.captions[language].roles() for language in LANGUAGES},
    }


def _fingerprint(styles: Sequence[str], heldout_style: str, samples_per_shard: int) -> str:
    digest = hashlib.sha256()
    for name in ("concepts.jsonl", *(f"{style}.webps" for style in styles)):
        digest.update(_digest_asset(name))
    arguments = [_LAYOUT_VERSION, list(styles), heldout_style, samples_per_shard]
    digest.update(_dump_json(arguments).encode())
    return digest.hexdigest()


@cache
def _digest_asset(name: str) -> bytes:
    return hashlib.sha256(_read_asset(name)).digest()


def _check_styles(styles: Sequence[str]) -> Sequence[str]:
    if isinstance(styles, str):
        raise UserError(f"styles={styles!r} must be a list of styles, such as {list(EMOJI_STYLES)}")
    unknown = [style for style in styles if style not in EMOJI_STYLES]
    if unknown:
        raise UserError(f"unknown emoji style {unknown[0]!r}; choose from {', '.join(EMOJI_STYLES)}")
    return styles


def _parse_concept(record: Mapping[str, Any]) -> EmojiConcept:
    captions = {
        language: EmojiCaptions(
            record[language]["name"], tuple(record[language]["aliases"]), tuple(record[language]["keywords"])
        )
        for language in LANGUAGES
    }
    return EmojiConcept(
        record["key"], record["family"], record["group"], record["split"], tuple(record["styles"]), captions
    )


def _split_riff(blob: bytes) -> Iterator[bytes]:
    """Split concatenated RIFF files, such as WebP; each has its length in its second word."""
    start = 0
    while start < len(blob):
        tag, length = struct.unpack_from("<4sI", blob, start)
        assert tag == b"RIFF", f"no RIFF file at byte {start}"
        end = start + 8 + length + length % 2
        yield blob[start:end]
        start = end


def _read_asset(name: str) -> bytes:
    return files("m2_encoder").joinpath("assets", "emoji", name).read_bytes()


def _dump_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
