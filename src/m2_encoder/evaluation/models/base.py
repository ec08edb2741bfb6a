"""A model as evaluation sees it, whoever made it: towers, what goes into them, and a number for all of it.

Letters: B batch · E feature dim · S image side in pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from m2_encoder.checkpoints.digests import digest_tensors
from m2_encoder.data.images.transforms import ImageSource, open_image
from m2_encoder.errors import ImageError, UserError
from m2_encoder.evaluation.encode import FeatureModel, Tokenize
from m2_encoder.evaluation.models.feature_table import FeatureTable
from m2_encoder.pictures import PicturePolicy


class ModelFacts(NamedTuple):
    """What tables and records say of a model."""

    kind: str  # what opened it: m2, onnx, open_clip, transformers, sentence-transformers, features
    parameters: int  # scalars of all towers; 0 for files of features, and of graphs
    weight_bytes: int  # of the files of weights; of the tensors, where they come from a hub's cache
    embed_dim: int  # E
    image_size: int  # S, the larger side; 0 for files of features, and for models that take any size
    context_length: int  # most tokens of a text; 0 without a text tower
    preprocessing: Mapping[str, Any]  # what pictures go through, as plain values
    tokenizing: Mapping[str, Any]  # what texts go through, as plain values


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model that is ready to be measured.

    Attributes:
        name: in tables and records.
        model: `encode_image` of stacked results of `preprocess`, and `encode_text` of what `tokenizer` makes: both
            give L2-normalised fp32, (B, E). A module in evaluation mode; None for files of features.
        preprocess: a picture's file name, content or PIL image to a tensor, usually (3, S, S); raises `ImageError`.
        tokenizer: texts to ids and mask; ids of a model that pads to a fixed length are whole, with a mask of ones.
        facts: for tables and records.
        fingerprint: SHA-256 of weights, architecture, preprocessing and tokenizer; the same in every process.
        table: features that were made elsewhere, in the place of a model.
        no_texts: why it has no features of texts; empty if it has.
        heldout_style: drawing style of the built-in set that its training left out; empty if it does not say.
    """

    name: str
    model: FeatureModel | None
    preprocess: Callable[[ImageSource], Tensor]
    tokenizer: Tokenize
    facts: ModelFacts
    fingerprint: str
    table: FeatureTable | None = None
    no_texts: str = ""
    heldout_style: str = ""

    def require_texts(self) -> None:
        """Refuse to go on without a text tower.

        Raises:
            UserError: if it has none.
        """
        if self.no_texts:
            raise UserError(f"{self.name}: {self.no_texts}; choose tasks that need pictures alone")


class PeerTransform:
    """A peer's transform behind the decoder of this project.

    Args:
        transform: a PIL image, RGB, to a tensor.
        pictures: what the pixels of a file are.
    """

    def __init__(self, transform: Callable[[Any], Tensor], pictures: PicturePolicy) -> None:
        self._transform, self.pictures = transform, pictures

    def __call__(self, source: ImageSource) -> Tensor:
        """What the model gets of one picture.

        Raises:
            ImageError: if the source cannot be opened, or the transform does not take it.
        """
        image = open_image(source, pictures=self.pictures)
        try:
            return self._transform(image)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:  # such as of a picture one pixel high
            said = " ".join(str(error).split())[:200]
            raise ImageError(
                f"of {image.width} x {image.height} pixels, which the model's transform refuses: {said}"
            ) from error


def import_peer(module: str, what: str, *, extra: str = "peers") -> Any:
    """A third party's module that only some users need.

    Args:
        module: its name for `import`.
        what: that needs it, in words.
        extra: of this package, that installs it.

    Raises:
        UserError: if it is missing or broken.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} need the package {package}; install it with pip install 'm2-encoder[{extra}]'")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{what} need the package {package}, which cannot be imported here: {error}") from error


def refuse_texts(_texts: object) -> Any:
    """In place of the tokenizer of a model without a text tower."""
    raise UserError("this model has no text tower")


def make_fingerprint(model: nn.Module, facts: ModelFacts, *, architecture: Mapping[str, Any], tokenizer: str) -> str:
    """`EvaluatedModel.fingerprint`.

    Args:
        model: on the CPU.
        facts: of which preprocessing and tokenizing count.
        architecture: what computes features of the weights, as plain values.
        tokenizer: digest of its content.
    """
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    return digest_values(
        {
            "weights": digest_tensors(state),
            "architecture": architecture,
            "preprocessing": facts.preprocessing,
            "tokenizing": facts.tokenizing,
            "tokenizer": tokenizer,
        }
    )


def digest_values(values: object) -> str:
    """SHA-256 of plain values, whatever the order of keys, as 64 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


_PROBES = (
    "a photo of a cat", "一只猫的照片", "Ａ　ﬁ é e\u0301 ß İ  x\t\n", "the end. " * 120, "", "😀 繁體中文 русский ไทย",
)  # fmt: skip


def digest_tokenizer(tokenize: Tokenize, *, content: object) -> str:
    """SHA-256 of a tokenizer: what it holds, and the ids that it makes of a few odd texts.

    Args:
        tokenize: the tokenizer.
        content: its vocabulary and rules, as plain values.
    """
    tokens = [tokenize([text]) for text in _PROBES]
    ids = [[made.ids[0].tolist(), made.mask[0].tolist()] for made in tokens]
    return digest_values([content, ids])


def digest_hf_tokenizer(tokenizer: Any) -> object:
    """Vocabulary and rules of a tokenizer of transformers, without what calls change in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def drop_keys(values: Any, keys: Iterable[str]) -> Any:
    """Plain values without some keys, at any depth."""
    names = frozenset(keys)
    if isinstance(values, Mapping):
        return {str(key): drop_keys(value, names) for key, value in values.items() if key not in names}
    if isinstance(values, list | tuple):
        return [drop_keys(value, names) for value in values]
    return values if isinstance(values, str | int | float | bool | None) else str(values)


def count_parameters(model: nn.Module) -> int:
    """Scalars, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a file of its weights holds."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
