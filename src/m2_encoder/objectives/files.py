"""Files that objectives own: what an argument names, and who loads it.

An objective says in `files` which of its arguments name a file, and takes their content in `prepare`. Commands check
that the files exist before anything starts, and a run records them, so that it does not go on with others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from m2_encoder.models.config import M2EncoderConfig
    from m2_encoder.models.m2_encoder import M2Encoder
    from m2_encoder.models.visual_tokenizer import VisualTokenizer
    from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What an argument of an objective names; null is always allowed where the constructor takes None.

    Attributes:
        content: a plain file; a folder that `m2-export` wrote, or a name of `list_models` whose checkpoint the argument
            `<argument>_weights` names; or a folder that a run of a visual tokenizer exported.
        fix: for a plain file that is missing, what to give.
        check: for a plain file, raises ValueError if it holds something else; called before anything starts.
    """

    content: Literal["file", "encoder", "visual tokenizer"]
    fix: str = "give the path of a file"
    check: Callable[[Path], object] | None = None


FILE: Final = FileKind("file")
ENCODER: Final = FileKind("encoder")
VISUAL_TOKENIZER: Final = FileKind("visual tokenizer")


class Resources(NamedTuple):
    """What `prepare` may ask for; all functions raise UserError for what cannot be used.

    Attributes:
        tokenizer: of the run.
        config: the model's.
        find_path: path of a value: from the working directory or, if nothing is there, from the checkout's root.
        load_encoder: (argument, value, weights) to a model that reads the ids of the run's tokenizer; weights are the
            checkpoint of one that is named, or None.
        load_visual_tokenizer: (argument, value) to a visual tokenizer.
    """

    tokenizer: SentencePieceTokenizer
    config: M2EncoderConfig
    find_path: Callable[[str], Path]
    load_encoder: Callable[[str, str, str | None], M2Encoder]
    load_visual_tokenizer: Callable[[str, str], VisualTokenizer]
