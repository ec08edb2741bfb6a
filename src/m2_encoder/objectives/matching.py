"""Image-text matching (ITM): classifies pairs of image and caption, seen together, as right or wrong.

    z(i, j) = w . h_ij + c          h_ij: state of the caption's first token after the vision-language layers
    loss = mean over captions j of image i of  softplus(-z(i, j)), softplus(z(i, j')) and softplus(z(i', j))

Letters: n local images · k captions per image · M images of the group · g ranks of the group · s = exp(logit_scale)
· h hardness.

Hard negatives are sampled by the contrastive scores of the step:

    j' ~ softmax_t(h s x_i . y_t)  over the captions t of the whole group that do not describe image i
    i' ~ softmax_r(h s x_r . y_j)  over the images r of this rank that caption j does not describe

ALBEF has the hardness h = 1. From random weights that is too hard: the loss stays that of guessing. Smaller values
sample more evenly; 0 samples uniformly.

A caption describes the images of its identity, and those that have a caption with the same tokens. The latter would
score as high as the right caption and be sampled as negatives, which trains one pair as right and wrong in one step.

Captions come from all ranks because their ids are cheap to send; an image of another rank would cost its pixels or
hidden states. Samples invert the cumulative probabilities at a uniform number that depends on the seed, the step and
the caption's place in the group: j' is the same (up to rounding) for every division of the group's rows over ranks.

Cost per rank and step: sent k (g - 1) n (E elements and T + 2 integers); three fusions of N + T tokens for each
caption; the backbone for one more caption each and, where micro-batches are recomputed, for the pairs a second time and
one more image for each caption. Scores exist for a tile of rows at a time.

Reference: ALBEF (arXiv:2107.07651), section 3.2, for the loss and its hard negatives; R2D2 (arXiv:2205.03860), whose
ranking stage after a contrastive pre-ranking this is, with one cross encoder for its two.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import NotNegative, Seed, check_bounds
from m2_encoder.distributed.collectives import exchange_counts, gather_constant
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalTerms, ObjectiveInputs, PairObjective
from m2_encoder.objectives.derivatives import check_log_scales
from m2_encoder.objectives.passes import HardPairs, PiecePairs
from m2_encoder.objectives.schedule import Schedule
from m2_encoder.types import TextTokens

_INIT_STD: Final = 0.02
_TILE_ELEMENTS: Final = 1 << 22
_STEP_FACTOR: Final = 1_000_003  # a prime; random numbers of different seeds do not meet


class Matching(PairObjective):
    """ITM with two hard negatives per caption.

    Args:
        schedule: a late start loses little, since scores of the first steps are noise.
        hardness: h.
        seed: of the samples.
    """

    score_names = ("accuracy",)

    @check_bounds
    def __init__(
        self,
        *,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        hardness: NotNegative = 1.0,
        seed: Seed = 0,
        text_expert: bool = False,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        self._hardness, self._seed = hardness, seed

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head."""
        self.head = nn.Linear(shape.embed_dim, 1)
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def select(self, inputs: ObjectiveInputs) -> HardPairs:
        """Sample a wrong caption and a wrong image for every local caption."""
        if inputs.batch is None:
            raise UserError("matching reads images and captions; ObjectiveInputs needs the batch")
        batch, captions = inputs.batch, inputs.batch.captions_per_image
        check_log_scales(inputs.logit_scale)
        scale = self._hardness * inputs.logit_scale.exp()
        others = _gather(inputs, batch.text)
        places = _sample_uniform(len(others.features), seed=self._seed, step=inputs.step)[:, others.own]
        uniform = places.to(inputs.identity.device)
        about = Content(others.identity, _number_texts(others.text)[:, None])
        own = Content(*(part[others.own] for part in about))
        by_image = own.words.view(-1, captions)
        shown = Content(own.identity, by_image.repeat_interleave(captions, dim=0))
        images = inputs.image_features.repeat_interleave(captions, dim=0)
        text_rows, has_text = sample_negatives(images, others.features, scale, shown, about, uniform[0])
        image_rows, has_image = sample_negatives(
            inputs.text_features, inputs.image_features, scale, own, Content(inputs.identity, by_image), uniform[1]
        )
        return HardPairs(
            TextTokens(others.text.ids[text_rows], others.text.mask[text_rows]), has_text, image_rows, has_image
        )

    def terms(self, passes: PiecePairs) -> LocalTerms:
        """One term per right pair, and one per wrong pair that was found."""
        right, wrong_text, wrong_image = (
            self.head(states).squeeze(1).to(torch.promote_types(states.dtype, torch.float32))
            for states in (passes.matched, passes.wrong_text, passes.wrong_image)
        )
        has_text, has_image = passes.has_text, passes.has_image
        sums = functional.softplus(-right)
        # Not a product: values without a negative may be NaN.
        sums = sums + torch.where(has_text, functional.softplus(wrong_text), 0.0)
        sums = sums + torch.where(has_image, functional.softplus(wrong_image), 0.0)
        hits = (right > 0).to(sums.dtype) + (has_text & (wrong_text <= 0)) + (has_image & (wrong_image <= 0))
        return LocalTerms(sums, 1 + has_text.long() + has_image, {"accuracy": hits})


