"""Parts of the model that stay as they are, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal

from m2_encoder.bounds import Index, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import Adaptation

SHARED: Final = ("vl_encoder.layers.*.vision_expert.*", "vl_encoder.norm.vision_expert.*")
"""What pictures and texts both pass after the backbone."""

EMBEDDINGS: Final = {"image": ("image_embed.*",), "text": ("text_embed.*",)}
EXPERTS: Final = {
    expert: (f"backbone.layers.*.{expert}.*", f"backbone.norm.{expert}.*")
    for expert in ("vision_expert", "text_expert")
}
HEADS: Final = ("image_proj.*", "text_proj.*", "vl_image_proj.*", "vl_text_proj.*")
TOWERS: Final = {
    "image": (*EMBEDDINGS["image"], *EXPERTS["vision_expert"], *SHARED, "image_proj.*", "vl_image_proj.*"),
    "text": (*EMBEDDINGS["text"], *EXPERTS["text_expert"], *SHARED, "text_proj.*", "vl_text_proj.*"),
}
"""Everything that the features of one modality depend on, so `SHARED` is in both. A text that an objective sends
through the text experts of the vision-language encoder passes what is in neither."""


class Locked(Adaptation):
    """Locks parts; everything else is trained. What several arguments name is locked once.

    Locked parameters get no gradient, no weight decay and no state of an optimizer. What lies below the lowest trained
    layer of a modality keeps no activations either.

    Args:
        towers: `image`, `text`: everything that the features of pictures, or of texts, depend on. They stay the same to
            the bit; so the vision experts of the vision-language encoder, which serve both, are locked with either.
        layers: the first n layers of the backbone, both experts.
        experts: `vision_expert`, `text_expert`: those of all layers of the backbone, with its last norm.
        embeddings: `image`, `text`: patches, tokens, positions.
        heads: the projections to features.
        logit_scale: the temperatures.

    Raises:
        UserError: for a part that does not exist, or if nothing is locked; in `apply`, if nothing but temperatures is
            left to train.

    Reference: LiT (arXiv:2111.07991) is `towers=[image]`.
    """

    @check_bounds
    def __init__(
        self,
        towers: Sequence[Literal["image", "text"]] = (),
        layers: Index = 0,
        experts: Sequence[Literal["vision_expert", "text_expert"]] = (),
        embeddings: Sequence[Literal["image", "text"]] = (),
        heads: bool = False,
        logit_scale: bool = False,
    ) -> None:
        self._layers = layers
        patterns = [f"backbone.layers.{number}.*" for number in range(layers)]
        for table, words in ((TOWERS, towers), (EXPERTS, experts), (EMBEDDINGS, embeddings)):
            patterns += [pattern for word in words for pattern in table[word]]
        patterns += [*(HEADS if heads else ()), *(("logit_scale", "logit_vl_scale") if logit_scale else ())]
        if not patterns:
            raise UserError("locks nothing; give towers, layers, experts, embeddings or heads, or use adaptation=full")
        self._patterns = frozenset(patterns)

    def apply(self, model: M2Encoder) -> None:
        """Freeze what was named."""
        if self._layers > (known := model.config.num_layers):
            rule = f"must be at most {known}, the layers of the backbone"
            raise UserError(rule, key="layers", value=self._layers)
        for name, parameter in model.named_parameters():
            if _is_named(name, self._patterns):
                parameter.requires_grad_(False)
        of_features = {pattern for patterns in TOWERS.values() for pattern in patterns}
        left = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        if not any(_is_named(name, of_features) for name in left):
            raise UserError("locks everything that features depend on; leave a part to be trained")

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Return the model itself: locking added nothing."""
        return model


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
