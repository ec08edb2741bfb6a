"""Initialisation of the released constructor.

The official code also contains two schemes that it never calls (truncated normals; a depth rescale); whether the
published weights were trained from one of them is unknown, so the one that runs is reproduced.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from m2_encoder.models.multiway import MultiwayEncoder, TransformerExpert

_HEAD_STD = 0.02


@torch.no_grad()
def init_encoder(encoder: MultiwayEncoder) -> None:
    """Default Linear and LayerNorm init, then v, out, fc1 and fc2 times sqrt(ln(2 * layers)).

    Reference: sub-LN initialisation of Magneto (arXiv:2210.06423), as BEiT-3 applies it, weight and bias alike.
    """
    gain = math.sqrt(math.log(2 * len(encoder.layers)))
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.reset_parameters()
    for module in encoder.modules():
        if isinstance(module, TransformerExpert):
            for linear in (module.v_proj, module.out_proj, module.fc1, module.fc2):
                linear.weight.mul_(gain)
                linear.bias.mul_(gain)


@torch.no_grad()
def init_embedding_tables(tokens: nn.Embedding, *positions: nn.Embedding, position_std: float) -> None:
    """Token table: normal with standard deviation D^-0.5. Position tables: normal with `position_std`."""
    nn.init.normal_(tokens.weight, std=tokens.embedding_dim**-0.5)
    for table in positions:
        nn.init.normal_(table.weight, std=position_std)


@torch.no_grad()
def init_heads(*heads: nn.Linear) -> None:
    """Normal weights with standard deviation 0.02, zero bias."""
    for head in heads:
        nn.init.normal_(head.weight, std=_HEAD_STD)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
