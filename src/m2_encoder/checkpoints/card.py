"""The model card: what is known of a model of ours, as Markdown: data, licences, training, results, limits.

It is in Chinese and English; texts of users stay in their language.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.card_words import (
    CHINESE,
    EMOJI_LIMITS,
    FROM_SCRATCH,
    FROM_WEIGHTS,
    HOW_TO_READ,
    SUMMARY,
    Words,
    describe_pictures,
    heading,
    label,
    line,
    paragraphs,
)
from m2_encoder.files import file_sha256
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.pictures import STANDARD, PicturePolicy

Metrics = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Split -> language -> metric -> percent, e.g. `{"heldout_style": {"zh": {"i2t_r@1": 41.2}}}`."""

CHANCE = "chance"
"""A "language" of `Metrics`: what guessing would reach."""

FILES_START: Final = heading("Files")
"""The line that `files_section` begins with."""


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
        summary=FROM_SCRATCH if cfg["model"].get("weights") is None else FROM_WEIGHTS,
        data=(*trained_on, *_CAPTIONS) if is_emoji else (),
        training={
            "objectives": ", ".join(cfg["objective"]),
            "steps": steps,
            "samples per step": f"{data['global_batch_size']:,}" if "global_batch_size" in data else "unknown",
            "learning rate": f"{cfg['optimizer']['lr']:g}" if "lr" in cfg["optimizer"] else "of the optimizer's class",
            "precision": str(trainer.get("precision", "32-true")),
            "seed": str(cfg["seed"]),
        },
        limits=EMOJI_LIMITS if is_emoji else (),
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
    licence = Words(
        f"The weights: {card.licence}. Each training data source keeps its own licence.",
        f"权重：{CHINESE.get(card.licence, card.licence)}。各训练数据来源保留各自的许可。",
    )
    sections = [
        f"# {card.title or model.config.name}",
        paragraphs(card.summary or SUMMARY),
        _USAGE,
        heading("Architecture") + "\n\n" + _bullets(_architecture(model, pictures)),
        _data_section(card.data),
        heading("Training") + "\n\n" + _bullets(card.training) if card.training else "",
        _metrics_section(metrics),
        heading("Limits") + "\n\n" + "\n".join(f"- {line(limit)}" for limit in card.limits) if card.limits else "",
        heading("Origin") + "\n\n" + _bullets(provenance) if provenance else "",
        heading("Licence") + "\n\n" + licence.paragraphs,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def files_section(folder: Path, names: Sequence[str]) -> str:
    """The end of a card: sizes and checksums of files."""
    rows = [(name, f"{(folder / name).stat().st_size:,}", f"`{file_sha256(folder / name)}`") for name in names]
    return f"\n{FILES_START}\n\n" + table(("file", "bytes", "sha256"), rows) + "\n"


def _architecture(model: M2Encoder, pictures: PicturePolicy) -> dict[str, str]:
    config = model.config
    backbone, both, width, heads = config.num_layers, config.num_vl_layers, config.embed_dim, config.num_heads
    facts = {
        "family": Words("one feature space for images and both languages", "图片和中英文共用一个特征空间"),
        "image": Words(
            f"{config.image_size} px, patches of {config.patch_size} px",
            f"{config.image_size} 像素，块 {config.patch_size} 像素",
        ),
        "text": Words(
            f"up to {config.context_length} tokens, vocabulary of {config.vocab_size:,}",
            f"最多 {config.context_length} 个词元，词表 {config.vocab_size:,}",
        ),
        "layers": Words(
            f"{backbone} backbone + {both} vision-language, width {width}, {heads} heads",
            f"主干 {backbone} + 图文 {both}，宽 {width}，{heads} 头",
        ),
        "features": Words(f"{config.feature_dim} numbers, L2-normalised", f"{config.feature_dim} 个数，L2 归一化"),
    }
    return {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        **{name: words.line for name, words in facts.items()},
        "pictures": describe_pictures(pictures).line,
    }


_USAGE = f"""{heading("Use")}

```python
import torch
from m2_encoder import load

model, preprocess, tokenizer = load("path/to/this/folder")
image_features = model.encode_image(torch.stack([preprocess("picture.png")]))  # (B, E), L2-normalised
text_features = model.encode_text(tokenizer(["一只猫", "a cat"]))
probabilities = model.similarity(image_features, text_features).softmax(dim=-1)
```"""


def _bullets(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"- {label(name)}: {value}" for name, value in facts.items())


def _data_section(sources: Sequence[DataSource]) -> str:
    if not sources:
        return ""
    rows = [
        (f"[{source.name}]({source.url})" if source.url else source.name, source.licence, line(source.note))
        for source in sources
    ]
    return heading("Data") + "\n\n" + table(("source", "licence", "contributes"), rows)


def _metrics_section(metrics: Metrics) -> str:
    """One table per split: a row per language, a column per metric; chance comes last."""
    parts = []
    for split, languages in metrics.items():
        names = list(dict.fromkeys(name for values in languages.values() for name in values))
        order = sorted(languages, key=lambda language: language.startswith(CHANCE))
        rows = [(label(language), *(_percent(languages[language].get(name)) for name in names)) for language in order]
        parts.append(heading(split, 3) + "\n\n" + table(("", *names), rows))
    return "\n\n".join([heading("Results"), paragraphs(HOW_TO_READ), *parts]) if parts else ""


def _percent(value: float | None) -> str:
    """One decimal; two below one percent, where chance lives."""
    return "" if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, Markdown, with headings in both languages."""
    lines = [[label(name) for name in header], ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
