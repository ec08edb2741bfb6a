from __future__ import annotations

import pickle
import random
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.tokenizers.dictionary import load_jieba, read_user_words
from m2_encoder.tokenizers.han_words import HanWords
from m2_encoder.tokenizers.words import split_words

pytest.importorskip("jieba", reason="words of Chinese texts need the extra `words`")


@pytest.fixture(scope="module")
def jieba_words() -> Any:
    return load_jieba()


@pytest.fixture(scope="module")
def han_words() -> HanWords:
    return HanWords()


def _random_runs(frequencies: dict[str, int], count: int) -> list[str]:
    """Random characters, words as frequent as in the dictionary, any words, and cuts through words."""
    draw = random.Random(20240126)
    words = [word for word, often in frequencies.items() if often and all("\u4e00" <= c <= "\u9fd5" for c in word)]
    characters = sorted({character for word in words for character in word})
    frequent = draw.choices(words, weights=[frequencies[word] for word in words], k=2 * count)
    runs = []
    for index in range(count):
        if index % 4 == 0:
            runs.append("".join(draw.choices(characters, k=draw.randint(1, 12))))
        elif index % 4 == 1:
            runs.append("".join(draw.choices(frequent, k=draw.randint(1, 6))))
        elif index % 4 == 2:
            runs.append("".join(draw.choices(words, k=draw.randint(1, 4))))
        else:
            sentence = "".join(draw.choices(frequent, k=draw.randint(2, 8)))
            start = draw.randrange(len(sentence))
            runs.append(sentence[start : start + draw.randint(1, 10)])
    return runs


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("use_model", [True, False])
def test_words_are_those_of_jieba(jieba_words: Any, use_model: bool, count: int) -> None:
    words = HanWords(use_model=use_model)
    for run in _random_runs(jieba_words.FREQ, count):
        expected = jieba_words.lcut(run, HMM=use_model)
        starts = tuple(accumulate(map(len, expected[:-1]), initial=0))
        assert words(run) == starts, f"{run}: jieba finds {expected}"


def test_user_dictionary_changes_words_as_in_jieba(tmp_path: Path, han_words: HanWords) -> None:
    path = tmp_path / "words.txt"
    path.write_text("杭研大厦\n红苹果 200 n\nM2编码器 5\nNew York 3 nz\n", encoding="utf-8")
    words = HanWords(user_dictionary=str(path))
    assert words("网易杭研大厦") == (0, 2)
    assert words("红苹果和梨") == (0, 3, 4)
    assert (han_words("网易杭研大厦"), han_words("红苹果和梨")) == ((0, 2, 4), (0, 1, 3, 4))
    expected = load_jieba(read_user_words(path)).lcut("他在网易杭研大厦吃红苹果")
    assert words("他在网易杭研大厦吃红苹果") == tuple(accumulate(map(len, expected[:-1]), initial=0))
    assert words.find_others("▁in▁new▁york▁用m2编码器") == [(4, 12), (14, 19)]


def test_a_word_taken_away_is_taken_from_this_dictionary_alone(tmp_path: Path) -> None:
    """Frequency 0 takes a word away, and what the model joins apart; jieba does the latter for the whole process."""
    from jieba import finalseg

    path = tmp_path / "words.txt"
    path.write_text("杭研 0\n", encoding="utf-8")
    assert HanWords()("来到了网易杭研大厦") == (0, 2, 3, 5, 7)
    assert HanWords(user_dictionary=str(path))("来到了网易杭研大厦") == (0, 2, 3, 5, 6, 7)
    assert HanWords()("来到了网易杭研大厦") == (0, 2, 3, 5, 7)
    assert split_words("网易杭研大厦", "zh") == ["网易", "杭研", "大厦"]
    assert not finalseg.Force_Split_Words


def test_words_do_not_depend_on_what_else_uses_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    from jieba import finalseg

    monkeypatch.setattr(finalseg, "Force_Split_Words", {"杭研"})
    assert HanWords()("网易杭研大厦") == (0, 2, 4)
    assert split_words("网易杭研大厦", "zh") == ["网易", "杭研", "大厦"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("白色T恤", [(2, 4)]),
        ("白色t恤", [(2, 4)]),
        ("小S和小Sally", [(0, 2)]),  # the second is another word's beginning
        ("一只猫", []),
        ("", []),
    ],
)
def test_words_with_letters(han_words: HanWords, text: str, expected: list[tuple[int, int]]) -> None:
    assert han_words.find_others(text) == expected


def _is_inside(text: str, place: int) -> bool:
    return re.fullmatch("[A-Za-z0-9]{2}", text[max(0, place - 1) : place + 1]) is not None


def test_of_words_that_begin_alike_the_longest_is_found(tmp_path: Path) -> None:
    """Against all of them in a row, the longest first, as a plain pattern."""
    draw = random.Random(3)
    listed = {"".join(draw.choices("ab+.红x", k=draw.randint(1, 5))) for _ in range(300)}
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{word} 5\n" for word in sorted(listed)), encoding="utf-8")
    words = HanWords(user_dictionary=str(path))
    counts = load_jieba(read_user_words(path)).FREQ
    entries = {word for word, count in counts.items() if count and not re.fullmatch("[\u4e00-\u9fd5]+", word)}
    forms = {form for word in entries for form in (word, word.lower())}
    plain = re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
    for _ in range(300):
        text = "".join(draw.choices("ab+.红x是", k=30))
        spans = [match.span() for match in plain.finditer(text)]
        whole = [span for span in spans if not any(_is_inside(text, place) for place in span)]
        assert words.find_others(text) == whole


def test_pickles_without_its_dictionary(han_words: HanWords) -> None:
    starts = han_words("来到北京")
    content = pickle.dumps(han_words)
    assert len(content) < 500
    assert pickle.loads(content)("来到北京") == starts == (0, 2)


def test_leaves_no_cache_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    HanWords()("图片")
    assert list(tmp_path.iterdir()) == []


def test_bad_user_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.txt"):
        HanWords(user_dictionary=str(tmp_path / "absent.txt"))("图片")
    path = tmp_path / "gbk.txt"
    path.write_bytes("红色的苹果".encode("gbk"))
    with pytest.raises(UserError, match=r"gbk\.txt.*UTF-8"):
        HanWords(user_dictionary=str(path))("图片")
