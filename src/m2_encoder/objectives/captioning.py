"""Captioning: the next token of a caption, predicted from the image and the tokens before it.

    s_t = LN(GELU(W h_t + b))        h_t: state of token t, which sees the whole image and the tokens up to itself
    loss = mean over t of  -log softmax_v(s_t . w_v + c_v)[token t + 1],      w: the token table

Token 0 is the template's `[CLS]`, from which the first word is predicted; the last prediction is the end token.

The mask is the prefix-causal one of BEiT-3 and the released code (image sees image; text sees image and earlier text).
The released code puts image and text into one sequence from the first layer on. Here the backbone encodes the caption
alone under a causal mask, as in CoCa, and both meet in the vision-language layers: the image's backbone states are
those of the contrastive pass.

Reference: CoCa (arXiv:2205.01917), Eq. 2-3; SyCoCa (arXiv:2401.02137) for its place beside contrastive learning.
"""

from __future__ import annotations

from typing import Literal

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalObjective, LocalTerms
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.schedule import Schedule
from m2_encoder.objectives.token_head import TokenHead


class Captioning(LocalObjective):
    """Cross-entropy of every token of a caption but the first, the end token included; padding does not count.

    Args:
        decoder: "tied" compares with the model's token table, "own" with a table of this objective.
    """

    passes = frozenset({"caption"})
    score_names = ("accuracy",)

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        decoder: Literal["tied", "own"] = "tied",
        text_expert: bool = False,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        self._decoder = decoder

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head."""
        self.head = TokenHead(shape, decoder=self._decoder)

    def terms(self, passes: PiecePasses) -> LocalTerms:
        """One term per token but the first."""
        text = passes.text
        return self.head.terms(passes.caption, text.ids[:, 1:], text.mask[:, 1:], passes)
