"""What a model card says about a run of ours: data, licences, training, limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from m2_encoder.checkpoints.export import CardInfo, DataSource

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


def build_card(cfg: Mapping[str, Any]) -> CardInfo:
    """The model card of a run.

    Args:
        cfg: its resolved configuration.
    """
    data, trainer = cfg["data"], cfg["trainer"]
    is_emoji = str(data["_target_"]).endswith(".EmojiDataModule")
    trained_on = [source for style, source in _DRAWINGS.items() if style != data.get("heldout_style")]
    return CardInfo(
        title=f"M2-Encoder, run {cfg['run']['name']}",
        summary=(
            "A bilingual Chinese and English image-text encoder of the M2-Encoder architecture, trained from "
            f"{'scratch' if cfg['model']['weights'] is None else 'given weights'} with m2-train."
        ),
        data=(*trained_on, *_CAPTIONS) if is_emoji else (),
        training={
            "objectives": ", ".join(cfg["objective"]),
            "steps": f"{trainer['max_steps']:,}",
            "samples per step": f"{data['global_batch_size']:,}",
            "learning rate": f"{cfg['optimizer']['lr']:g}",
            "precision": str(trainer["precision"]),
            "seed": str(cfg["seed"]),
        },
        limits=_EMOJI_LIMITS if is_emoji else (),
    )
