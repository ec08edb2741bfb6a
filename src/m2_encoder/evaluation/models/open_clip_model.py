"""Models of open_clip: by name and pretrained tag, by name and checkpoint, or a folder that it saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from m2_encoder.errors import UserError
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
    tensor_bytes,
)
from m2_encoder.models.two_towers import TowersConfig, TwoTowers
from m2_encoder.pictures import PicturePolicy
from m2_encoder.tokenizers.foreign import ForeignTokenizer

FOLDER_CONFIG: Final = "open_clip_config.json"
_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


def open_open_clip(spec: str, *, name: str, weights: str | None, pictures: PicturePolicy) -> EvaluatedModel:
    """A model of open_clip.

    Args:
        spec: `ViT-B-32`, `ViT-B-32:TAG`, `ViT-B-32:FILE`, `hf-hub:OWNER/NAME`, or a folder.
        name: in tables.
        weights: a checkpoint, if `spec` names an architecture alone.
        pictures: what the pixels of a file are.

    Raises:
        UserError: without the package or weights, for an unknown name or tag, and for weights of another model.
    """
    library = import_peer("open_clip", "models of open_clip")
    model_name, pretrained = _split(spec, weights)
    module: Any = _create(library, model_name, pretrained, spec)
    preprocessing = drop_keys(library.get_model_preprocess_cfg(module), ())
    size = preprocessing["size"]
    height, width = size if isinstance(size, list) else (size, size)
    if height != width:
        raise UserError(f"{spec}: takes pictures of {height} x {width} pixels; only square ones are read here")
    tokenize = library.get_tokenizer(model_name)
    length = int(getattr(tokenize, "context_length", None) or module.context_length)
    tokenizer = ForeignTokenizer(lambda texts: tokenize(texts, context_length=length), f"open_clip's of {spec}")
    towers = TwoTowers(
        lambda: module,
        TowersConfig(name=name, image_size=int(height), context_length=length),  # the transform normalises
        text=tokenizer(["a cat", "一只猫"]),
    ).eval()
    transform = library.transform.image_transform_v2(library.transform.PreprocessCfg(**preprocessing), is_train=False)
    facts = ModelFacts(
        kind="open_clip",
        parameters=count_parameters(module),
        weight_bytes=_file_bytes(model_name, pretrained) or tensor_bytes(module),
        embed_dim=towers.config.feature_dim,
        image_size=int(height),
        context_length=length,
        preprocessing={**preprocessing, "pictures": pictures.to_dict()},
        tokenizing={"tokenizer": type(tokenize).__name__, "context_length": length},
    )
    return EvaluatedModel(
        name=name,
        model=towers,
        preprocess=PeerTransform(transform, pictures),
        tokenizer=tokenizer,
        facts=facts,
        fingerprint=make_fingerprint(
            module,
            facts,
            architecture={"config": _config_of(library, model_name), "modules": _ADDRESS.sub("", repr(module))},
            tokenizer=digest_tokenizer(tokenizer, content=_tokenizer_content(tokenize)),
        ),
    )


def _split(spec: str, weights: str | None) -> tuple[str, str | None]:
    """The name for open_clip, and the tag or file of weights."""
    folder = Path(spec).expanduser()
    if (folder / FOLDER_CONFIG).is_file():
        if weights is not None:
            raise UserError("the folder has weights of its own; give no others", key="weights", value=weights)
        return f"local-dir:{folder}", None
    if spec.startswith("hf-hub:"):
        return spec, None
    model_name, _, tag = spec.partition(":")
    if tag and weights is not None:
        raise UserError(f"{spec} names its weights already; give one of them", key="weights", value=weights)
    return model_name, tag or weights


def _create(library: Any, model_name: str, pretrained: str | None, spec: str) -> nn.Module:
    has_schema = ":" in model_name
    if not has_schema and library.get_model_config(model_name.replace("/", "-")) is None:
        rule = "is neither a name of open_clip (open_clip.list_models() lists them) nor a folder with"
        raise UserError(f"open_clip:{spec} {rule} {FOLDER_CONFIG}")
    tags = [] if has_schema else library.list_pretrained_tags_by_model(model_name)
    known = f"one of its tags ({', '.join(tags) or 'it has none'}) or a file"
    if not has_schema and pretrained is None:
        raise UserError(f"open_clip:{spec} has no weights; add {known}, such as open_clip:{model_name}:FILE")
    if pretrained is not None and pretrained not in tags and not Path(pretrained).expanduser().is_file():
        raise UserError(f"open_clip:{spec}: {pretrained} is no file; expected {known}")
    if pretrained is not None and pretrained not in tags:
        pretrained = str(Path(pretrained).expanduser())
    try:
        module: nn.Module = library.create_model(
            model_name, pretrained=pretrained, require_pretrained=True, pretrained_text=False, precision="fp32"
        )
    except Exception as error:  # of torch, safetensors, the hub and open_clip itself
        said = " ".join(str(error).split())[:300]
        raise UserError(f"open_clip:{spec} cannot be opened: {said}") from error
    return module.requires_grad_(False).eval()


def _config_of(library: Any, model_name: str) -> Mapping[str, Any] | None:
    if model_name.startswith("local-dir:"):
        path = Path(model_name.removeprefix("local-dir:")) / FOLDER_CONFIG
        return dict(json.loads(path.read_text(encoding="utf-8"))["model_cfg"])
    return None if ":" in model_name else library.get_model_config(model_name.replace("/", "-"))


def _tokenizer_content(tokenize: Any) -> object:
    if (inner := getattr(tokenize, "tokenizer", None)) is not None and hasattr(inner, "get_vocab"):
        return digest_hf_tokenizer(inner)
    ranks = getattr(tokenize, "bpe_ranks", {})
    return [sorted(getattr(tokenize, "encoder", {}).items()), [list(pair) for pair in ranks]]


def _file_bytes(model_name: str, pretrained: str | None) -> int:
    """Of the file of weights; 0 if it lies in a hub's cache."""
    if model_name.startswith("local-dir:"):
        folder = Path(model_name.removeprefix("local-dir:"))
        found = [path for suffix in ("safetensors", "bin") for path in sorted(folder.glob(f"open_clip_*.{suffix}"))]
        return found[0].stat().st_size if found else 0
    path = Path(pretrained or "").expanduser()
    return path.stat().st_size if path.is_file() else 0
