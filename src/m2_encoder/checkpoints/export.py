"""Write a trained model as a folder for `m2_encoder.load`: configuration, weights, tokenizer, model card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m2_encoder.checkpoints.exported import (
    CARD_FILE,
    CONFIG_FILE,
    CONFIG_METADATA_KEY,
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    config_text,
)
from m2_encoder.checkpoints.io import save_safetensors
from m2_encoder.checkpoints.matching_head import CONFIG_KEY, MatchingHead, save_head
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import atomic_folder, file_sha256
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> language -> metric -> percent, e.g. `{"heldout_style": {"zh": {"i2t_r@1": 41.2}}}`."""

CHANCE = "chance"
"""A "language" of `Metrics`: what guessing would reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """One part of the training data, for the model card.

    Attributes:
        name: what it is.
        licence: under which terms it comes.
        note: what it contributed; may be empty.
        url: where it comes from; may be empty.
    """

    name: str
    licence: str
    note: str = ""
    url: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What a model card says beyond the facts that the model itself knows.

    Attributes:
        title: heading; the name of the configuration if empty.
        summary: a paragraph: what the model is and what for.
        data: training data and their licences.
        training: facts of the run, label to value, e.g. `{"steps": "3,000", "objective": "itc"}`.
        limits: what the model cannot do, one sentence each.
        licence: terms of the weights.
    """

    title: str = ""
    summary: str = ""
    data: Sequence[DataSource] = ()
    training: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Sequence[str] = ()
    licence: str = "Apache-2.0"


def export_model(
    folder: str | os.PathLike[str],
    *,
    model: M2Encoder,
    tokenizer: SentencePieceTokenizer,
    metrics: Metrics | None = None,
    provenance: Mapping[str, Any] | None = None,
    card: CardInfo | None = None,
    matching: MatchingHead | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model as a folder; it appears whole or not at all.

    `load(folder)` gives features that are bit for bit those of an fp32 model. Weights of another dtype are
    stored in fp32.

    Args:
        folder: where to write; must not exist unless `overwrite`.
        model: the model, with data.
        tokenizer: the one the model was trained with.
        metrics: results for the model card and `config.json`.
        provenance: plain facts about the origin (run, command, revision, versions); must be JSON.
        card: what the model card says beyond that.
        matching: the head that ranks retrieved candidates again, stored in a file of its own; None for no such file.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        UserError: if tokenizer and model do not belong together, the folder exists, the provenance is not
            JSON, or the disk refuses.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the token table {config.vocab_size} rows; "
            "export the model with the tokenizer it was trained with"
        )
    card = card or CardInfo()
    folder = Path(folder)
    with atomic_folder(folder, overwrite=overwrite, error=CheckpointError) as temporary:
        save_safetensors(
            model,
            temporary / WEIGHTS_FILE,
            metadata={"format": "pt", CONFIG_METADATA_KEY: config_text(config)},
        )
        tokenizer.save(temporary / TOKENIZER_FILE)
        content = _config_content(config, tokenizer, file_sha256(temporary / TOKENIZER_FILE))
        content["metrics"] = metrics or {}
        content["provenance"] = provenance or {}
        if matching is not None:
            content[CONFIG_KEY] = save_head(temporary, matching)
        (temporary / CONFIG_FILE).write_text(_json_text(content), encoding="utf-8")
        (temporary / CARD_FILE).write_text(
            model_card(model, card=card, metrics=metrics or {}, provenance=provenance or {}), encoding="utf-8"
        )
    return folder


def _json_text(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"metrics and provenance must be plain JSON values: {error}") from error


def _config_content(
    config: M2EncoderConfig, tokenizer: SentencePieceTokenizer, tokenizer_sha256: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": config.to_dict(),
        "preprocess": {
            "image_size": config.image_size,
            "resize": "to a square, bicubic with antialias; the aspect ratio is not kept",
            "value_range": [0, 1],
            "normalisation": "(x - 0.5) / 0.5, inside the model",
        },
        "tokenizer": {
            "context_length": tokenizer.context_length,
            "truncation_side": tokenizer.truncation_side,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer_sha256,
        },
    }


# ------------------------------------------------------------------------------------------------- model card


def model_card(
    model: M2Encoder, *, card: CardInfo, metrics: Metrics, provenance: Mapping[str, Any] | None = None
) -> str:
    """The model card, as Markdown.

    Args:
        model: read for its architecture and number of parameters.
        card: texts.
        metrics: results; a table per split.
        provenance: origin, one line per entry.

    Returns:
        The text of the card.
    """
    config = model.config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    sections = [
        f"# {card.title or config.name}",
        card.summary or "A bilingual (Chinese and English) image-text encoder.",
        _USAGE,
        "## Architecture\n\n"
        + _bullets(
            {
                "family": "M2-Encoder (arXiv:2401.15896), one feature space for images and both languages",
                "parameters": f"{num_parameters:,}",
                "image": f"{config.image_size} px, patches of {config.patch_size} px",
                "text": f"up to {config.context_length} tokens, vocabulary of {config.vocab_size:,}",
                "layers": f"{config.num_layers} backbone + {config.num_vl_layers} vision-language, width "
                f"{config.embed_dim}, {config.num_heads} heads",
                "features": f"{config.feature_dim} numbers, L2-normalised",
            }
        ),
        _data_section(card.data),
        "## Training\n\n" + _bullets(card.training) if card.training else "",
        _metrics_section(metrics),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits) if card.limits else "",
        "## Origin\n\n" + _bullets(provenance) if provenance else "",
        f"## Licence\n\nThe weights: {card.licence}. Each training data source keeps its own licence.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_USAGE = """## Use

```python
import torch
from m2_encoder import load

model, preprocess, tokenizer = load("path/to/this/folder")
image_features = model.encode_image(torch.stack([preprocess("picture.png")]))  # (B, E), L2-normalised
text_features = model.encode_text(tokenizer(["一只猫", "a cat"]))
probabilities = model.similarity(image_features, text_features).softmax(dim=-1)
```"""


def _bullets(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {label}: {value}" for label, value in facts.items())


def _data_section(sources: Sequence[DataSource]) -> str:
    if not sources:
        return ""
    rows = [
        (f"[{source.name}]({source.url})" if source.url else source.name, source.licence, source.note)
        for source in sources
    ]
    return "## Data\n\n" + _table(("source", "licence", "contributes"), rows)


def _metrics_section(metrics: Metrics) -> str:
    """One table per split: a row per language, a column per metric; chance comes last."""
    parts = []
    for split, languages in metrics.items():
        names = list(dict.fromkeys(name for values in languages.values() for name in values))
        order = sorted(languages, key=lambda language: language == CHANCE)
        rows = [(language, *(_percent(languages[language].get(name)) for name in names)) for language in order]
        parts.append(f"### {split}\n\n" + _table(("", *names), rows))
    return "\n\n".join(["## Results", "Percent.", *parts]) if parts else ""


def _percent(value: float | None) -> str:
    """One decimal; two below one percent, where chance lives."""
    return "" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
