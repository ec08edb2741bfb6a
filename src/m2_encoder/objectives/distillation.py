"""Distillation: learn from a frozen teacher, row by row and by how it compares the rows of the group.

    features    1/2 [mean_i (1 - cos(W x_i, u_i)) + mean_j (1 - cos(W y_j, v_j))]
    similarity  1/2 [mean_i KL(softmax_j s' u_i . v_j || softmax_j s x_i . y_j) + the same from texts to images]
    loss        feature_weight * features + similarity_weight * similarity

x, y: the student's features and s = exp(logit_scale); u, v: the teacher's and s' (or 1 / temperature). W: one
projection for both modalities, so that the student keeps one space, where the widths differ; otherwise it is left out.
On unit vectors the squared distance is twice 1 - cos.

The teacher reads the same batch: ids of the same tokenizer, images resized to its size where that differs. It is no
sub-module: not in checkpoints, not in the optimizer, not DDP's or FSDP's, whole on every rank. It runs once per step,
without a graph, on `chunk_size` rows at a time.

Letters: n local images · k captions per image · g ranks of the group · E, E' feature dims of student and teacher.

Cost per rank and step: the teacher's forward; sent (g - 1)(k + 1) n (2 E + E') elements, E of them in backward; with a
tile of rows at a time no (n x k M) matrix exists.

Reference: DC-CLIP (arXiv:2404.11249), DCLIP (arXiv:2505.21549) and AltCLIP (arXiv:2211.06679) for features of a frozen
teacher, AltCLIP also for reading one language (`teacher_language`) and teaching all; CLIP-KD (arXiv:2307.12732) for
similarities over a batch. R2D2's and ALBEF's momentum teacher, a running mean of the student, is not this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import ModelShape, Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.row_tiles import GroupRows, gather_constant, gather_group, map_rows
from m2_encoder.types import LANGUAGES, ImageTextBatch, TextTokens

_INIT_STD = 0.02


class TeacherShape(Protocol):
    """What is asked of a teacher's configuration; `M2EncoderConfig` has it."""

    @property
    def feature_dim(self) -> int:
        """Width E' of the features."""
        ...

    @property
    def image_size(self) -> int:
        """Side S, pixels."""
        ...


