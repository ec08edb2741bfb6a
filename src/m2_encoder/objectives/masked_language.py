"""Cross-modal masked language modelling (CMLM): hidden words of a caption, predicted from the caption and its image.

    s_j = LN(GELU(W h_j + b))        h_j: state of token j after the vision-language layers, hidden words in the caption
    loss = mean over hidden j of  -log softmax_v(s_j . w_v + c_v)[true token of j],      w: the token table

Reference: BERT (arXiv:1810.04805) for the loss and its head; SyCoCa (arXiv:2401.02137) and M2-Encoder
(arXiv:2401.15896) for its place beside contrastive learning.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from torch import Tensor

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalObjective, LocalTerms
from m2_encoder.objectives.files import FileKind, Resources
from m2_encoder.objectives.passes import PiecePasses
from m2_encoder.objectives.schedule import Schedule
from m2_encoder.objectives.token_head import TokenHead
from m2_encoder.tokenizers.dictionary import DICTIONARY_FIX, read_user_words


class MaskedLanguage(LocalObjective):
    """CMLM over the words that the data module hides.

    Args:
        mask_ratio: share of a caption's tokens that are hidden, in whole words. The released configuration names 0.5
            with an image; without one, 0.15.
        decoder: "tied" compares with the model's token table, "own" with a table of this objective.
        user_dictionary: file of more words for jieba, in its format: `word [frequency] [tag]` a line.
    """

    passes = frozenset({"masked_text"})
    score_names = ("accuracy",)
    files = {"user_dictionary": FileKind("file", f"{DICTIONARY_FIX}, or null", read_user_words)}  # noqa: RUF012

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        mask_ratio: Annotated[float, Gt(0), Lt(1)] = 0.5,
        decoder: Literal["tied", "own"] = "tied",
        text_expert: bool = False,
        user_dictionary: str | None = None,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        self.word_ratio = mask_ratio
        self.user_dictionary = user_dictionary
        self._decoder = decoder

    def prepare(self, resources: Resources) -> None:
        """Find the dictionary, which the data module reads."""
        if self.user_dictionary is not None:
            self.user_dictionary = str(resources.find_path(self.user_dictionary))

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head."""
        self.head = TokenHead(shape, decoder=self._decoder)

    def terms(self, passes: PiecePasses) -> LocalTerms:
        """One term per hidden token."""
        return self.head.terms(passes.masked_text, passes.text.ids, passes.hidden_tokens, passes)

    def predict(self, passes: PiecePasses, table: Tensor) -> Tensor:
        """Captions with the likeliest tokens in place of hidden ones, (k * b, T) int64; see `TokenHead.predict`."""
        ids = passes.text.ids.clone()
        ids[passes.hidden_tokens] = self.head.predict(passes.masked_text, table)
        return ids
