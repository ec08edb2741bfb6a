"""Files of tensors and who may read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2_encoder.checkpoints.tensors import write_tensors


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors({"a": torch.arange(3)}, tmp_path / "new", metadata={"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "new")["a"], torch.arange(3))