class PairEncoder(Protocol):
    """What reranking needs of a model; `M2Encoder` has it."""

    def trim_text(self, text: TextTokens | Tensor, mask: Tensor | None = None) -> TextTokens:
        """Cut padding beyond the longest text."""
        ...

    def encode_image_backbone(self, images: Tensor) -> Tensor:
        """Hidden states of images, (B, N, D)."""
        ...

    def encode_text_backbone(self, tokens: TextTokens) -> Tensor:
        """Hidden states of texts, (B, T, D)."""
        ...

    def fuse(self, image_hidden: Tensor, text_hidden: Tensor, mask: Tensor, *, text_expert: bool = False) -> Tensor:
        """Hidden states of the first token of each text beside its image, (B, D)."""
        ...


def score_hidden(
    model: PairEncoder,
    head: nn.Linear,
    image_hidden: Tensor,
    text_hidden: Tensor,
    mask: Tensor,
    *,
    text_expert: bool = False,
) -> Tensor:
    """Log-odds that text i describes image i, (P,), fp32 at least.

    Args:
        model: a trained encoder.
        head: of `Matching`.
        image_hidden: backbone states, (P, N, D).
        text_hidden: backbone states, (P, T, D).
        mask: True on tokens of the texts, (P, T) bool.
        text_expert: as it was trained.
    """
    scores: Tensor = head(model.fuse(image_hidden, text_hidden, mask, text_expert=text_expert)).squeeze(1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Content(NamedTuple):
    """Content of rows: an image and a caption belong together if they share the identity or a caption's tokens."""

    identity: Tensor  # (N,) int64
    words: Tensor  # numbers of a row's captions (of one if it is a caption), (N, W) int64; equal for equal tokens


def sample_negatives(
    queries: Tensor, keys: Tensor, scale: Tensor, query_content: Content, key_content: Content, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample one key for each query in proportion to exp(scale * query . key), among keys that do not belong to it.

    Args:
        queries: (N, E).
        keys: (K, E).
        scale: s, ().
        query_content: of N rows.
        key_content: of K rows.
        uniform: place in the cumulative probabilities, (N,) in [0, 1).

    Returns:
        Rows of keys, (N,) int64, and whether there was one to sample, (N,) bool; otherwise the row is 0.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    keys, scale = keys.to(dtype).t(), scale.to(dtype)
    rows = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    found = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    size = max(1, _TILE_ELEMENTS // max(1, keys.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        own = _belongs(Content(*(each[part] for each in query_content)), key_content)
        with torch.autocast(queries.device.type, enabled=False):
            logits = (scale * (queries[part].to(dtype) @ keys)).masked_fill_(own, -torch.inf)
        found[part] = ~own.all(dim=1)
        # fp32 would lose probabilities below 1e-7.
        sums = logits.softmax(dim=1, dtype=torch.float64).nan_to_num_(0.0).cumsum(dim=1)
        total = sums[:, -1:]
        # Strictly below the total, so that the first sum beyond it exists and belongs to an allowed key.
        target = torch.minimum(uniform[part, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        rows[part] = torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=keys.shape[1] - 1)
    return rows.where(found, 0), found


def _belongs(queries: Content, keys: Content) -> Tensor:
    """Which keys belong to which queries, (N, K) bool."""
    found = queries.identity[:, None] == keys.identity
    for one in queries.words.unbind(1):
        for other in keys.words.unbind(1):
            found |= one[:, None] == other
    return found


def _number_texts(text: TextTokens) -> Tensor:
    """A number for each text, (K,) int64, equal for equal tokens; padding does not count."""
    _, numbers = torch.unique(text.ids.where(text.mask, -1), dim=0, return_inverse=True)
    return numbers


class _GroupTexts(NamedTuple):
    """The k * M captions of the group, and the rows of this rank's."""

    features: Tensor
    text: TextTokens
    identity: Tensor
    own: slice


def _gather(inputs: ObjectiveInputs, text: TextTokens) -> _GroupTexts:
    count, group = len(text.ids), inputs.group
    identity = inputs.identity.repeat_interleave(count // len(inputs.identity))
    if group is None:
        return _GroupTexts(inputs.text_features, text, identity, slice(0, count))
    rank = dist.get_rank(group)
    width = max(exchange_counts(text.ids.shape[1], group))  # each rank pads to its own longest caption
    ids = functional.pad(text.ids, (0, width - text.ids.shape[1]))
    packed = torch.cat([ids, text.mask.sum(dim=1, keepdim=True), identity[:, None]], dim=1)
    features, packed = gather_constant(inputs.text_features, group), gather_constant(packed, group)
    mask = torch.arange(width, device=packed.device) < packed[:, width, None]
    return _GroupTexts(
        features, TextTokens(packed[:, :width], mask), packed[:, width + 1], slice(rank * count, (rank + 1) * count)
    )


def _sample_uniform(captions: int, *, seed: int, step: int) -> Tensor:
    """Two numbers for each caption of a group, (2, k * M) in [0, 1), the same on every rank."""
    generator = torch.Generator().manual_seed(seed * _STEP_FACTOR + step)
    return torch.rand((2, captions), dtype=torch.float64, generator=generator)
