"""Templates and the texts that they make."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.data.samples.language import detect_language
from m2_encoder.errors import UserError
from m2_encoder.evaluation.prompts import (
    FAMILIES,
    PROMPT_LANGUAGES,
    check_templates,
    digest_texts,
    expand,
    load_templates,
)


@pytest.mark.parametrize("language", PROMPT_LANGUAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_whole_and_in_their_language(family: str, language: str) -> None:
    found = load_templates(family, language)
    assert found.name == family
    assert all(row.count("{}") == 1 for row in found.rows)
    assert {detect_language(row) for row in found.rows if row != "{}"} <= {language}
    assert len(found.rows) == (1 if family == "none" else 8)


def test_a_family_needs_its_language_and_none_needs_none() -> None:
    assert load_templates("photos", "zh_TW") == load_templates("photos", "zh")
    assert load_templates("none", "fr").rows == ("{}",)
    with pytest.raises(UserError, match="the templates photos are in zh and en, not in fr; choose none, or a file"):
        load_templates("photos", "fr")


def test_templates_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "openai.txt"
    file.write_bytes("\ufeffa photo of {c}.\r\nitap of a {}\r\n\r\n".encode())
    found = load_templates(str(file), "fr")
    assert found == ("openai", ("a photo of {}.", "itap of a {}"))
    with pytest.raises(UserError, match="no such family or file; choose general, drawings, photos, none, or a file"):
        load_templates(str(tmp_path / "nowhere"), "en")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{}.", "a photo"], "x, line 2: 'a photo' has 0 places for a name; wanted {} "),
        (["{} and {c}"], "line 1: .* has 2 places"),
        ([], "no template in it"),
    ],
)
def test_templates_that_are_refused(rows: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_templates(rows, "x")


def test_a_template_that_comes_twice_counts_twice() -> None:
    assert check_templates(["a {}", " a {c} "], "x") == ("a {}", "a {}")


def test_a_name_may_hold_anything() -> None:
    assert expand(["{}", "%s {c}"], ["a {}.", "{}"]) == [["a {}.", "{}"], ["a %s {c}.", "%s {c}"]]


def test_the_digest_knows_all_that_makes_the_texts() -> None:
    whole = digest_texts(["cat", "dog"], "en", ["{}", "a {}"])
    others = [
        digest_texts(["dog", "cat"], "en", ["{}", "a {}"]),
        digest_texts(["cat", "dog"], "zh", ["{}", "a {}"]),
        digest_texts(["cat", "dog"], "en", ["a {}", "{}"]),
        digest_texts(["cat", "dog", "{}"], "en", ["a {}"]),
        digest_texts(["catdog"], "en", ["{}", "a {}"]),
    ]
    assert len({whole, *others}) == 6
    assert whole == digest_texts(("cat", "dog"), "en", ("{}", "a {}"))
    assert len(whole) == 64
