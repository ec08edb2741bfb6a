from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from m2_encoder.errors import UserError
from m2_encoder.tokenizers.dictionary import UserWord, load_jieba, read_user_words
from m2_encoder.tokenizers.han_words import HanWords

# What jieba's documentation shows, and what it reads as intended beside that.
LEGAL = """\ufeff云计算 5
李小福 2 nr
创新办 3 i
easy_install 3 eng
好用 300
凱特琳 nz
台中
Edu Trust认证 2000

iPhone 15 Pro 20 nz
New York
  T恤 4 \r
\ufeffC++ 0
杭研 0
杭研大厦
"""


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("云计算 abc xyz qq", "would be the word '云计算 abc xyz'"),
        ("笑脸 -5 n", "would be the word '笑脸 -5'"),
        ("笑脸 -5", "whole number from 0"),
        ("笑脸 3.5", "whole number from 0"),
        ("笑脸 .5 n", "whole number from 0"),
        ("笑脸 １００", "whole number from 0"),
        ("笑脸 －5 n", "whole number from 0"),
        ("笑脸 5 N", "small letters"),
        ("# 品牌 的 words", "would be the word '# 品牌 的'"),
        ("笑脸\t5\tn", r"white space U\+0009; write `word \[frequency\] \[tag\]`"),
        ("笑脸\u30005", r"white space U\+3000"),
        ("笑脸  5 n", "two spaces in a row"),
        ("笑脸\r云计算", r"white space U\+000D"),
        ("笑脸 " + "9" * 16, "frequency of 16 digits; give at most 15"),
    ],
)
def test_lines_that_are_no_words_are_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(f"猫\n\n{line}\n狗\n", encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=f"^line 3: .*{fault}"):
        read_user_words(path)
    with pytest.raises(UserError, match=f"^user dictionary .*words.txt: line 3: .*{fault}"):
        HanWords(user_dictionary=str(path))("一只")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "^holds no words; give a UTF-8 file"),
        ("\ufeff \r\n\n".encode(), "^holds no words"),
        ("猫\n红色的".encode() + "苹果".encode("gbk"), "^line 2: is not UTF-8"),
    ],
)
def test_files_that_are_no_dictionary_are_named(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_user_words(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "words.txt")
    with pytest.raises(UserError, match=r"words\.txt is no regular file"):
        read_user_words(tmp_path / "words.txt")


def test_what_is_legal_is_read_as_by_jieba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "words.txt"
    path.write_text(LEGAL, encoding="utf-8", newline="")
    words = read_user_words(path)
    assert words[-2:] == [UserWord("杭研", 0), UserWord("杭研大厦", None)]
    expected = load_jieba()
    from jieba import finalseg

    monkeypatch.setattr(finalseg, "Force_Split_Words", set())  # the one of the process
    expected.load_userdict(io.BytesIO(LEGAL.encode()))
    own = load_jieba(words)
    assert own.total == expected.total
    assert _counts(own.FREQ) == _counts(expected.FREQ)


def _counts(frequencies: dict[str, int]) -> dict[str, int]:
    return {word: count for word, count in frequencies.items() if count}


def test_missing_jieba_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install jieba"):
        load_jieba()
