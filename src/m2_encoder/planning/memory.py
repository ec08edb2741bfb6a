"""Peak memory of one rank, item by item.

Training in mixed precision keeps parameters, gradients and AdamW's two moments in fp32, and 16-bit copies of the
weights during a pass. DDP holds gradients a second time, in the buckets it reduces. FSDP2 holds 1/W of all that and,
whole, two layers at a time (one computes, the next arrives), the gradient of one, and what lies outside the layers.
"""

from __future__ import annotations

from typing import NamedTuple

from m2_encoder.planning.cost import ModelCost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.setting import Setting

_FP32 = 4
_MOMENTS = 2
PEAK_BYTES_PER_LOGIT = 10
"""Of a materialised head, per logit and direction: 20 bytes for a logit that serves both directions."""
_TILE_LOGITS = 2 * 8192 * 4096
"""Two scratch tiles of the tiled loss on an accelerator (`objectives/contrastive_tiles.py`)."""


class Memory(NamedTuple):
    """Bytes of one rank at the peak of a step."""

    weights: float  # parameters, and whole layers that FSDP2 holds for a moment
    weight_copies: float  # 16-bit copies of the weights in mixed precision
    gradients: float  # with DDP's buckets
    optimizer: float  # AdamW's moments
    activations: float  # kept for backward, and the widest gradients beside them
    batch: float  # pixels and tokens of all rows of the step
    contrast: float  # features, their gradients, and tiles or logits
    reserved: float  # by contexts, communication and fragments; a constant of the cluster

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def count_logits(setting: Setting, *, heads: int) -> int:
    """Logits of one rank and step, each direction counted: a tiled loss never holds them."""
    if setting.method == "full_logits":
        return 2 * heads * setting.micro_batches * setting.contrasted_rows**2
    return 2 * heads * setting.local_rows * setting.contrasted_rows


def estimate_memory(cost: ModelCost, hardware: Hardware, setting: Setting) -> Memory:
    """Peak memory of one rank."""
    weights: float = _FP32 * cost.parameters
    gradients: float = 2 * _FP32 * cost.trainable_parameters
    optimizer: float = _MOMENTS * _FP32 * cost.trainable_parameters
    copies = cost.autocast_bytes_per_parameter * cost.parameters
    if setting.strategy == "grouped_fsdp":
        layers = 2 * (cost.autocast_bytes_per_parameter or _FP32) * cost.layer_parameters
        weights = weights / setting.world_size + layers + _FP32 * cost.root_parameters
        whole = cost.trainable_layer_parameters + cost.trainable_root_parameters
        gradients = gradients / 2 / setting.world_size + _FP32 * whole
        optimizer = optimizer / setting.world_size
        copies = 0
    return Memory(
        weights=weights,
        weight_copies=copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(cost, setting),
        batch=cost.batch_bytes * setting.local_rows,
        contrast=_contrast(cost, setting),
        reserved=hardware.reserved_memory_gb * 1e9,
    )


def _activations(cost: ModelCost, setting: Setting) -> float:
    rows = setting.rows
    if not setting.activation_checkpointing:
        return rows * (setting.micro_batches_alive * cost.activation_bytes + cost.work_bytes)
    alive = setting.micro_batches_alive * cost.layer_input_bytes
    return rows * (alive + cost.layer_activation_bytes + cost.work_bytes)


def _contrast(cost: ModelCost, setting: Setting) -> float:
    """Features of the group and gradients of the own rows; a gather with gradient has those of all rows, too."""
    row = 2 * cost.heads * cost.feature_dim
    if setting.method == "local_form":
        logits = min(count_logits(setting, heads=cost.heads), _TILE_LOGITS)
        features = setting.contrasted_rows * setting.feature_bytes + setting.local_rows * _FP32
        return row * features + _FP32 * logits
    at_once = count_logits(setting, heads=1) / setting.micro_batches  # one head and micro-batch after the other
    return row * setting.contrasted_rows * (setting.feature_bytes + _FP32) + PEAK_BYTES_PER_LOGIT * at_once
