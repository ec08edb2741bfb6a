"""Somebody else's model of two towers, in the place of an `M2Encoder`: any torch module that gives features.

It has `encode_image(images)` and `encode_text(ids)`, or `encode_text(ids, mask)`, which return features, (B, E); a
`logit_scale`, the log of the inverse temperature as in CLIP (arXiv:2103.00020), is used where it has one.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from m2_encoder.errors import UserError, in_one_line
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.types import TextTokens

_INITIAL_TEMPERATURE: Final = 0.07  # CLIP's
_MAX_LOG_SCALE: Final = math.log(1000)  # what is above is no logarithm
_MASK_NAMES: Final = ("mask", "attention_mask", "text_mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """What is known of such a model.

    Attributes:
        name: of its class or function.
        image_size: side of the images that it gets, pixels.
        context_length: most tokens of a text.
        arguments: of its constructor.
        pixel_mean: taken from pixels in 0..1, by channel; None for 0.
        pixel_std: divides them then; None for 1.
        feature_dim: E; 0 before it is built.
    """

    name: str
    image_size: int
    context_length: int
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    feature_dim: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "arguments": dict(self.arguments)}


class TwoTowers(nn.Module):
    """Such a model with the methods of `M2Encoder` that features need; parameters are below `towers`.

    It is built and tried on two images and texts: parameters without a gradient of the features, such as a head for
    something else, are frozen, as DDP would wait for them.

    Args:
        build: makes the module.
        config: of it; its `feature_dim` is found out.
        text: two texts as its tokenizer makes them.
        pad_id: fills ids up to `context_length`, where `encode_text` takes no mask; None leaves them as they come.

    Attributes:
        frozen: names of the parameters without a gradient.

    Raises:
        UserError: with what the module lacks, or gives in place of features.
    """

    _pixel_mean: Tensor  # (1, 3, 1, 1)
    _pixel_std: Tensor  # (1, 3, 1, 1)

    def __init__(
        self, build: Callable[[], nn.Module], config: TowersConfig, *, text: TextTokens, pad_id: int | None = None
    ) -> None:
        super().__init__()
        self._build, self._pad_id = build, pad_id
        self.config = config
        self.towers = build()
        self._check_methods()
        self._mask_name = _find_mask(self.towers.encode_text)
        for name, values, default in (("mean", config.pixel_mean, 0.0), ("std", config.pixel_std, 1.0)):
            pixels = torch.tensor(values or [default] * 3).view(1, 3, 1, 1)
            self.register_buffer(f"_pixel_{name}", pixels, persistent=False)
        if not isinstance(getattr(self.towers, "logit_scale", None), Tensor):
            self.own_scale = nn.Parameter(torch.tensor(-math.log(_INITIAL_TEMPERATURE)))
        self._check_scale()
        width, self.frozen = self._try(text)
        self.config = dataclasses.replace(config, feature_dim=width)

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ()."""
        scale = self.towers.logit_scale if "own_scale" not in self._parameters else self.own_scale
        assert isinstance(scale, Tensor)
        return scale if scale.ndim == 0 else scale.reshape(())

    def logit_scales(self) -> tuple[Tensor, ...]:
        """Logarithms of the inverse temperatures, one for each pair of features."""
        return (self.logit_scale,)

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised features of images, (B, E), fp32; `images` are (B, 3, S, S), in 0..1, or uint8."""
        pixels = images if images.is_floating_point() else images.float() / 255
        return _normalize(self.towers.encode_image((pixels - self._pixel_mean) / self._pixel_std))  # type: ignore[operator]

    def encode_text(self, text: TextTokens) -> Tensor:
        """L2-normalised features of texts, (B, E), fp32."""
        encode: Any = self.towers.encode_text
        if self._mask_name is not None:
            return _normalize(encode(text.ids, **{self._mask_name: text.mask}))
        ids, missing = text.ids, self.config.context_length - text.ids.shape[1]
        if self._pad_id is not None and missing > 0:
            ids = functional.pad(ids, (0, missing), value=self._pad_id)
        return _normalize(encode(ids))

    def similarity(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled cosine similarities, (B_image, B_text): features times features times exp(logit_scale)."""
        return self.logit_scale.exp() * image_features @ text_features.t()

    def freeze_parts(self, names: Iterable[str]) -> int:
        """How many scalars are frozen; `names` are of `M2Encoder`'s parts, of which it has none."""
        return sum(p.numel() for p in self.parameters() if not p.requires_grad)

    def part_parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        """None: it has no parts."""
        return []

    def build_again(self) -> TwoTowers:
        """Another one with the same parameters' names and shapes, and other values."""
        again = TwoTowers.__new__(TwoTowers)
        nn.Module.__init__(again)
        state = {name: value for name, value in vars(self).items() if name not in vars(again)}
        again.__dict__.update(state)
        again.towers = self._build()
        for name in ("_pixel_mean", "_pixel_std"):
            again.register_buffer(name, getattr(self, name).cpu(), persistent=False)
        if "own_scale" in self._parameters:
            again.own_scale = nn.Parameter(torch.zeros(()))
        for name, parameter in again.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in self.frozen)
        return again

    def batch_norm(self) -> str | None:
        """Name of the first layer that mixes the rows of a batch in training; None if there is none."""
        return next((name for name, part in self.towers.named_modules() if isinstance(part, _BatchNorm)), None)

    def _check_methods(self) -> None:
        if not isinstance(self.towers, nn.Module):
            raise UserError(f"makes {type(self.towers).__name__}, which is no torch.nn.Module", key="_target_")
        for name in ("encode_image", "encode_text"):
            if not callable(getattr(self.towers, name, None)):
                rule = f"has no method {name}; give it encode_image(images) and encode_text(ids), or a module around it"
                raise UserError(rule, key="_target_", value=self.config.name)

    def _encode_two(self, images: Tensor, text: TextTokens) -> dict[str, Tensor]:
        found = {}
        calls = {"encode_image": (self.encode_image, images), "encode_text": (self.encode_text, text)}
        for name, (encode, given) in calls.items():
            try:
                found[name] = encode(given)  # type: ignore[operator]
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{name} fails: {in_one_line(error)}", key="_target_", value=self.config.name
                ) from error
            if not found[name].isfinite().all():
                raise UserError(f"{name} gives features that are not finite", key="_target_", value=self.config.name)
        return found

    def _check_scale(self) -> None:
        scale = getattr(self.towers, "logit_scale", None)
        if not isinstance(scale, Tensor):
            return
        if scale.numel() != 1:
            raise UserError(f"its logit_scale has {scale.numel()} values; it must be one number", key="_target_")
        if not abs(value := float(scale.detach())) <= _MAX_LOG_SCALE:
            rule = f"its logit_scale is {value:.6g}, which is exponentiated again to {math.exp(min(value, 700)):.3g}"
            fix = f"keep its logarithm, as CLIP does: {math.log(value):.4g}" if value > 0 else "keep a finite logarithm"
            raise UserError(f"{rule}; {fix}", key="_target_", value=self.config.name)

    def _try(self, text: TextTokens) -> tuple[int, tuple[str, ...]]:
        """Width of the features, and names of parameters that get no gradient of them; they are frozen."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        images = torch.rand((2, 3, self.config.image_size, self.config.image_size), generator=torch.Generator())
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            features = self._encode_two(images, text)
            shapes = {name: tuple(value.shape) for name, value in features.items()}
            wrong = next((name for name, shape in shapes.items() if len(shape) != 2 or shape[0] != 2), None)
            if wrong is not None or len(set(shapes.values())) > 1:
                said = ", ".join(f"{name} gives {shape} for two" for name, shape in shapes.items())
                raise UserError(f"{said}; both must give (2, E)", key="_target_", value=self.config.name)
            total = torch.stack([value.square().flatten().dot(value.flatten()) for value in features.values()]).sum()
            total = total + self.logit_scale
            if total.requires_grad:
                total.backward()
        frozen = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
                frozen.append(name)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
        return shapes["encode_image"][1], tuple(frozen)


Encoder: TypeAlias = M2Encoder | TwoTowers
"""What gives features."""


def _normalize(features: Any) -> Tensor:
    if not isinstance(features, Tensor):
        rule = f"an encoder gives {type(features).__name__}; it must give a tensor of features, (B, E)"
        raise UserError(rule, key="_target_")
    return functional.normalize(features.float(), dim=-1)


def _find_mask(encode_text: Any) -> str | None:
    """The argument of `encode_text` that takes the mask, if it has one."""
    try:
        parameters = inspect.signature(encode_text).parameters
    except (TypeError, ValueError):  # of a method that is compiled
        return None
    return next((name for name in _MASK_NAMES if name in parameters), None)
