"""Somebody else's model as a folder: its weights under its own names, and what pictures and texts it wants."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from m2_encoder.checkpoints.exported import CARD_FILE, CONFIG_FILE, TOKENIZER_FILE, TOWERS_FORMAT, WEIGHTS_FILE
from m2_encoder.checkpoints.tensors import find_non_finite
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import atomic_folder
from m2_encoder.models.two_towers import TwoTowers
from m2_encoder.pictures import PicturePolicy
from m2_encoder.tokenizers.foreign import ForeignTokenizer
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_CARD = """\
# {name}, run {run}

`{target}` 的权重，用 m2-train 训练了 {steps} 步。`m2_encoder.load` 不会构建它：需要它的代码，权重沿用它自己的参数名。

Weights of `{target}`, trained with m2-train for {steps} steps. `m2_encoder.load` does not build it: whoever has its
code does, and loads the weights, whose names are its own.

```python
from safetensors.torch import load_file

model = ...  # {target}, with the arguments in config.json
model.load_state_dict(load_file("{weights}"))
```

Images: {size} x {size} pixels in 0..1, minus {mean}, divided by {std}. Texts: {texts}. To train on from it:
`m2-train ... model.weights={weights}`. The run's checkpoints and config.yaml are as of every run.
"""


def export_towers(
    folder: str | os.PathLike[str],
    *,
    model: TwoTowers,
    tokenizer: SentencePieceTokenizer | ForeignTokenizer,
    target: str,
    pictures: PicturePolicy,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write such a folder; it appears whole or not at all.

    Args:
        folder: where to write; must not exist unless `overwrite`.
        model: the model, with data.
        tokenizer: a SentencePiece one is stored, too.
        target: dotted name of what builds the module.
        pictures: what the pixels of its training pictures were.
        metrics: results, as plain values.
        provenance: facts about the origin, as plain values.
        overwrite: replace an existing folder.

    Raises:
        UserError: if values are not finite, the folder exists, or the disk refuses.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.towers.state_dict().items()}
    if (broken := find_non_finite(state)) is not None:
        raise UserError(f"cannot export the model: {broken} holds values that are NaN or infinite")
    config, folder = model.config, Path(folder)
    content = {
        "format": TOWERS_FORMAT,
        "target": target,
        "model": config.to_dict(),
        "logit_scale": float(model.logit_scale.detach()),
        "preprocess": {"image_size": config.image_size, "pictures": pictures.to_setting()},
        "metrics": dict(metrics),
        "provenance": dict(provenance),
    }
    is_ours = isinstance(tokenizer, SentencePieceTokenizer)
    name = "" if isinstance(tokenizer, SentencePieceTokenizer) else tokenizer.name
    card = _CARD.format(
        name=config.name,
        run=provenance.get("run", ""),
        target=target,
        steps=provenance.get("steps", "?"),
        weights=folder / WEIGHTS_FILE,
        size=config.image_size,
        mean=list(config.pixel_mean or (0, 0, 0)),
        std=list(config.pixel_std or (1, 1, 1)),
        texts=f"`{TOKENIZER_FILE}`, at most {config.context_length} tokens" if is_ours else f"`{name}`",
    )
    with atomic_folder(folder, overwrite=overwrite, error=CheckpointError) as temporary:
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.save(temporary / TOKENIZER_FILE)
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
    return folder
