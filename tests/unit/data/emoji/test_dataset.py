from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageFont

from m2_encoder.data.emoji import dataset as emoji
from m2_encoder.data.emoji.dataset import (
    EMOJI_SPLITS,
    EMOJI_STYLES,
    load_emoji_concepts,
    load_emoji_images,
    load_emoji_tokenizer_model,
    write_emoji_shards,
)
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

ASSETS = Path(emoji.__file__).parents[2] / "assets"
HAN = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emoji_shards(tmp_path_factory.mktemp("emoji") / "shards")


def _members(split: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for path in sorted(split.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                yield member, content.read()


def _records(split: Path) -> list[dict[str, Any]]:
    return [json.loads(content) for member, content in _members(split) if member.name.endswith(".json")]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what the package carries -------------------------------------------------------------------------------


def test_assets_are_small_and_attributed() -> None:
    sizes = {path: path.stat().st_size for path in (ASSETS / "emoji").rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 8_000_000
    attribution = (ASSETS / "emoji" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    licences = [path.name for path in (ASSETS / "emoji" / "licenses").iterdir()]
    assert len(licences) == 6
    for name in [*licences, *(f"{style}.webps" for style in EMOJI_STYLES)]:
        assert name in attribution


def test_there_are_1914_concepts_in_the_announced_splits() -> None:
    concepts = load_emoji_concepts()
    assert len({concept.key for concept in concepts}) == len(concepts) == 1914
    counts = {split: sum(concept.split == split for concept in concepts) for split in ("train", "val", "heldout")}
    assert counts == {"train": 1494, "val": 267, "heldout": 153}
    assert sum(concept.styles == EMOJI_STYLES for concept in concepts) == 1594
    assert all({"twemoji", "openmoji"} <= set(concept.styles) <= set(EMOJI_STYLES) for concept in concepts)


def test_concepts_are_emoji_without_skin_tone_or_variation_selector() -> None:
    for concept in load_emoji_concepts():
        assert "-".join(f"{ord(c):x}" for c in concept.character) == concept.key
        assert "\ufe0f" not in concept.character
        assert not re.search("[\U0001f3fb-\U0001f3ff]", concept.character)
        assert concept.group


def test_families_never_straddle_splits() -> None:
    splits = defaultdict(set)
    for concept in load_emoji_concepts():
        # Independent of the script: cut the characters themselves at the first zero-width joiner.
        splits[concept.character.split("\u200d")[0]].add(concept.split)
        assert concept.family == "-".join(f"{ord(c):x}" for c in concept.character.split("\u200d")[0])
    assert all(len(of_family) == 1 for of_family in splits.values())
    assert {"man": splits["👨"], "woman": splits["👩"], "person": splits["🧑"]} == {
        "man": {"train"},
        "woman": {"train"},
        "person": {"train"},
    }


def test_captions_are_clean_and_in_the_script_of_their_language() -> None:
    for concept in load_emoji_concepts():
        english, chinese = concept.captions["en"], concept.captions["zh"]
        for captions in (english, chinese):
            texts = captions.texts()
            assert len(set(texts)) == len(texts) == len(captions.roles())
            for text in texts:
                assert text
                assert text == " ".join(text.split())
                assert "_" not in text
                assert not any(unicodedata.category(c) in ("So", "Cf", "Cc", "Co", "Cn") for c in text), text
        # CLDR's Chinese names of three concepts are what Chinese writes, too.
        assert HAN.search(chinese.name) or chinese.name in ("OK", "DVD", "DNA")
        assert all(HAN.search(text) for text in chinese.texts()[1:]), chinese
        assert not any(HAN.search(text) for text in english.texts()), english
        assert re.search("[A-Za-z]", english.name)


def test_known_concepts_have_their_known_names_and_pictures() -> None:
    by_key = {concept.key: concept for concept in load_emoji_concepts()}
    assert by_key["1f43c"].captions["zh"].name == "熊猫"
    assert by_key["1f43c"].captions["en"].texts()[:2] == ("panda", "panda face")
    assert by_key["1f1e8-1f1f3"].captions["en"].name == "flag: China"
    # A red heart, a green one and a blue one: names and drawings of every style agree on the colour.
    for key, channel, word in (("2764", 0, "红"), ("1f49a", 1, "绿"), ("1f499", 2, "蓝")):
        assert word in by_key[key].captions["zh"].name
        for style in EMOJI_STYLES:
            image = np.asarray(Image.open(io.BytesIO(load_emoji_images(style)[key])).convert("RGB"))
            assert image[32, 32].argmax() == channel, (style, key)


@pytest.mark.parametrize("style", EMOJI_STYLES)
def test_every_image_decodes_to_a_drawing_on_white(style: str) -> None:
    images = load_emoji_images(style)
    assert set(images) == {concept.key for concept in load_emoji_concepts() if style in concept.styles}
    white_corners = 0
    for key, content in images.items():
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64)), key
            pixels = np.asarray(image)
        assert pixels.std() > 2, f"{style} {key} is blank"
        white_corners += bool(pixels[0, 0].min() > 240)
    assert white_corners > 0.8 * len(images)  # buttons fill their square


def test_unknown_style_is_named() -> None:
    with pytest.raises(UserError, match=r"'emojione'.*noto"):
        load_emoji_images("emojione")


# --- what is unpacked ---------------------------------------------------------------------------------------


def test_splits_hold_what_they_announce(unpacked: Path) -> None:
    training = {"noto", "fluent", "openmoji"}
    expected = {
        "train": ("train", training, 4034),
        "val": ("val", training, 721),
        "val_style": ("val", {"twemoji"}, 267),
        "heldout_style": ("train", {"twemoji"}, 1494),
        "heldout_families": ("heldout", {"twemoji"}, 153),
    }
    splits = {concept.key: concept.split for concept in load_emoji_concepts()}
    assert sorted(path.name for path in unpacked.iterdir()) == sorted([*EMOJI_SPLITS, "emoji.json"])
    for name, (split, styles, samples) in expected.items():
        records = _records(unpacked / name)
        index = json.loads((unpacked / name / "index.json").read_bytes())
        assert len(records) == index["samples"] == sum(shard["samples"] for shard in index["shards"]) == samples
        assert {record["style"] for record in records} == set(index["styles"]) == styles
        assert {splits[record["key"]] for record in records} == {split}
        assert index["concepts"] == len({record["key"] for record in records})
        assert index["families"] == len({record["family"] for record in records})


def test_samples_carry_the_image_and_captions_of_the_package(unpacked: Path) -> None:
    by_key = {concept.key: concept for concept in load_emoji_concepts()}
    images = {style: load_emoji_images(style) for style in EMOJI_STYLES}
    for split in EMOJI_SPLITS:
        members = list(_members(unpacked / split))
        for (description, text), (image, webp) in zip(members[::2], members[1::2], strict=True):
            record = json.loads(text)
            concept = by_key[record["key"]]
            stem = f"{record['style']}-{record['key']}"
            assert (image.name, description.name) == (f"{stem}.webp", f"{stem}.json")
            assert webp == images[record["style"]][record["key"]]
            for language, captions in concept.captions.items():
                assert tuple(record["captions"][language]) == captions.texts()
                assert tuple(record["caption_roles"][language]) == captions.roles()
                assert record["caption_roles"][language][0] == "name"


# webdataset leaves each shard to the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(unpacked: Path) -> None:
    urls = sorted(str(path) for path in (unpacked / "train").glob("*.tar"))
    assert len(urls) == 9
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(dataset)
    del dataset
    gc.collect()
    assert len(samples) == 4034
    assert samples[0]["webp"].shape == (64, 64, 3)
    assert samples[0]["__key__"] == f"{samples[0]['json']['style']}-{samples[0]['json']['key']}"


def test_training_order_mixes_styles_and_groups(unpacked: Path) -> None:
    records = _records(unpacked / "train")
    for attribute, most in (("style", 0.5), ("group", 0.3)):
        values = [record[attribute] for record in records]
        assert np.mean([a == b for a, b in pairwise(values)]) < most


def test_another_folder_gets_the_same_bytes(unpacked: Path, tmp_path: Path) -> None:
    again = write_emoji_shards(tmp_path / "elsewhere" / "deeper")
    assert _digests(again) == _digests(unpacked)
    member, _ = next(_members(again / "train"))
    assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_other_arguments_are_other_data(unpacked: Path, tmp_path: Path) -> None:
    styles = ("fluent", "noto", "twemoji")
    folder = write_emoji_shards(tmp_path / "shards", styles=styles, heldout_style="noto", samples_per_shard=1000)
    marker = json.loads((folder / "emoji.json").read_bytes())
    assert marker["styles"] == ["noto", "twemoji", "fluent"]
    assert {record["style"] for record in _records(folder / "train")} == {"twemoji", "fluent"}
    assert {record["style"] for record in _records(folder / "val_style")} == {"noto"}
    assert marker["splits"]["train"]["shards"][0]["samples"] == 1000
    # A concept without any training drawing is no test of an unseen style.
    seen = {record["key"] for record in _records(folder / "train")}
    assert {record["key"] for record in _records(folder / "heldout_style")} <= seen
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heldout_style": "emojione"}, "heldout_style=emojione: must be one of"),
        ({"styles": ("noto", "apple")}, "unknown emoji style 'apple'"),
        ({"styles": "noto"}, "must be a list of styles"),
        ({"styles": ("openmoji",)}, "another left to train on"),
        ({"styles": ("noto", "openmoji")}, "heldout_style='twemoji' must be one of"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_emoji_shards(tmp_path / "shards", **arguments)
    assert list(tmp_path.iterdir()) == []


# --- the tokenizer and the font beside it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(load_emoji_tokenizer_model())


def test_tokenizer_splits_held_out_captions_into_trained_pieces(tokenizer: SentencePieceTokenizer) -> None:
    texts: dict[str, list[str]] = {"train": [], "val": [], "heldout": []}
    for concept in load_emoji_concepts():
        texts[concept.split] += [text for spoken in concept.captions.values() for text in spoken.texts()]
    seen = set(np.unique(tokenizer(texts["train"]).ids.numpy()).tolist())
    for split in ("val", "heldout"):
        tokens = tokenizer(texts[split])
        ids = tokens.ids[tokens.mask].tolist()
        assert 0 not in ids  # nothing is unknown: bytes stand for what has no piece
        assert sum(index not in seen for index in ids) < 0.01 * len(ids)
        assert tokens.ids.shape[1] < tokenizer.context_length


def test_tokenizer_folds_case_and_keeps_what_it_never_saw(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer(["A Panda"]).ids.tolist() == tokenizer(["a panda"]).ids.tolist()
    for text in ("龘靐齉", "zyzzyva", "naïve café 42 %", "🦄", "สวัสดี", "一只 panda 和 two 猫"):
        assert tokenizer.decode(tokenizer([text]).ids[0].tolist()) == text
    assert len({tokenizer.cls_id, tokenizer.end_id, tokenizer.mask_id}) == 3


def test_font_draws_every_caption_character() -> None:
    font = ImageFont.truetype(ASSETS / "fonts" / "NotoSansSC-subset.ttf", 24)
    unknown = bytes(font.getmask("\U000f0000"))
    characters = {
        character
        for concept in load_emoji_concepts()
        for spoken in concept.captions.values()
        for character in "".join(spoken.texts())
    }
    assert len(characters) > 2000
    boxes = [character for character in sorted(characters) if bytes(font.getmask(character)) == unknown]
    assert not boxes
    assert (ASSETS / "fonts" / "OFL.txt").is_file()
    assert (ASSETS / "fonts" / "NotoSansSC-subset.ttf").stat().st_size <= 1_500_000
