"""Visual tokenizers as folders: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.exported import CONFIG_FILE, FORMAT, VISUAL_TOKENIZER_FORMAT, WEIGHTS_FILE, read_format
from m2_encoder.checkpoints.formats import read_safetensors, read_small_json
from m2_encoder.checkpoints.tensors import write_tensors
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import atomic_folder
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.pictures import STANDARD, PicturePolicy

_VERSION = 1


def save_visual_tokenizer(
    folder: str | os.PathLike[str],
    tokenizer: VisualTokenizer,
    *,
    pictures: PicturePolicy = STANDARD,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tokenizer; the folder appears whole or not at all. `pictures`: what the pixels of its training were.

    Raises:
        CheckpointError: if the folder exists, or the disk refuses.
    """
    with atomic_folder(folder, overwrite=overwrite, error=CheckpointError) as temporary:
        weights = {name: value.detach().float().cpu().contiguous() for name, value in tokenizer.state_dict().items()}
        write_tensors(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        content = {
            "format": VISUAL_TOKENIZER_FORMAT,
            "format_version": _VERSION,
            "tokenizer": tokenizer.config.to_dict(),
            "preprocess": {"pictures": pictures.to_dict()},
            "provenance": dict(provenance or {}),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
    return Path(folder)


def load_visual_tokenizer(folder: str | os.PathLike[str]) -> VisualTokenizer:
    """Read what `save_visual_tokenizer` wrote, in eval mode on the CPU.

    Raises:
        CheckpointError: if it is no such folder, or a damaged one.
    """
    folder = Path(folder)
    if read_format(folder) == FORMAT:
        raise CheckpointError(
            f"{folder} is an encoder, not a visual tokenizer; train one with m2-train +experiment=visual_tokenizer"
        )
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{folder}: no visual tokenizer, which is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "train one with m2-train +experiment=visual_tokenizer"
        )
    try:
        content = read_small_json(folder / CONFIG_FILE)
        if content.get("format") != VISUAL_TOKENIZER_FORMAT or content.get("format_version") != _VERSION:
            raise CheckpointError(
                f"{folder}: format {content.get('format')!r} version {content.get('format_version')!r}, expected "
                f"{VISUAL_TOKENIZER_FORMAT!r} version {_VERSION}; "
                "train a tokenizer with m2-train +experiment=visual_tokenizer"
            )
        tokenizer = VisualTokenizer(VisualTokenizerConfig.from_dict(content["tokenizer"]))
        tokenizer.load_state_dict(read_safetensors(folder / WEIGHTS_FILE))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: damaged or edited ({reason}); export the tokenizer again") from error
    return tokenizer.eval()
