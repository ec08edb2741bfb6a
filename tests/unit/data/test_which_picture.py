"""Which of several pictures of one name is a sample's, in tars and in folders, and what is said of the others."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.inspect.inspection import InspectionOptions
from m2_encoder.data.inspect.source_report import check_source
from m2_encoder.data.inspect.survey import survey_source
from m2_encoder.data.packing.listed import slice_folder
from m2_encoder.data.packing.records import Failure
from m2_encoder.data.retrieval_set import read_retrieval_set
from m2_encoder.data.shards.index import build_index
from m2_encoder.pictures import OFFICIAL, STANDARD, PicturePolicy
from tests.support.shards import write_tar

WHITE_ICON = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
WHITE_ICON.paste((255, 255, 255, 255), (2, 2, 6, 6))


def flat(level: int, kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(content, kind)
    return content.getvalue()


def photo_and_mask(key: str) -> list[tuple[str, bytes]]:
    captions = {"captions": {"zh": [f"照片 {key}"], "en": [f"photo {key}"]}}
    return [
        (f"{key}.json", json.dumps(captions).encode()),
        (f"{key}.png", flat(0, "PNG")),  # the mask
        (f"{key}.jpg", flat(200, "JPEG")),
    ]


def test_the_photo_beside_a_mask_is_the_picture_of_a_sample(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", [member for key in "abc" for member in photo_and_mask(key)])
    index = build_index(tar)
    assert [index[number].extension for number in range(3)] == ["jpg"] * 3
    found = read_retrieval_set(tmp_path, name="toy", transform=EvalTransform(8))
    assert found.images.min() > 190
    report = check_source(survey_source([tar], InspectionOptions()), batch_size=2)
    assert "3 samples have a .png beside the .jpg: the .jpg is used" in report.warnings


def test_a_folder_takes_the_same_picture_and_names_the_other(tmp_path: Path) -> None:
    for name, content in photo_and_mask("a"):
        (tmp_path / name).write_bytes(content)
    (records,) = (list(part.read()) for part in slice_folder(tmp_path, 10))
    assert records[0].image == str(tmp_path / "a.jpg")  # type: ignore[union-attr]
    assert isinstance(records[1], Failure)
    assert (records[1].reason, "another picture is called a, too, and used" in records[1].detail) == (
        "duplicate_key",
        True,
    )


def test_other_suffixes_are_samples_too(tmp_path: Path) -> None:
    members = [(f"a.{name}", flat(9, "JPEG")) for name in ("JFIF",)] + [("a.txt", b"grey"), ("b.GIF", flat(9, "GIF"))]
    index = build_index(write_tar(tmp_path / "0.tar", [*members, ("b.txt", b"grey")]))
    assert [index[number].extension for number in range(len(index))] == ["jfif", "gif"]


def warnings_of(tmp_path: Path, policy: PicturePolicy) -> list[str]:
    content = io.BytesIO()
    WHITE_ICON.save(content, "PNG")
    members = [
        (f"{key}{suffix}", file) for key in "ab" for suffix, file in ((".png", content.getvalue()), (".txt", b"a"))
    ]
    tar = write_tar(tmp_path / "icons.tar", members)
    report = check_source(survey_source([tar], InspectionOptions(pictures=policy)), batch_size=2)
    return [warning for warning in report.warnings if "decoded pictures" in warning]


def test_pictures_that_become_one_flat_colour_are_counted_with_what_mends_it(tmp_path: Path) -> None:
    (line,) = warnings_of(tmp_path, STANDARD)
    assert line.startswith(
        "2 of 2 decoded pictures become one flat colour, which shows nothing (icons.tar:a, icons.tar:b)"
    )
    assert line.endswith("model.pictures={background: grey} shows them")
    assert warnings_of(tmp_path, PicturePolicy(background="grey")) == []
    flat_line, lost = warnings_of(tmp_path, OFFICIAL)
    assert flat_line.endswith("model.pictures=standard blends alpha and scales 16 bits")
    assert "2 alpha dropped" in lost
