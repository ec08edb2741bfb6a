"""MIEB, the image benchmarks of mteb 2, for every model that `open_model` opens.

    import mteb
    from m2_encoder.evaluation.doors.mieb import MiebEncoder

    mteb.evaluate(MiebEncoder("exports/emoji"), mteb.get_tasks(["CIFAR10ZeroShot"]))

Letters: B batch · n inputs · E feature dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.encode import FeatureModel, encode_images, encode_texts
from m2_encoder.evaluation.models.base import EvaluatedModel, import_peer
from m2_encoder.evaluation.models.opening import open_model

_LANGUAGES: Final = ("zho-Hans", "eng-Latn")


class MiebEncoder:
    """What mteb calls an encoder: `encode`, the similarities, and a description of the model.

    Args:
        model: as `open_model` takes it, or what it gives.
        device: of a model that is opened here.

    Raises:
        UserError: as `open_model`; without the package; for files of features, which cannot encode mteb's pictures.
    """

    def __init__(self, model: EvaluatedModel | str | os.PathLike[str], *, device: str | torch.device = "cpu") -> None:
        opened = model if isinstance(model, EvaluatedModel) else open_model(model, device=device)
        if opened.model is None:
            raise UserError(f"{opened.name}: are features, not a model; mteb has to encode its own pictures")
        self.opened, self.model = opened, opened.model
        self.mteb_model_meta = _describe(opened)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_options: Any) -> Tensor:
        """Features of batches with a column `image` of PIL images, `text` of strings, or both.

        Of both, the feature is the sum of the two, made unit again, as mteb's models of this kind do it.

        Args:
            inputs: batches, as mteb makes them.
            _options: of mteb; the features of a model are the same for every task.

        Returns:
            L2-normalised fp32 on the CPU, (n, E).

        Raises:
            UserError: for a picture that cannot be used, texts for a model without a text tower, and inputs with
                neither column.
        """
        return torch.cat([self._encode_batch(self.model, batch) for batch in inputs])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all with all, (n, E) and (m, E) to (n, m)."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of each with its own, (n, E) and (n, E) to (n,)."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)

    def _encode_batch(self, model: FeatureModel, batch: Mapping[str, Any]) -> Tensor:
        found = []
        if "text" in batch:
            self.opened.require_texts()
            found.append(self._texts(model, list(batch["text"])))
        if "image" in batch:
            pixels = torch.stack([self.opened.preprocess(image) for image in batch["image"]])
            found.append(encode_images(model, pixels, batch_size=len(pixels)))
        if not found:
            raise UserError(f"a task of mteb has the columns {', '.join(batch)}; models here take text and image")
        return found[0] if len(found) == 1 else normalize(found[0] + found[1], dim=-1)

    def _texts(self, model: FeatureModel, texts: Sequence[str]) -> Tensor:
        return encode_texts(model, texts, self.opened.tokenizer, batch_size=len(texts))


def _unit(embeddings: Any) -> Tensor:
    return normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=-1)


def _describe(opened: EvaluatedModel) -> Any:
    """The model as mteb's tables have it; a result is kept under the name and the digest of the weights."""
    meta = import_peer("mteb.models.model_meta", "evaluations by mteb", extra="doors")
    facts = opened.facts
    own = facts.kind == "m2"
    return meta.ModelMeta(
        loader=None,
        name=f"m2-encoder/{opened.name}",
        revision=opened.fingerprint,
        release_date=None,
        languages=list(_LANGUAGES) if own else None,
        n_parameters=facts.parameters,
        memory_usage_mb=None,
        max_tokens=facts.context_length or None,
        embed_dim=facts.embed_dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=meta.ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image"] if opened.no_texts else ["image", "text"],
    )
