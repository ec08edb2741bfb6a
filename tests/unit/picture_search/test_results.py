"""What a query finds, without itself, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import PictureIndex, open_index
from m2_encoder.picture_search.model import SearchModel
from m2_encoder.picture_search.results import Result, Results, find_results, find_row, json_of, read_picture, table_of
from m2_encoder.picture_search.update import update_index


@pytest.fixture
def index(tmp_path: Path, photos: Path, model: SearchModel) -> PictureIndex:
    update_index(tmp_path / "i", photos, model, dtype="float32", num_workers=0)
    return open_index(tmp_path / "i")


def test_results_leave_out_the_query_itself(index: PictureIndex) -> None:
    feature = np.asarray(index.features[2])
    assert find_results(index, feature, 3, query="q").rows[0].name == index.names[2]
    found = find_results(index, feature, 3, query="q", without=[2])
    expected = index.features @ feature
    order = [row for row in np.argsort(-expected) if row != 2][:3]
    assert [row.name for row in found.rows] == [index.names[row] for row in order]
    assert [row.rank for row in found.rows] == [1, 2, 3]
    assert [row.is_likely for row in found.rows] == [number < found.end for number in range(3)]
    assert len(find_results(index, feature, 100, query="q", without=[2]).rows) == 4


def test_picture_by_file_or_by_its_name_in_the_index(index: PictureIndex, photos: Path) -> None:
    assert np.array_equal(read_picture(index, str(photos / "b.png")), index.features[index.rows["b.png"]])
    assert find_row(index, str(photos / "c" / ".." / "b.png")) == index.rows["b.png"]
    other = photos.with_name("b.png")
    other.write_bytes((photos / "a.jpg").read_bytes())
    assert read_picture(index, str(other)) == other.read_bytes()
    (photos / "b.png").write_bytes(other.read_bytes())
    assert read_picture(index, str(photos / "b.png")) == other.read_bytes(), "not what the index had seen"
    named = read_picture(index, "c/猫.png")
    assert isinstance(named, np.ndarray)
    assert np.array_equal(named, index.features[index.names.index("c/猫.png")])
    for name, message in (("none.png", "no such file, and no picture of the index"), (str(photos), "is a folder")):
        with pytest.raises(UserError, match=message) as caught:
            read_picture(index, name)
        assert caught.value.key == "query"


def test_written_forms(index: PictureIndex) -> None:
    results = Results("红", [Result(1, "c/猫.png", 0.5, True), Result(2, "a\n.jpg", -0.25, False)], 1)
    assert table_of(results).splitlines() == [
        "rank  cosine  picture",
        "   1   0.500  c/猫.png",
        "----  ------  probably the end",
        "   2  -0.250  a\\n.jpg",
    ]
    content = json.loads(json_of(results, index))
    assert (content["query"], content["end"]) == ("红", 1)
    assert content["results"][0] == {
        "rank": 1, "name": "c/猫.png", "score": 0.5, "is_likely": True, "path": str(index.root / "c/猫.png"),
    }  # fmt: skip
