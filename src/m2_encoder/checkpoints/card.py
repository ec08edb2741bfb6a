"""The model card: what is known of a model of ours, as Markdown: data, licences, training, results, limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.pictures import STANDARD, PicturePolicy

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> language -> metric -> percent, e.g. `{"heldout_style": {"zh": {"i2t_r@1": 41.2}}}`."""

CHANCE = "chance"
"""A "language" of `Metrics`: what guessing would reach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """One part of the training data, for the model card."""

    name: str  # what it is
    licence: str  # under which terms it comes
    note: str = ""  # what it contributed; may be empty
    url: str = ""  # where it comes from; may be empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardInfo:
    """What a model card says beyond the facts that the model itself knows."""

    title: str = ""  # heading; the name of the configuration if empty
    summary: str = ""  # a paragraph: what the model is and what for
    data: Sequence[DataSource] = ()  # training data and their licences
    # facts of the run, label to value, e.g. `{"steps": "3,000", "objective": "itc"}`.
    training: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limits: Sequence[str] = ()  # what the model cannot do, one sentence each
    licence: str = "Apache-2.0"  # terms of the weights


_DRAWINGS: Final[Mapping[str, DataSource]] = {
    "noto": DataSource(
        name="Noto Emoji", licence="Apache-2.0", note="drawings", url="https://github.com/googlefonts/noto-emoji"
    ),
    "twemoji": DataSource(
        name="Twemoji", licence="CC BY 4.0", note="drawings", url="https://github.com/jdecked/twemoji"
    ),
    "fluent": DataSource(
        name="Fluent Emoji", licence="MIT", note="drawings", url="https://github.com/microsoft/fluentui-emoji"
    ),
    "openmoji": DataSource(name="OpenMoji", licence="CC BY-SA 4.0", note="drawings", url="https://openmoji.org"),
}
_CAPTIONS: Final = (
    DataSource(
        name="Unicode CLDR annotations",
        licence="Unicode-3.0",
        note="names and keywords in Chinese and English",
        url="https://cldr.unicode.org",
    ),
    DataSource(
        name="emoji for Python", licence="BSD-3-Clause", note="aliases", url="https://github.com/carpedm20/emoji"
    ),
)
_EMOJI_LIMITS: Final = (
    "Trained on drawings of emoji alone: it knows nothing of photographs.",
    "Captions are names and keywords, not sentences.",
    "Held-out style and families are for reporting; no training setting was chosen by them.",
)


def build_card(cfg: Mapping[str, Any], *, steps: str) -> CardInfo:
    """The model card of a run.

    Args:
        cfg: its resolved configuration.
        steps: that the model was trained for, in words if there are fewer than planned.
    """
    data, trainer = cfg["data"], cfg["trainer"]
    is_emoji = str(data["_target_"]).endswith(".EmojiDataModule")
    trained_on = [source for style, source in _DRAWINGS.items() if style != data.get("heldout_style")]
    return CardInfo(
        title=f"M2-Encoder, run {cfg['run']['name']}",
        summary=(
            "A bilingual Chinese and English image-text encoder of the M2-Encoder architecture, trained from "
            f"{'scratch' if cfg['model'].get('weights') is None else 'given weights'} with m2-train."
        ),
        data=(*trained_on, *_CAPTIONS) if is_emoji else (),
        training={
            "objectives": ", ".join(cfg["objective"]),
            "steps": steps,
            "samples per step": f"{data['global_batch_size']:,}" if "global_batch_size" in data else "unknown",
            "learning rate": f"{cfg['optimizer']['lr']:g}" if "lr" in cfg["optimizer"] else "of the optimizer's class",
            "precision": str(trainer.get("precision", "32-true")),
            "seed": str(cfg["seed"]),
        },
        limits=_EMOJI_LIMITS if is_emoji else (),
    )


def model_card(
    model: M2Encoder,
    *,
    card: CardInfo,
    metrics: Metrics,
    provenance: Mapping[str, Any] | None = None,
    pictures: PicturePolicy = STANDARD,
) -> str:
    """The model card, as Markdown.

    Args:
        model: read for its architecture and number of parameters.
        card: texts.
        metrics: results; a table per split.
        provenance: origin, one line per entry.
        pictures: what the pixels of its training pictures were.

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
                "pictures": str(pictures),
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
        order = sorted(languages, key=lambda language: language.startswith(CHANCE))
        rows = [(language, *(_percent(languages[language].get(name)) for name in names)) for language in order]
        parts.append(f"### {split}\n\n" + _table(("", *names), rows))
    return "\n\n".join(["## Results", "Percent.", *parts]) if parts else ""


def _percent(value: float | None) -> str:
    """One decimal; two below one percent, where chance lives."""
    return "" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
