"""Contrast of an image with a long caption and with a short one, after Long-CLIP.

    loss = (1 - a) ITC(x, l) + a ITC(PCM(x), s),    PCM(x_i) = normalise(m + P (x_i - m))

x: features of images · l, s: of their long and short captions · a: `short_share` · m: mean of the features of all M
images of the group · P: projection onto their `components` principal directions.

A long caption says everything about an image, a short one only what matters most. So the image keeps all of its feature
beside the long one, and only what tells images of the batch apart most beside the short one. m and P come from the rows
of all ranks and are constants in backward: gradients pass the projection, not the choice of directions, which has no
stable derivative where eigenvalues are close. What is reduced is normalised again. Both are our reading, as is the mean
of both losses in place of their sum.

Cost per rank and step: that of two `itc`, features of the images gathered once more, and the eigenvectors of an E x E
matrix.

Reference: Long-CLIP (arXiv:2403.15378), section 3.3, "primary component matching", with 32 components.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.bounds import Count, Fraction, NotNegative, check_bounds
from m2_encoder.distributed.collectives import gather_constant
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive import contrastive_losses
from m2_encoder.objectives.schedule import Schedule


class LongCaptions(Objective):
    """Contrast over the ranks of the contrastive group, which must hold equally many rows.

    It needs captions in pairs, a long one and then a short one (`data.captions.short`), and takes the place of `itc`.

    Args:
        components: principal directions that are left of an image beside short captions; below the number of images
            of the group, or nothing is reduced.
        short_share: a, in [0, 1].
        multi_positive: rows with the same identity are positives of each other; otherwise only own captions.
    """

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        components: Count = 32,
        short_share: Fraction = 0.5,
        multi_positive: bool = True,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.components = components
        self.short_share = short_share
        self.multi_positive = multi_positive

    def build(self, shape: M2EncoderConfig) -> None:
        """Refuse a reduction that is none.

        Raises:
            UserError: if features have no more numbers than there are components.
        """
        if self.components >= shape.feature_dim:
            rule = f"must be below the {shape.feature_dim} numbers of a feature, or nothing is reduced"
            raise UserError(rule, key="components", value=self.components)

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows against all rows of the group.

        Raises:
            UserError: if captions do not come in pairs.
        """
        images, texts = inputs.image_features, inputs.text_features
        captions = len(texts) // max(1, len(images))
        if captions % 2:
            raise UserError(
                f"objective.long pairs long captions with short ones, but there are {captions} for each image; "
                "use data.captions.short=first_sentence"
            )
        reduced = reduce_features(images, gather_constant(images, inputs.group), components=self.components)
        losses = [
            contrastive_losses(
                features,
                texts[first::2],
                inputs.logit_scale,
                group=inputs.group,
                identity=inputs.identity if self.multi_positive else None,
                captions_per_image=captions // 2,
                equal_rows=True,
            )
            for first, features in enumerate((images, reduced))
        ]
        shares = (1 - self.short_share, self.short_share)
        loss = torch.stack([share * each.loss.squeeze(0) for share, each in zip(shares, losses, strict=True)]).sum()
        rows = torch.cat([2 * share * each.per_sample for share, each in zip(shares, losses, strict=True)], dim=1)
        return ObjectiveOutput(loss=loss, per_sample=rows.flatten())


def reduce_features(features: Tensor, all_features: Tensor, *, components: int) -> Tensor:
    """What is left of features in the principal directions of a batch, L2-normalised.

    Args:
        features: (n, E), differentiable.
        all_features: of the whole batch, (M, E); a constant.
        components: of at most M - 1 that there are.

    Returns:
        (n, E) in fp32 (fp64 for fp64). Features are returned as they are where M - 1 is not above `components`.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, constant = features.to(dtype), all_features.detach().to(dtype)
        mean = constant.mean(dim=0)
        centred = constant - mean
        _, directions = torch.linalg.eigh(centred.t() @ centred)  # eigenvalues ascend
        directions = directions[:, -components:]
        return functional.normalize(mean + (features - mean) @ directions @ directions.t(), dim=1)
