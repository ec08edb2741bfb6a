"""Adapters in the files of Hugging Face peft: `adapter_model.safetensors` and `adapter_config.json`.

What peft has no place for stands in the metadata of the tensors' file, where other tools ignore it: a digest of the
weights that the adapter belongs to, and the temperatures that were trained with it. Modules are named as in
`exports/remote_code/modeling_m2_encoder.py`, which names them as we do.

Letters: D_in, D_out width of input and output of a matrix · r rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from m2_encoder.checkpoints.digests import digest_tensors
from m2_encoder.checkpoints.formats import read_safetensors, read_safetensors_metadata, read_small_json
from m2_encoder.checkpoints.tensors import find_non_finite, write_tensors
from m2_encoder.errors import CheckpointError
from m2_encoder.files import write_json

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"

_PREFIX: Final = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_OWN: Final = "m2_encoder"
_SCALES: Final = ("logit_scale", "logit_vl_scale")
_OFF: Final = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication")
"""Settings of peft that change what an adapter computes, and that are not read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """What low-rank adaptation trains, apart from the base.

    Attributes:
        rank: r.
        alpha: an update is alpha / r times B A.
        dropout: of the inputs of updates, in training.
        pairs: A, (r, D_in), and B, (D_out, r), by the name of the module.
        whole: parameters that were trained as they are, by name.
        scales: logit scales that were trained, by name.
        base: `digest_base` of the weights it belongs to; None if its writer did not say.
    """

    rank: int
    alpha: float
    dropout: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]
    scales: Mapping[str, float]
    base: str | None


def digest_base(state: Mapping[str, Tensor], *, without: Collection[str]) -> str:
    """SHA-256 of a plain model's parameters in fp32, but for logit scales and what an adapter holds itself."""
    left = {name: value for name, value in state.items() if name not in without and name not in _SCALES}
    return digest_tensors({name: value.detach().cpu().float().contiguous() for name, value in left.items()})


def check_base(state: Mapping[str, Tensor], adapter: LoraAdapter) -> None:
    """Refuse an adapter for other weights; of one that does not say its base, modules and shapes alone are compared.

    Raises:
        CheckpointError: naming the first module that does not fit, or both digests.
    """
    for name, (down, up) in adapter.pairs.items():
        weight = state.get(f"{name}.weight")
        size = (up.shape[0], down.shape[1])
        if weight is None or tuple(weight.shape) != size:
            has = "does not have" if weight is None else f"has as {tuple(weight.shape)}"
            raise CheckpointError(f"is for another model: {name} is {size} there, which this one {has}")
    for name, value in adapter.whole.items():
        if name not in state or state[name].shape != value.shape:
            raise CheckpointError(f"is for another model: its {name} does not fit")
    if adapter.base is not None and (found := digest_base(state, without=adapter.whole.keys())) != adapter.base:
        rule = f"belongs to other weights: their SHA-256 is {adapter.base[:12]}…, that of these is {found[:12]}…"
        raise CheckpointError(f"{rule}; give the base that it was trained on")


@torch.no_grad()
def merge_adapter(state: dict[str, Tensor], adapter: LoraAdapter) -> None:
    """Add an adapter to a plain model's parameters by name; changed ones are replaced, in fp32.

    Raises:
        CheckpointError: as `check_base`.
    """
    check_base(state, adapter)
    for name, (down, up) in adapter.pairs.items():
        weight = state[f"{name}.weight"].float()
        state[f"{name}.weight"] = weight + adapter.alpha / adapter.rank * (up.float() @ down.float())
    state.update(adapter.whole)
    state.update({name: torch.tensor(value) for name, value in adapter.scales.items()})


def merge_adapter_of(state: dict[str, Tensor], folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """`read_adapter` and `merge_adapter`, with the folder as the argument `adapter` in errors; returns the state.

    Raises:
        CheckpointError: as both.
    """
    try:
        merge_adapter(state, read_adapter(folder))
    except CheckpointError as error:
        raise CheckpointError(error.text, key="adapter", value=os.fspath(folder)) from error
    return state


def write_adapter(folder: Path, adapter: LoraAdapter) -> None:
    """Write both files into a folder.

    Raises:
        OSError: if the disk refuses.
        UserError: the same, for the smaller file.
    """
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in adapter.pairs.items():
        tensors |= {f"{_PREFIX}{name}{_DOWN}": down, f"{_PREFIX}{name}{_UP}": up}
    tensors |= {f"{_PREFIX}{name}": value for name, value in adapter.whole.items()}
    portable = {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}
    own = json.dumps({"base_sha256": adapter.base, **adapter.scales})
    write_tensors(portable, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", _OWN: own})
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(adapter.pairs),
        "task_type": None,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def read_adapter(folder: str | os.PathLike[str]) -> LoraAdapter:
    """Read an adapter of ours or of peft's.

    Raises:
        CheckpointError: for a folder without one, damage, or kinds of adapters that are no plain LoRA.
    """
    folder = Path(folder)
    if missing := [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]:
        raise CheckpointError(f"no adapter: there is no {missing[0]}; m2-export to=[peft] writes one")
    config = read_small_json(folder / ADAPTER_CONFIG)
    odd = [f"{key}={config[key]}" for key in _OFF if config.get(key)]
    odd += [f"peft_type={config.get('peft_type')}"] if config.get("peft_type") != "LORA" else []
    odd += [f"bias={config['bias']}"] if config.get("bias", "none") != "none" else []
    if odd:
        raise CheckpointError(f"{odd[0]} is not read, only plain LoRA")
    tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    pairs, whole = _sort(folder, tensors)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float) or not all(
        down.shape[0] == up.shape[1] == rank for down, up in pairs.values()
    ):  # fmt: skip
        raise CheckpointError(f"damaged: r={rank} and lora_alpha={alpha} do not fit its matrices")
    own = _read_own(folder)
    return LoraAdapter(
        rank=rank,
        alpha=float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1),
        dropout=float(config.get("lora_dropout") or 0),
        pairs=pairs,
        whole=whole,
        scales={name: float(own[name]) for name in _SCALES if name in own},
        base=own.get("base_sha256"),
    )


def _sort(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs by module, and what was saved as a whole by name."""
    if (broken := find_non_finite(tensors)) is not None:
        raise CheckpointError(f"{broken} holds values that are NaN or infinite")
    named = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    pairs = {}
    for name in [name for name in named if name.endswith(_DOWN)]:
        module = name.removesuffix(_DOWN)
        if f"{module}{_UP}" not in named:
            raise CheckpointError(f"damaged: it has {name} without its other half")
        down, up = named.pop(name), named.pop(f"{module}{_UP}")
        if down.dim() != 2 or up.dim() != 2:
            raise CheckpointError(f"{module} is no matrix; only those are read")
        pairs[module] = (down, up)
    if odd := [name for name in named if "lora_" in name]:
        raise CheckpointError(f"{odd[0]} is not read, only updates of matrices")
    if not pairs:
        raise CheckpointError("holds no low-rank update")
    return pairs, named


def _read_own(folder: Path) -> dict[str, Any]:
    try:
        own = json.loads(read_safetensors_metadata(folder / ADAPTER_WEIGHTS).get(_OWN, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: damaged metadata; export it again") from error
    return own if isinstance(own, dict) else {}
