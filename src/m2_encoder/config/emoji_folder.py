"""Where the commands find the built-in set: a folder for each setting, unless one is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from m2_encoder.config.paths import anchor
from m2_encoder.config.problems import find_problems
from m2_encoder.data.emoji.dataset import default_emoji_folder, emoji_settings
from m2_encoder.data.emoji.folder import check_content
from m2_encoder.errors import Problem, UserError

EMOJI_TARGET: Final = "m2_encoder.data.emoji.emoji_module.EmojiDataModule"


def find_emoji_folder(folder: str | None, settings: Mapping[str, Any]) -> Path:
    """Absolute path of a given folder, or of the one whose name holds `settings`, arguments of `emoji_settings`."""
    return anchor(default_emoji_folder(emoji_settings(**settings)) if folder is None else folder)


def emoji_folder_problems(key: str, folder: str | None, settings: Mapping[str, Any]) -> Iterator[Problem]:
    """A folder that holds the set of other settings, or something else; nothing is written."""
    try:
        check_content(find_emoji_folder(folder, settings), emoji_settings(**settings))
    except UserError as error:
        yield from (problem._replace(key=key, value=folder) for problem in find_problems(error))
    except OSError as error:
        yield Problem(key, folder, f"cannot be read ({error.strerror})", "give a folder that can be")
