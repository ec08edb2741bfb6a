"""Stamps of Tux Paint: a small folder of the same layout, and the package itself where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.tuxpaint import DEBIAN_FOLDER, read_tuxpaint
from tests.support.shards import make_image

CAT = "A cat.\nzh_CN.utf8=一只猫。\nzh_TW.utf8=一隻貓。\nsr@latin.utf8=Mačka.\n"


def write(root: Path) -> Path:
    for place, captions, suffixes in (
        ("animals/cat", CAT, [".png", ".svg", ".dat", "_desc_fr.ogg"]),
        ("animals/cartoon/kitten", CAT, [".png"]),
        ("symbols/math/1", "One.\nzh_CN.utf8=一。\nzh_TW.utf8=\n", [".png"]),
        ("animals/cat_mirror", None, [".png"]),
        ("animals/vector", "A dog.\n", [".svg"]),
        ("animals/lonely", "A fox.\n", []),
    ):
        for suffix in suffixes:
            file = root / f"{place}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(make_image(len(place)) if suffix == ".png" else b"<svg/>")
        if captions is not None:
            (root / f"{place}.txt").write_text(captions, encoding="utf-8")
    return root


def test_equal_captions_have_several_stamps(tmp_path: Path) -> None:
    found = read_tuxpaint(write(tmp_path))
    assert [picture.name for picture in found.pictures] == [
        "animals/cat.png",
        "animals/cartoon/kitten.png",
        "symbols/math/1.png",
    ]
    assert set(found.texts) == {"en", "zh_CN", "zh_TW", "sr@latin"}
    assert found.texts["zh_CN"].rows == ("一只猫。", "一。")
    assert found.texts["zh_CN"].pairs.tolist() == [[0, 0], [0, 1], [1, 2]]
    assert found.texts["zh_TW"].pairs.tolist() == [[0, 0], [0, 1]], "an empty translation is none"
    assert found.parallel["zh_CN", "en"].tolist() == [[0, 0], [1, 1]]
    assert {name: rows.tolist() for name, rows in found.subsets.items()} == {"symbols": [2], "pictures": [0, 1]}
    assert found.counts["left_out"] == {
        "a picture without a caption": 1,
        "only an .svg": 1,
        "a caption without a picture": 1,
    }


def test_faults_have_one_line_each(tmp_path: Path) -> None:
    root = write(tmp_path)
    with pytest.raises(UserError, match="has no captions in zh; it has en, sr@latin, zh_CN, zh_TW"):
        read_tuxpaint(root, languages=["zh"])
    (root / "animals" / "cat.txt").write_bytes(b"A cat.\nzh_CN.utf8=" + "一只猫在睡觉".encode("gb18030"))
    with pytest.raises(UserError, match=r"cat\.txt: the file is not UTF-8"):
        read_tuxpaint(root)
    (root / "animals" / "cat.txt").write_text("A cat.\nno translation\n")
    with pytest.raises(UserError, match="'no translation' is no translation; wanted <language>"):
        read_tuxpaint(root)


def test_a_package_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2_encoder.evaluation.sets.tuxpaint.DEBIAN_FOLDER", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="install it with: apt-get install tuxpaint-stamps-default"):
        read_tuxpaint(tmp_path / "nowhere")


@pytest.mark.skipif(not Path(DEBIAN_FOLDER).is_dir(), reason="tuxpaint-stamps-default is not installed")
def test_the_stamps_of_debian() -> None:
    found = read_tuxpaint()
    assert len(found.pictures) > 700
    assert len(found.texts) > 50
    assert {"zh_CN", "zh_TW", "en"} <= set(found.texts)
    for language in ("zh_CN", "zh_TW", "en"):
        texts = found.texts[language]
        assert len(set(texts.rows)) == len(texts.rows) < len(texts.pairs)
    assert min(map(len, found.subsets.values())) > 200
    assert all(picture.read()[:4] == b"\x89PNG" for picture in found.pictures[:5])