class Teacher(Protocol):
    """What is asked of a teacher; `M2Encoder` has it."""

    logit_scale: nn.Parameter

    @property
    def config(self) -> TeacherShape:
        """Its shape."""
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised features, (B, E')."""
        ...

    def encode_text(self, text: TextTokens) -> Tensor:
        """L2-normalised features, (B, E')."""
        ...

    def to(self, device: Any) -> Any:
        """Move it."""
        ...

    def eval(self) -> Any:
        """Switch dropout off."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze it."""
        ...


class _Taught(NamedTuple):
    """The teacher's features of this rank's rows, (n, E') and (k * n, E'), and its scale, ()."""

    images: Tensor
    texts: Tensor
    scale: Tensor


class Distillation(Objective):
    """Terms of a frozen teacher over the ranks of the contrastive group, which must hold equally many rows.

    Args:
        teacher: whom to load: a folder written by `m2-export`, or a name of `list_models` with `teacher_weights`.
            Whoever builds the objective loads it and calls `teach_with`; `m2-train` does.
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        teacher_weights: a checkpoint for a teacher that is named.
        feature_weight: of the feature term; 0 leaves it out.
        similarity_weight: of the similarity term; 0 leaves it out.
        temperature: of the teacher's similarities; None for its own scale.
        teacher_language: the teacher reads the image's caption in this language in place of every caption of it, so
            that the others learn to say the same; None: it reads each caption.
        chunk_size: rows that the teacher encodes at a time.

    Raises:
        UserError: for weights that are negative or both 0, or other numbers that make no sense.
    """

    def __init__(
        self,
        *,
        teacher: str,
        weight: float = 1.0,
        schedule: Mapping[int, float] | None = None,
        teacher_weights: str | None = None,
        feature_weight: float = 1.0,
        similarity_weight: float = 1.0,
        temperature: float | None = None,
        teacher_language: Literal["en", "zh"] | None = None,
        chunk_size: int = 256,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        if not (feature_weight >= 0 and similarity_weight >= 0 and feature_weight + similarity_weight > 0):
            raise UserError(
                f"feature_weight={feature_weight!r} and similarity_weight={similarity_weight!r}: "
                "must be 0 or more, and not both 0"
            )
        if temperature is not None and not temperature > 0:
            raise UserError(f"temperature={temperature!r} must be above 0, or null for the teacher's own")
        if teacher_language is not None and teacher_language not in LANGUAGES:
            raise UserError(f"teacher_language={teacher_language!r} must be null or one of {', '.join(LANGUAGES)}")
        if chunk_size < 1:
            raise UserError(f"chunk_size={chunk_size!r} must be 1 or more")
        self.teacher_name, self.teacher_weights = teacher, teacher_weights
        self._weights = (float(feature_weight), float(similarity_weight))
        self._temperature = temperature
        self._language = None if teacher_language is None else LANGUAGES.index(teacher_language)
        self._chunk_size = chunk_size
        # In a tuple, where torch looks for no sub-module.
        self._teacher: tuple[Teacher, ...] = ()
        self.projection: nn.Linear | None = None

    def teach_with(self, teacher: Teacher) -> None:
        """Take a teacher and freeze it; before `build`."""
        teacher.eval()
        teacher.requires_grad_(False)
        self._teacher = (teacher,)

    def build(self, shape: ModelShape) -> None:
        """Make the projection, if one is needed.

        Raises:
            UserError: without a teacher.
        """
        width = self._get_teacher().config.feature_dim
        if self._weights[0] and width != shape.feature_dim:
            self.projection = nn.Linear(shape.feature_dim, width, bias=False)
            nn.init.normal_(self.projection.weight, std=_INIT_STD)

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Loss of the local rows; similarities are those with all rows of the group.

        Raises:
            UserError: without a teacher or a batch, or where an image has no caption that the teacher shall read.
        """
        if inputs.batch is None:
            raise UserError("a teacher looks at images and captions themselves; ObjectiveInputs needs the batch")
        taught = self._teach(inputs.batch)
        captions = len(inputs.text_features) // len(inputs.image_features)
        by_image, by_text = taught.images.new_zeros(len(taught.images)), taught.texts.new_zeros(len(taught.texts))
        with torch.autocast(inputs.image_features.device.type, enabled=False):
            for weight, term in zip(self._weights, (self._compare_features, self._compare_similarities), strict=True):
                if weight:
                    of_images, of_texts = term(inputs, taught)
                    by_image, by_text = by_image + weight * of_images, by_text + weight * of_texts
            nothing = inputs.logit_scale * 0  # features alone have no scale, but DDP waits for its gradient
        per_sample = (by_image.repeat_interleave(captions) + by_text).detach() / 2
        return ObjectiveOutput(loss=(by_image.mean() + by_text.mean()) / 2 + nothing, per_sample=per_sample)

    def _compare_features(self, inputs: ObjectiveInputs, taught: _Taught) -> tuple[Tensor, Tensor]:
        """1 - cosine of each local image and text."""

        def compare(features: Tensor, target: Tensor) -> Tensor:
            dtype = torch.promote_types(features.dtype, target.dtype)
            wide = features.to(dtype)
            if self.projection is not None:
                wide = functional.linear(wide, self.projection.weight.to(dtype))
            return 1 - functional.cosine_similarity(wide, target.to(dtype), dim=1)

        return compare(inputs.image_features, taught.images), compare(inputs.text_features, taught.texts)

    def _compare_similarities(self, inputs: ObjectiveInputs, taught: _Taught) -> tuple[Tensor, Tensor]:
        """Kullback-Leibler divergence of each local image's and text's softmax over the group."""
        rows = gather_group(inputs)
        all_images, all_texts = (gather_constant(side, inputs.group) for side in (taught.images, taught.texts))
        scale = inputs.logit_scale.to(rows.images.dtype).exp()
        return (
            _divergences(
                rows, (rows.images, rows.texts), (all_images, all_texts), scale, taught.scale, rows.own_images
            ),
            _divergences(rows, (rows.texts, rows.images), (all_texts, all_images), scale, taught.scale, rows.own_texts),
        )

    @torch.no_grad()
    def _teach(self, batch: ImageTextBatch) -> _Taught:
        teacher = self._get_teacher()
        teacher.to(batch.images.device)
        size = teacher.config.image_size
        images = [
            teacher.encode_image(part if part.shape[-1] == size else _resize(part, size))
            for part in batch.images.split(self._chunk_size)
        ]
        ids, mask = batch.text.ids, batch.text.mask
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

    def _get_teacher(self) -> Teacher:
        if not self._teacher:
            raise UserError(f"distillation has no teacher yet; load {self.teacher_name!r} and call teach_with(model)")
        return self._teacher[0]


def _divergences(
    rows: GroupRows,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    scale: Tensor,
    teacher_scale: Tensor,
    own: slice,
) -> Tensor:
    """KL(teacher || student) of the softmaxes of local queries over all keys.

    Args:
        rows: of the group.
        student: queries and keys, all of the group, with gradients.
        teacher: the same, constant.
        scale: s, ().
        teacher_scale: s', ().
        own: the local queries.
    """

    def of_some(some: slice) -> Tensor:
        target = torch.log_softmax(teacher_scale * (teacher[0][own][some] @ teacher[1].t()), dim=1)
        found = torch.log_softmax(scale * (student[0][own][some] @ student[1].t()), dim=1)
        return (target.exp() * (target - found)).sum(dim=1)

    return map_rows(of_some, own.stop - own.start, len(student[1]), element_size=rows.images.element_size())


def _captions_in(language: int, batch: ImageTextBatch) -> Tensor:
    """For every caption the row of its image's first caption in a language, (k * B,) int64."""
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
