"""Language detection for captions without one."""

from __future__ import annotations

import re

# Unified ideographs with extensions A to I, and compatibility ideographs.
_IDEOGRAPH = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


def detect_language(text: str) -> str:
    """Language by script: any Chinese ideograph makes a text "zh", everything else is "en".

    >>> detect_language("a cat"), detect_language("一只猫 on a mat")
    ('en', 'zh')
    """
    return "zh" if _IDEOGRAPH.search(text) else "en"
