"""Weights of ONNX graphs in 8 bits: the token table alone, or all matrices.

Letters: B batch · T tokens · V vocabulary · D width.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

_LEVELS: Final = 127  # on either side of 0


class RoundedTable(nn.Module):
    """A token table as whole numbers of 8 bits with a scale for each row.

    Rows are taken first and multiplied then, so that neither the file nor the memory holds the table in another dtype.

    Args:
        weight: the table, (V, D) floating.
    """

    rows: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values = weight.detach().float()
        scales = values.abs().amax(dim=1) / _LEVELS
        rounded = (values / scales.where(scales > 0, 1.0).unsqueeze(1)).round()
        self.register_buffer("rows", rounded.clamp(-_LEVELS, _LEVELS).to(torch.int8))  # (V, D)
        self.register_buffer("scales", scales)  # (V,) fp32

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, D) fp32."""
        return self.rows[ids].float() * self.scales[ids].unsqueeze(-1)


def round_matrices(path: Path, target: Path) -> None:
    """Writes an fp32 graph with all matrix products in 8 bits.

    Weights have a scale for each column, and seven bits, because processors without VNNI overflow with eight;
    activations get a scale for each call, over the whole batch.

    Raises:
        OSError: if the disk refuses.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if shutil.disk_usage(target.parent).free < 2 * path.stat().st_size:
        # It writes a copy first, and on a full disk goes on with half of it.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(target))
    quantize_dynamic(
        path,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
