"""Cross-modal masked image modelling (CMIM): hidden patches, predicted from the others and the caption.

    loss = mean over hidden p of  l(h_p, patch p)      h_p: state of patch p after the vision-language layers

with l of `patch_targets`: squared distance to normalised pixels, or cross-entropy of a visual tokenizer's codes.

Reference: BEiT (arXiv:2106.08254) for blocks of patches; SyCoCa (arXiv:2401.02137) for the use of captions and for
attentive masks; MAE (arXiv:2111.06377) and BEiT v2 (arXiv:2208.06366) for the targets.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from annotated_types import Gt, Lt
from torch import Tensor

from m2_encoder.bounds import NotNegative, Rule, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.attentive import attentive_mask
from m2_encoder.objectives.base import LocalObjective, LocalTerms
from m2_encoder.objectives.files import Resources
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.patch_targets import NormalizedPixels, PatchTargets
from m2_encoder.objectives.schedule import Schedule

_TARGETS: Final = Rule(
    lambda targets: targets is not None,
    "keys with a _target_ (pixels: objective=[cmim])",
    "'{_target_: m2_encoder.objectives.patch_targets.NormalizedPixels}'",
)


class MaskedImage(LocalObjective):
    """CMIM over the hidden patches of every image, once for each of its captions.

    Attentive masks (see `attentive_mask`) hide the patches whose features are most similar to the mean feature of the
    image's captions. A patch's feature is its state after the vision-language layers, projected as the image's is. The
    choice is deterministic: a recomputed piece hides the same patches. It costs one more forward of the vision-language
    layers over the image, and is useful only if image and text share a space: beside a contrastive objective, or from
    trained weights.

    Args:
        mask_ratio: share of the patches that are hidden; the released configuration names 80 of 196.
        masking: "block" for blocks as in BEiT, sampled by the data module, or "attentive".
        targets: what is predicted; None for normalised pixels.
    """

    passes = frozenset({"masked_image"})
    optional_parts = frozenset({"mask_token"})

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        mask_ratio: Annotated[float, Gt(0), Lt(1)] = 80 / 196,
        masking: Literal["block", "attentive"] = "block",
        targets: Annotated[PatchTargets | None, _TARGETS] = None,
        text_expert: bool = False,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        self._mask_ratio, self._is_attentive = mask_ratio, masking == "attentive"
        self.patch_ratio = None if self._is_attentive else mask_ratio
        self.targets = NormalizedPixels() if targets is None else targets
        self.score_names = self.targets.score_names
        self._count = 0

    def prepare(self, resources: Resources) -> None:
        """Load files of the targets."""
        try:
            self.targets.prepare(resources)
        except UserError as error:
            raise error.under("targets") from error

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head of the targets.

        Raises:
            UserError: if the targets do not fit the model, or attentive masks would hide no patch or all.
        """
        patches = (shape.image_size // shape.patch_size) ** 2
        self._count = round(self._mask_ratio * patches)
        if not 0 < self._count < patches:
            nearest = min(max(self._count, 1), patches - 1) / patches
            fix = f"for example {nearest:g}" if nearest else "give the model smaller patches"
            rule = f"hides {self._count} of the {patches} patches, and must hide at least one and not all"
            raise UserError(f"{rule}; {fix}", key="mask_ratio", value=self._mask_ratio)
        self.targets.build(shape)

    def choose(self, passes: PiecePasses) -> Tensor:
        """Which patches are hidden, (b, patches) bool."""
        if not self._is_attentive:
            assert passes.batch.patch_mask is not None, "the data module hides patches where an objective asks for it"
            return passes.batch.patch_mask
        texts = passes.pair.text_features.detach()
        by_image = texts.unflatten(0, (-1, passes.batch.captions_per_image)).mean(dim=1)
        return attentive_mask(passes.patch_features, by_image, count=self._count)

    def terms(self, passes: PiecePasses) -> LocalTerms:
        """One term per hidden patch."""
        batch = passes.batch
        mask = self.choose(passes)
        chosen = mask.repeat_interleave(batch.captions_per_image, dim=0)
        rows, places = chosen.nonzero(as_tuple=True)
        losses, scores = self.targets.compare(
            passes.masked_image(mask), batch.images, rows // batch.captions_per_image, places
        )

        def by_caption(values: Tensor) -> Tensor:
            return values.new_zeros(len(chosen)).index_add(0, rows, values)

        return LocalTerms(
            by_caption(losses), chosen.sum(dim=1), {name: by_caption(values) for name, values in scores.items()}
        )
