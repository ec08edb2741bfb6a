"""Chinese-CLIP's folders of ELEVATER."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.elevater_cn import read_elevater_cn
from tests.support.shards import make_image


def write(root: Path, folders: list[str], zh: list[str], en: list[str]) -> Path:
    for number, folder in enumerate(folders):
        (root / "test" / folder).mkdir(parents=True)
        (root / "test" / folder / f"{number}.png").write_bytes(make_image(number))
    (root / "label_cn.txt").write_text("\n".join(zh), encoding="utf-8")
    if en:
        (root / "label.txt").write_text("\n".join(en) + "\n", encoding="utf-8")
    return root


def test_a_folder_is_the_number_of_its_class_whatever_it_sorts_to(tmp_path: Path) -> None:
    zh = [f"类{number}" for number in range(11)]
    found = read_elevater_cn(write(tmp_path / "pets", [str(number) for number in range(11)], zh, []))
    assert found.classes is not None
    assert [found.pictures[row].name for row in (1, 2, 10)] == ["1/1.png", "2/2.png", "10/10.png"]
    assert found.classes.targets.tolist() == list(range(11))
    assert found.classes.names == {"zh": tuple(zh)}
    assert found.classes.label_set == "pets/label_cn.txt"


def test_both_languages(tmp_path: Path) -> None:
    found = read_elevater_cn(write(tmp_path / "pets", ["000", "001"], ["猫", "狗"], ["cat", "dog"]))
    assert found.classes is not None
    assert found.classes.names == {"zh": ("猫", "狗"), "en": ("cat", "dog")}
    assert found.pictures[1].read() == make_image(1)


@pytest.mark.parametrize(
    ("folders", "zh", "en", "message"),
    [
        (["000", "001", "002"], ["猫", "狗"], [], "holds 3 folders, 0 to 2, but the list has 2 names"),
        (["000", "002"], ["猫", "狗"], [], "holds 2 folders, 0 to 2"),
        (["000", "001"], ["猫", "狗"], ["cat"], r"label_cn\.txt has 2 names, label\.txt 1"),
        (["000", "001"], ["猫", "", "狗"], [], r"label_cn\.txt: line 2 is blank"),
        (["000", "cat"], ["猫", "狗"], [], "its folder cat is no number of a class"),
        (["000"], [""], [], r"label_cn\.txt: is empty"),
    ],
)
def test_faults_have_one_line_each(
    tmp_path: Path, folders: list[str], zh: list[str], en: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_elevater_cn(write(tmp_path, folders, zh, en))
