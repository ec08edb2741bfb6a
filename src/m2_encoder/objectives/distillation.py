"""Distillation from a frozen teacher: of its features, and of its similarities between the rows of the group.

    features    1/2 [mean_i (1 - cos(W x_i, u_i)) + mean_j (1 - cos(W y_j, v_j))]
    similarity  1/2 [mean_i KL(softmax_j s' u_i . v_j || softmax_j s x_i . y_j) + the same from texts to images]
    loss        feature_weight * features + similarity_weight * similarity

x, y: the student's features and s = exp(logit_scale); u, v: the teacher's and s' (or 1 / temperature). W: a projection
of the student's features to the teacher's width, one for both modalities; left out if the widths are equal.

The teacher reads the same batch: the same captions, by its own tokenizer if that is not the model's, and images resized
to its size if that differs. It is no sub-module: not in checkpoints, not in the optimizer, not replicated or sharded,
but whole on every rank. It runs once per step, without a graph, on `chunk_size` rows at a time.

Letters: n local images · k captions per image · g ranks of the group · E, E' feature dims of student and teacher.

Cost per rank and step: the teacher's forward; for similarities that of ITC, and beyond it (g - 1)(k + 1) n (2 E + E')
elements sent and 6 matrix products of n x k M x (E or E'); no (n x k M) matrix exists. Backward sends nothing.

Reference: DC-CLIP (arXiv:2404.11249), DCLIP (arXiv:2505.21549) and AltCLIP (arXiv:2211.06679) for features of a frozen
teacher, AltCLIP also for a teacher of one language (`teacher_language`); CLIP-KD (arXiv:2307.12732) for similarities
over a batch; ProCLIP (arXiv:2510.18795) for a text tower of another kind, which first learns the features of the text
tower that it replaces. The momentum teacher of R2D2 and ALBEF, a running mean of the student, is another method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import NotNegative, Rows, Temperature, Text, check_bounds
from m2_encoder.distributed.collectives import gather_constant
from m2_encoder.errors import NotGivenError, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.alignment import mean_alignment
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.contrastive import contrastive_losses
from m2_encoder.objectives.files import ENCODER, Resources
from m2_encoder.objectives.schedule import Schedule
from m2_encoder.types import LANGUAGES, ImageTextBatch, TextTokens

if TYPE_CHECKING:  # objectives load no model
    from m2_encoder.models.m2_encoder import M2Encoder
    from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_INIT_STD = 0.02


class _Taught(NamedTuple):
    """The teacher's features of this rank's rows."""

    images: Tensor  # (n, E')
    texts: Tensor  # (k * n, E')
    scale: Tensor  # s', ()


class _Term(NamedTuple):
    """One of the two terms of the loss."""

    loss: Tensor  # mean of the local rows, ()
    per_sample: Tensor  # of each local text with its image, (k * n,), detached


class Distillation(Objective):
    """Distillation over the ranks of the contrastive group, which must hold equally many rows.

    Args:
        teacher: a folder written by `m2-export`, or a name of `list_models` with `teacher_weights`; `prepare` loads it.
        teacher_weights: a checkpoint for a teacher that is named.
        feature_weight: of the feature term; 0 leaves it out.
        similarity_weight: of the similarity term; 0 leaves it out.
        temperature: of the teacher's similarities; None for its own scale.
        teacher_language: for every caption of an image the teacher reads the caption in this language, so that the
            others learn to say the same; None: it reads each caption.
        chunk_size: rows that the teacher encodes at a time.
    """

    files = {"teacher": ENCODER}  # noqa: RUF012 - a ClassVar of Objective

    @check_bounds
    def __init__(
        self,
        *,
        teacher: Text,
        weight: NotNegative = 1.0,
        schedule: Schedule | None = None,
        teacher_weights: Text | None = None,
        feature_weight: NotNegative = 1.0,
        similarity_weight: NotNegative = 1.0,
        temperature: Temperature | None = None,
        teacher_language: Literal["en", "zh"] | None = None,
        chunk_size: Rows = 256,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        if feature_weight + similarity_weight == 0:
            raise UserError("must be above 0 where similarity_weight is 0", key="feature_weight", value=feature_weight)
        self.teacher_name, self.teacher_weights = teacher, teacher_weights
        self._weights = (float(feature_weight), float(similarity_weight))
        self._temperature = temperature
        self._language = None if teacher_language is None else LANGUAGES.index(teacher_language)
        self._chunk_size = chunk_size
        self._teacher: tuple[M2Encoder, ...] = ()  # a tuple hides it from nn.Module
        self._reader: str | None = None  # a key of `readers`; None: it reads the model's ids
        self.projection: nn.Linear | None = None

    def prepare(self, resources: Resources) -> None:
        """Load the teacher, onto the CPU until the first step."""
        self.teach_with(*resources.load_encoder("teacher", self.teacher_name, self.teacher_weights))

    def teach_with(self, teacher: M2Encoder, tokenizer: SentencePieceTokenizer | None = None) -> None:
        """Take a teacher and freeze it; before `build`. It reads the model's ids, or captions by its own tokenizer."""
        if tokenizer is not None:
            self._reader = f"ids_{tokenizer.digest[:12]}_{tokenizer.context_length}"
            self.readers = {self._reader: tokenizer}
        teacher.eval()
        teacher.requires_grad_(False)
        self._teacher = (teacher,)

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the projection, if one is needed."""
        width = self._get_teacher().config.feature_dim
        if self._weights[0] and width != shape.feature_dim:
            self.projection = nn.Linear(shape.feature_dim, width, bias=False)
            nn.init.normal_(self.projection.weight, std=_INIT_STD)

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows; similarities are those with all rows of the group.

        Raises:
            UserError: without a teacher, a batch or the ids that the teacher reads, or if an image has no caption in
                the teacher's language.
        """
        if inputs.batch is None:
            raise UserError("a teacher reads images and captions; ObjectiveInputs needs the batch")
        taught = self._teach(inputs.batch)
        terms = (self._compare_features, self._compare_similarities)
        with torch.autocast(inputs.image_features.device.type, enabled=False):
            parts = [
                (weight, term(inputs, taught)) for weight, term in zip(self._weights, terms, strict=True) if weight
            ]
            nothing = inputs.logit_scale * 0  # the feature term has no scale, and DDP hangs without its gradient
        loss = torch.stack([weight * part.loss for weight, part in parts]).sum() + nothing
        per_sample = torch.stack([weight * part.per_sample for weight, part in parts]).sum(dim=0)
        return ObjectiveOutput(loss=loss, per_sample=per_sample)

    def _compare_features(self, inputs: ObjectiveInputs, taught: _Taught) -> _Term:
        """1 - cosine of each local image and text."""

        def compare(features: Tensor, target: Tensor) -> Tensor:
            dtype = torch.promote_types(features.dtype, target.dtype)
            wide = features.to(dtype)
            if self.projection is not None:
                wide = functional.linear(wide, self.projection.weight.to(dtype))
            return 1 - functional.cosine_similarity(wide, target.to(dtype), dim=1)

        by_image = compare(inputs.image_features, taught.images)
        by_text = compare(inputs.text_features, taught.texts)
        rows = by_image.repeat_interleave(len(by_text) // len(by_image)) + by_text
        return _Term((by_image.mean() + by_text.mean()) / 2, rows.detach() / 2)

    def _compare_similarities(self, inputs: ObjectiveInputs, taught: _Taught) -> _Term:
        """Kullback-Leibler divergence of each local image's and text's softmax over the group."""
        group = inputs.group
        captions = len(inputs.text_features) // len(inputs.image_features)
        hard = contrastive_losses(
            inputs.image_features,
            inputs.text_features,
            inputs.logit_scale,
            group=group,
            captions_per_image=captions,
            equal_rows=True,
        )
        loss = hard.loss.mean()
        images, texts = inputs.image_features.to(loss.dtype), inputs.text_features.to(loss.dtype)
        seen, read = taught.images.to(loss.dtype), taught.texts.to(loss.dtype)
        of_images = _Shares(seen, read, taught.scale, group, keys_per_query=captions)
        of_texts = _Shares(read, seen, taught.scale, group, queries_per_key=captions)
        by_image = mean_alignment(images, texts, gather_constant(texts, group), of_images, group=group)
        by_text = mean_alignment(texts, images, gather_constant(images, group), of_texts, group=group)
        scale = inputs.logit_scale.to(loss.dtype).exp()
        known = of_images.information.mean() + of_texts.information.mean()
        rows = scale * (images * by_image.mixed).sum(dim=1) + of_images.information
        rows = rows.repeat_interleave(captions) + scale * (texts * by_text.mixed).sum(dim=1) + of_texts.information
        return _Term(
            loss + (scale * (by_image.mean + by_text.mean) + known) / 2, hard.per_sample.squeeze(1) + rows.detach() / 2
        )

    @torch.no_grad()
    def _teach(self, batch: ImageTextBatch) -> _Taught:
        teacher = self._get_teacher()
        teacher.to(batch.images.device)
        size = teacher.config.image_size
        images = [
            teacher.finish_image(
                teacher.encode_image_backbone(part if part.shape[-1] == size else _resize(part, size))
            ).features
            for part in batch.images.split(self._chunk_size)
        ]
        ids, mask = self._find_ids(batch)
        if self._language is not None:
            rows = _captions_in(self._language, batch)
            ids, mask = ids[rows], mask[rows]
        texts = [
            teacher.encode_text(TextTokens(*part))
            for part in zip(ids.split(self._chunk_size), mask.split(self._chunk_size), strict=True)
        ]
        dtype = torch.promote_types(images[0].dtype, torch.float32)
        scale = teacher.logit_scale.to(dtype).exp()
        if self._temperature is not None:
            scale = torch.full_like(scale, 1 / self._temperature)
        return _Taught(torch.cat(images).to(dtype), torch.cat(texts).to(dtype), scale)

    def _find_ids(self, batch: ImageTextBatch) -> TextTokens:
        """The captions as the teacher reads them."""
        if self._reader is None:
            return batch.text
        if self._reader not in batch.extra:
            raise UserError(f"the teacher has a tokenizer of its own; the batch lacks its ids, extra[{self._reader!r}]")
        ids, mask = batch.extra[self._reader].unbind(dim=1)
        return TextTokens(ids, mask.bool())

    def _get_teacher(self) -> M2Encoder:
        if not self._teacher:
            raise NotGivenError(
                f"distillation has no teacher yet; load {self.teacher_name!r} and call teach_with(model)"
            )
        return self._teacher[0]


class _Shares:
    """P - T of some local rows: equal shares on the row's partners, less the softmax of the teacher's similarities.

    Args:
        queries: the teacher's features of the local rows, (n, E').
        keys: of the other side's local rows.
        scale: s', ().
        group: ranks.
        keys_per_query: how many partners each query has.
        queries_per_key: how many queries each key is the partner of.

    Attributes:
        information: sum_j T_ij log T_ij of each local row, (n,); filled by the calls.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        group: dist.ProcessGroup | None,
        *,
        keys_per_query: int = 1,
        queries_per_key: int = 1,
    ) -> None:
        self._queries, self._keys, self._scale = queries, gather_constant(keys, group), scale
        self._first = 0 if group is None else dist.get_rank(group) * len(keys)
        self._keys_per_query, self._queries_per_key = keys_per_query, queries_per_key
        self.information = torch.zeros(len(queries), dtype=queries.dtype, device=queries.device)

    def __call__(self, some: slice) -> Tensor:
        logs = torch.log_softmax(torch.mm(self._queries[some] * self._scale, self._keys.t()), dim=1)
        shares = logs.exp()
        self.information[some] = torch.mul(shares, logs, out=logs).sum(dim=1)
        shares.neg_()
        rows = torch.arange(some.start, some.stop, device=shares.device)
        partners = torch.arange(self._keys_per_query, device=shares.device)
        first = self._first + rows // self._queries_per_key * self._keys_per_query
        shares[(rows - some.start)[:, None], first[:, None] + partners] += 1 / self._keys_per_query
        return shares


def _captions_in(language: int, batch: ImageTextBatch) -> Tensor:
    """For every caption, the row of its image's first caption in a language, (k * B,) int64."""
    matches = (batch.language == language).unflatten(0, (-1, batch.captions_per_image))
    if not bool(matches.any(dim=1).all()):
        missing = int((~matches.any(dim=1)).sum())
        raise UserError(
            f"teacher_language={LANGUAGES[language]}: {missing} of {len(matches)} images have no caption in it; "
            "use data.captions.every_language=true, or null"
        )
    first = matches.long().argmax(dim=1)
    rows = torch.arange(len(matches), device=first.device) * batch.captions_per_image + first
    return rows.repeat_interleave(batch.captions_per_image)


def _resize(images: Tensor, size: int) -> Tensor:
    """Images of another side, (B, 3, S', S'), floating in 0..1; bilinear with antialiasing."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
