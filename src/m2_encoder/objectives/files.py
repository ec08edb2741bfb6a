"""Files that objectives read: declared in `Objective.files`, loaded in `Objective.prepare`.

Commands check that the files exist before anything starts. A run records them, and does not resume with others.
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


START: Final = "start"
"""An encoder: the model that the run starts from, by `model.weights`."""


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What kind of file an argument of an objective names.

    Attributes:
        content: "file"; "encoder" for a folder that `m2-export` wrote, a name of `list_models` with its checkpoint in
            the argument `<argument>_weights`, or `START`; "visual tokenizer" for a folder that a run exported.
        fix: of the error for a missing plain file.
        check: raises ValueError if a plain file holds something else; called before anything starts.
    """

    content: Literal["file", "encoder", "visual tokenizer"]
    fix: str = "give the path of a file"
    check: Callable[[Path], object] | None = None


FILE: Final = FileKind("file")
ENCODER: Final = FileKind("encoder")
VISUAL_TOKENIZER: Final = FileKind("visual tokenizer")


class LoadedEncoder(NamedTuple):
    """An encoder, and what it reads captions by."""

    model: M2Encoder
    tokenizer: SentencePieceTokenizer | None  # None: it reads the ids that the run's own tokenizer makes


class Resources(NamedTuple):
    """Input of `Objective.prepare`; its functions raise UserError for a file that cannot be used."""

    tokenizer: SentencePieceTokenizer
    config: M2EncoderConfig
    find_path: Callable[[str], Path]  # relative to the working directory or, if nothing is there, the checkout's root
    load_encoder: Callable[[str, str, str | None], LoadedEncoder]  # of (argument, value, checkpoint of a named one)
    load_visual_tokenizer: Callable[[str, str], VisualTokenizer]  # of (argument, value)
