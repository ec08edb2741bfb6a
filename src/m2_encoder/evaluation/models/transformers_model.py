"""Models of transformers with `get_image_features` and `get_text_features`, such as CLIP, SigLIP and Chinese-CLIP.

Version 4 returns features as a tensor, version 5 an object whose `pooler_output` they are; both are read.

Letters: B batch · T tokens · E feature dim · S image side in pixels · L patches of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.models.base import (
    EvaluatedModel,
    ModelFacts,
    PeerTransform,
    count_parameters,
    digest_hf_tokenizer,
    digest_tokenizer,
    drop_keys,
    import_peer,
    make_fingerprint,
    refuse_texts,
    tensor_bytes,
)
from m2_encoder.pictures import PicturePolicy
from m2_encoder.types import TextTokens


class _Family(NamedTuple):
    """How a family reads texts, where its folders do not say it."""

    context_length: int = 0  # most tokens; 0: as the folder says
    is_fixed: bool = False  # whether all texts have that length, and padding is read as text
    lower: bool = False  # whether texts are lower-cased
    # Patches of a picture, at most: the least that holds as many as it has at its own size. (): as the folder says.
    budgets: tuple[int, ...] = ()


# SigLIP (arXiv:2303.15343) and SigLIP 2 (arXiv:2502.14786) were trained on texts padded to 64 tokens, without a mask,
# in lower case; so was FG-CLIP 2 (arXiv:2510.10921), which gives large pictures more patches. Chinese-CLIP
# (arXiv:2211.01335) was trained on 52 tokens; its text tower has places for 512.
_FIXED: Final = _Family(is_fixed=True, lower=True)
_FAMILIES: Final[Mapping[str, _Family]] = {
    "siglip": _FIXED,
    "siglip2": _FIXED,
    "fgclip2": _FIXED._replace(context_length=64, budgets=(128, 256, 576, 784, 1024)),
    "chinese_clip": _Family(context_length=52),
}
_NO_LENGTH: Final = 10**6  # tokenizers without a length of their own say something above
_FLEXIBLE: Final = ("pixel_attention_mask", "spatial_shapes")  # of processors that keep the aspect ratio (NaFlex)
_ELSEWHERE: Final = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash")


class TransformersTowers(nn.Module):
    """Such a model with the methods of `M2Encoder` that features need.

    Args:
        towers: the model.
        takes_mask: whether the mask of texts goes to it.
    """

    def __init__(self, towers: nn.Module, *, takes_mask: bool) -> None:
        super().__init__()
        self.towers, self.takes_mask = towers, takes_mask

    def encode_image(self, images: Tensor) -> Tensor:
        """L2-normalised features, (B, E) fp32, of (B, 3, S, S) or of what `pack_flexible` makes, (B, L + 1, D)."""
        inputs = {"pixel_values": images} if images.ndim == 4 else _unpack_flexible(images)
        return _read_features(self.towers.get_image_features(**inputs), "get_image_features")  # type: ignore[operator]

    def encode_text(self, text: TextTokens) -> Tensor:
        """L2-normalised features of texts, (B, E) fp32."""
        mask = {"attention_mask": text.mask.long()} if self.takes_mask else {}
        towers: Any = self.towers
        if type(towers).__name__ == "ChineseCLIPModel":  # 4.57's own method asks for a pooler, which it does not have
            hidden = towers.text_model(input_ids=text.ids, **mask).last_hidden_state[:, 0]
            return _read_features(towers.text_projection(hidden), "text_projection")
        return _read_features(towers.get_text_features(input_ids=text.ids, **mask), "get_text_features")


class PaddedTokenizer:
    """Texts to ids and mask by a tokenizer of transformers.

    Args:
        tokenizer: of transformers.
        context_length: longer texts are cut, as the tokenizer does it.
        is_fixed: whether all texts get that many ids; the mask is all ones then, as padding is read, too.
        lower: whether texts are lower-cased first.
    """

    def __init__(self, tokenizer: Any, *, context_length: int, is_fixed: bool, lower: bool) -> None:
        self._tokenizer, self.context_length = tokenizer, context_length
        self._is_fixed, self._lower = is_fixed, lower
        tokenizer.padding_side = "right"
        self.gives_mask = "attention_mask" in tokenizer.model_input_names and not is_fixed

    def __call__(self, texts: Sequence[str]) -> TextTokens:
        """Ids and mask, (B, T) each."""
        made = self._tokenizer(
            [text.lower() for text in texts] if self._lower else list(texts),
            padding="max_length" if self._is_fixed or not self.gives_mask else True,
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        ids = made["input_ids"]
        return TextTokens(ids, made["attention_mask"].bool() if self.gives_mask else torch.ones_like(ids).bool())

    def describe(self) -> dict[str, Any]:
        """What it does, as plain values."""
        return {
            "tokenizer": type(self._tokenizer).__name__,
            "context_length": self.context_length,
            "padding": "max_length" if self._is_fixed else "longest",
            "lower": self._lower,
        }

    def content(self) -> object:
        """Vocabulary and rules, as plain values."""
        return digest_hf_tokenizer(self._tokenizer)


def open_transformers(
    place: str, *, name: str, pictures: PicturePolicy, trust: bool, kind: str = "transformers"
) -> EvaluatedModel:
    """A model of transformers, in fp32.

    Args:
        place: a folder, or a name on the hub.
        name: in tables.
        pictures: what the pixels of a file are.
        trust: whether code that comes with the model may run.
        kind: what its place was called.

    Raises:
        UserError: without the package, for a folder that is incomplete, weights that are not all there, code that is
            not trusted, and models that give no features of pictures.
    """
    library = import_peer("transformers", "models of transformers")
    is_here = Path(place).expanduser().is_dir()
    with _without_progress_bars(library) if is_here else nullcontext():
        towers: Any = _load_towers(library, place, trust)
    processor = _load_part(library.AutoImageProcessor, place, trust)
    config = towers.config
    budgets = _FAMILIES.get(config.model_type, _Family()).budgets
    tokenizer = _build_tokenizer(library, place, trust, config) if hasattr(towers, "get_text_features") else None
    model = TransformersTowers(towers, takes_mask=tokenizer is not None and tokenizer.gives_mask).eval()
    transform = PeerTransform(lambda image: _process(processor, image, place, budgets), pictures)
    pixels = transform(Image.new("RGB", (64, 48), (200, 100, 50)))
    facts = ModelFacts(
        kind=kind,
        parameters=count_parameters(towers),
        weight_bytes=_file_bytes(Path(place).expanduser()) or tensor_bytes(towers),
        embed_dim=_try(model, pixels, tokenizer, place),
        image_size=max(pixels.shape[1:]) if pixels.ndim == 3 else 0,
        context_length=0 if tokenizer is None else tokenizer.context_length,
        preprocessing={
            **drop_keys(processor.to_dict(), _ELSEWHERE),
            "processor": type(processor).__name__,
            "budgets": list(budgets),
            "pictures": pictures.to_dict(),
        },
        tokenizing={} if tokenizer is None else tokenizer.describe(),
    )
    content = "" if tokenizer is None else digest_tokenizer(tokenizer, content=tokenizer.content())
    return EvaluatedModel(
        name=name,
        model=model,
        preprocess=transform,
        tokenizer=refuse_texts if tokenizer is None else tokenizer,
        facts=facts,
        fingerprint=make_fingerprint(
            towers, facts, architecture=drop_keys(config.to_dict(), _ELSEWHERE), tokenizer=content
        ),
        no_texts="" if tokenizer else f"{type(towers).__name__} has no get_text_features, so no text tower",
    )


def _load_towers(library: Any, place: str, trust: bool) -> nn.Module:
    named = getattr(_load_part(library.AutoConfig, place, trust), "auto_map", None) or {"AutoModel": ""}
    loader = library.AutoModel if "AutoModel" in named else library.AutoModelForCausalLM  # as FG-CLIP 2 calls itself
    towers, info = _load_part(loader, place, trust, output_loading_info=True)
    if not hasattr(towers, "get_image_features"):
        raise UserError(
            f"hf:{place}: {type(towers).__name__} has no get_image_features; expected a model of pictures and texts, "
            "such as CLIP, SigLIP or Chinese-CLIP"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"hf:{place}: its weights lack {len(missing)} tensors: {name_some(missing)}; copy it again")
    return towers.float().requires_grad_(False).eval()


def _load_part(loader: Any, place: str, trust: bool, **options: Any) -> Any:
    try:
        # Without an answer to this question the library would ask it on the terminal.
        return loader.from_pretrained(str(Path(place).expanduser()), trust_remote_code=trust, **options)
    except Exception as error:  # the library and the hub raise dozens of unrelated types
        said = " ".join(str(error).split())
        if "trust_remote_code" in said and not trust:
            rule = "brings code of its own, which would run with your rights; read it, then allow it with trust=true"
            raise UserError(f"hf:{place}: {rule}") from error
        what = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}.get(loader.__name__, "model")
        raise UserError(f"hf:{place}: its {what} cannot be opened: {said[:300]}") from error


@contextmanager
def _without_progress_bars(library: Any) -> Iterator[None]:
    """The library draws one for every model; those of downloads stay."""
    bars = library.utils.logging
    was_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            bars.enable_progress_bar()


def _build_tokenizer(library: Any, place: str, trust: bool, config: Any) -> PaddedTokenizer:
    tokenizer = _load_part(library.AutoTokenizer, place, trust)
    family = _FAMILIES.get(config.model_type, _Family())
    text = getattr(config, "text_config", config)
    lengths = [family.context_length or None, getattr(text, "max_position_embeddings", None)]
    said = [length for length in (*lengths, tokenizer.model_max_length) if length and length < _NO_LENGTH]
    if not said:
        rule = "says nowhere how many tokens a text may have; write model_max_length into its tokenizer_config.json"
        raise UserError(f"hf:{place}: {rule}")
    lower = family.lower and getattr(tokenizer, "init_kwargs", {}).get("do_lower_case") is not False
    return PaddedTokenizer(tokenizer, context_length=min(said), is_fixed=family.is_fixed, lower=lower)


def _process(processor: Any, image: Image.Image, place: str, budgets: Sequence[int]) -> Tensor:
    options = {}
    if budgets:
        own = (image.width // processor.patch_size) * (image.height // processor.patch_size)
        options["max_num_patches"] = next((budget for budget in budgets if own <= budget), budgets[-1])
    made = processor(images=[image], return_tensors="pt", **options)
    pixels = made["pixel_values"]
    if set(made) == {"pixel_values"} and pixels.ndim == 4:
        return pixels[0]
    if set(made) == {"pixel_values", *_FLEXIBLE} and pixels.ndim == 3:
        return pack_flexible(pixels[0], made["spatial_shapes"][0], max(budgets, default=pixels.shape[1]))
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in made.items())
    raise UserError(f"hf:{place}: its processor makes {shapes} of a picture; expected pixel_values (1, 3, S, S)")


def pack_flexible(patches: Tensor, grid: Tensor, most: int) -> Tensor:
    """A picture cut into patches, (L, D), and its rows and columns, (2,), as one tensor, (most + 1, D)."""
    packed = patches.new_zeros((most + 1, patches.shape[1]))
    packed[: len(patches)] = patches
    packed[-1, :2] = grid.to(patches.dtype)
    return packed


def _unpack_flexible(packed: Tensor) -> dict[str, Tensor]:
    patches, grid = packed[:, :-1], packed[:, -1, :2].round().long()
    places = torch.arange(patches.shape[1], device=packed.device)
    mask = places < grid.prod(dim=1, keepdim=True)
    return {"pixel_values": patches, "pixel_attention_mask": mask.int(), "spatial_shapes": grid}


def _read_features(made: Any, method: str) -> Tensor:
    features = made if isinstance(made, Tensor) else getattr(made, "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        found = f"{type(made).__name__}" if features is None else f"{tuple(getattr(features, 'shape', ()))}"
        raise UserError(f"{method} gives {found}; expected features, (B, E), or an output with pooler_output")
    return functional.normalize(features.float(), dim=-1)


def _try(model: TransformersTowers, pixels: Tensor, tokenizer: PaddedTokenizer | None, place: str) -> int:
    """E, found out on a picture and a text."""
    try:
        with torch.no_grad():
            width = model.encode_image(pixels[None]).shape[1]
            text_width = width if tokenizer is None else model.encode_text(tokenizer(["a cat"])).shape[1]
    except UserError as error:
        raise UserError(f"hf:{place}: {error}") from error
    except Exception as error:  # whatever a model of another kind raises
        said = " ".join(str(error).split())[:300]
        raise UserError(f"hf:{place}: gives no features of a picture and a text: {said}") from error
    if width != text_width:
        raise UserError(f"hf:{place}: features of {width} numbers for pictures, but {text_width} for texts")
    return width


def _file_bytes(folder: Path) -> int:
    """Of the files of weights; 0 if the model lies in a hub's cache."""
    for pattern in ("*.safetensors", "*.bin"):
        if found := list(folder.glob(pattern)):
            return sum(path.stat().st_size for path in found)
    return 0
