"""Languages of captions: what a name says, and what a script shows."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated

from m2_encoder.bounds import Rule
from m2_encoder.types import LANGUAGES

_NAMES = {
    "en": "en eng english 英文 英语 英語",
    "zh": "zh zho chi cmn yue wuu lzh cn zhcn zhtw zhhk zhs zht chs cht chinese mandarin cantonese 中文 汉语 漢語 华语 "
    "華語 国语 國語 普通话 普通話 粤语 粵語 简体 簡體 繁体 繁體 简体中文 簡體中文 繁体中文 繁體中文 简中 繁中",
}
_LANGUAGE_OF = {name: language for language, names in _NAMES.items() for name in names.split()}
_QUALITIES = {"simplified", "traditional", "american", "british", "standard", "modern", "label", "lang", "language"}
_UNSAID_NAMES = (
    "und unk unknown nan none null nil na n/a ? auto mul multi multilingual mixed nolang zxx mis default undefined "
    "bilingual 双语 雙語 中英 中英文"
)
_UNSAID = frozenset(_UNSAID_NAMES.split())
# Codes that the name of a column may end in; `id`, which mostly is a number, is left out.
_OTHER_CODES = frozenset(
    re.findall(
        r"\w+",
        "ar bg bn ca cs da de el es et fa fi fr he hi hr hu it ja jp ko kr lt lv ms nl no pl pt ro ru sk sl sr sv sw "
        "ta te th tr uk ur vi",
    )
)
_MOST_CHARACTERS = 20  # of a name that is neither, in messages
_MOST_NAMED = 10

_CAPTION_WORD = (
    "(?:(?:raw|orig|original|short|long|image)[ _.:-]+)?"
    "(?:captions?|cap|texts?|titles?|alt|alttext|prompts?|descriptions?|desc|sentences?)"
)
_CHINESE_WORD = "(?:描述|标题|標題|文本|说明|說明|文案)"
_COLUMN = re.compile(
    f"{_CAPTION_WORD}[ _.:-]+(?P<after>.+)|(?P<before>.+?)(?:[ _.:-]+{_CAPTION_WORD}|[ _.:-]*{_CHINESE_WORD})"
    "|(?P<bare>.+)"
)
_TAG = re.compile(r"([^\W\d_]+)(?:[_-](?:hans|hant|latn|cn|tw|hk|mo|sg|us|gb|uk|au|ca))*(?:[ _.-]?\d+)?")

# Unified ideographs with extensions A to I and compatibility ideographs, 々 and 〇, and the signs of Bopomofo.
_HAN = re.compile(r"[\u3005\u3007\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff]")
_HANGUL = re.compile(r"[\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb]")
_KANA_SHARE = 0.2  # of Chinese characters and kana, above which a text is Japanese whatever the characters are

NO_LETTERS = "none"
"""Script of a text without letters."""


def read_language(name: object) -> str | None:
    """The language that a name means: "en" or "zh", another as it is written, None for one that is not said.

    Codes of ISO 639, tags with script or region, and names, in any case. A name of both says neither.

    >>> [read_language(name) for name in ("zh-CN", "CHS", "zho", "中文", "en-US", "English", "fr-FR", "und", "zh-en")]
    ['zh', 'zh', 'zh', 'zh', 'en', 'en', 'fr', None, None]
    """
    written = " ".join(str(name).casefold().split())
    words = [word for word in re.split(r"[\s_.:()（）-]+", written) if word]
    while len(words) > 1 and words[0] in _QUALITIES:
        del words[0]
    if not words or words[0] in _UNSAID or written in _UNSAID:
        return None
    named = {_LANGUAGE_OF[word] for word in re.findall(r"[^\W_]+", written) if word in _LANGUAGE_OF}
    if len(named) > 1 and words[1:] != ["cn"]:  # en-CN is English
        return None
    is_list = re.search("[,;/|+&]", written) is not None
    return written[:_MOST_CHARACTERS] if is_list else _LANGUAGE_OF.get(words[0], words[0][:_MOST_CHARACTERS])


LanguageName = Annotated[
    str, Rule(lambda name: read_language(name) in LANGUAGES, "zh or en, or a tag of theirs such as zh-CN", "zh")
]
"""A setting that `read_language` reads as one of `LANGUAGES`."""


@lru_cache(maxsize=4096)
def language_of_column(name: str) -> str | None:
    """The language of the captions in a column or under a key, by its name; None if the name does not say it.

    >>> [language_of_column(name) for name in ("caption_zh", "text_cn", "en", "zh-TW", "captionEn", "text_len")]
    ['zh', 'zh', 'en', 'zh', 'en', None]
    """
    spread = re.sub("(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    match = _COLUMN.fullmatch(spread)
    tag = _TAG.fullmatch(match[match.lastgroup]) if match and match.lastgroup else None
    if match is None or tag is None:
        return None
    if tag[1] in _LANGUAGE_OF:
        return _LANGUAGE_OF[tag[1]]
    return tag[1] if match.lastgroup != "bare" and tag[1] in _OTHER_CODES else None


def detect_language(text: str) -> str:
    """Language by script; "en" for Latin letters, French ones included, and for texts without letters.

    >>> [detect_language(text) for text in ("a cat", "一只猫 on a mat", "猫がいます", "고양이", "кошка", "2 + 2")]
    ['en', 'zh', 'ja', 'ko', 'cyrillic', 'en']
    """
    script = detect_script(text)
    return "en" if script == NO_LETTERS else script


def detect_script(text: str) -> str:
    """The language that a script shows: "en" (Latin), "zh", "ja", "ko", the name of another script, or `NO_LETTERS`.

    A Chinese character makes a text Chinese, because Chinese captions carry Latin brand names. Kana make it Japanese,
    unless they are few and a character beside them is not used in Japan, as in 鲜の每日坚果; a single one without any
    Chinese character is part of a face such as ツ.
    """
    if text.isascii():
        return "en" if any(map(str.isalpha, text)) else NO_LETTERS
    text = unicodedata.normalize("NFKC", text)
    han, kana, hangul = (pattern.findall(text) for pattern in (_HAN, _KANA, _HANGUL))
    is_read = len(kana) > _KANA_SHARE * (len(han) + len(kana)) or all(map(_is_used_in_japan, han))
    if kana and is_read and (han or len(kana) > 1):
        return "ja"
    if len(hangul) > len(han):
        return "ko"
    return "zh" if han else _main_script(text)


def doubt_english(text: str) -> str | None:
    """Why a text that counts as English may be in no language, or in another one; None where nothing says so.

    >>> [doubt_english(text) for text in ("a cat", "un chat a mangé", "12 + 3")]
    [None, 'letters such as é, ß or ñ', 'no letters']
    """
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return "no letters"
    return None if all(map(str.isascii, letters)) else "letters such as é, ß or ñ"


def describe_languages(counts: Mapping[str, int]) -> str:
    """How many captions are in which language, the most frequent first.

    >>> describe_languages({"de": 3, "fr": 12})
    '12 captions in fr, 3 in de'
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count:,} in {name}" for name, count in ranked[:_MOST_NAMED]]
    if not named:
        return "no captions"
    first = "caption" if ranked[0][1] == 1 else "captions"
    named[0] = named[0].replace(" in ", f" {first} in ", 1)
    rest = ranked[_MOST_NAMED:]
    more = [f"{sum(count for _, count in rest):,} in {len(rest):,} others"] if rest else []
    return ", ".join([*named, *more])


def list_languages(names: Iterable[str]) -> str:
    """Names without repetition, not more than a line takes."""
    distinct = list(dict.fromkeys(names))
    more = [f"{len(distinct) - _MOST_NAMED:,} others"] if len(distinct) > _MOST_NAMED else []
    return ", ".join([*distinct[:_MOST_NAMED], *more])


def _is_used_in_japan(character: str) -> bool:
    try:
        character.encode("shift_jis")
    except UnicodeEncodeError:
        return False
    return True


def _main_script(text: str) -> str:
    scripts: Counter[str] = Counter(
        unicodedata.name(character, "?").split()[0] for character in text if character.isalpha()
    )
    for name in ("MODIFIER", "KATAKANA", "HIRAGANA", "?"):
        del scripts[name]
    if not scripts:
        return NO_LETTERS
    if 2 * scripts["LATIN"] >= scripts.total():
        return "en"
    return scripts.most_common(1)[0][0].lower()
