"""A small vector-quantised autoencoder: images as one code per patch.

    z_p = normalize(A encoder(patches)_p)        c_p = argmax_c z_p . e_c        image' = decoder(B e_{c_p})

The rows e_c of the codebook have length 1, so the nearest row is the one with the highest cosine. Gradients pass the
argmax straight through. Rows are moving means of the vectors that chose them; rows that no vector chooses restart from
vectors of a batch.

BEiT v2 trains its tokenizer to reconstruct the features of a large teacher; this one reconstructs pixels. Its codes
therefore hold more of colours and edges, and less of meaning.

Letters: B images · N patches · K codes · d width of a code · D width of the layers · S image side · P patch side.

Reference: BEiT v2 (arXiv:2208.06366), section 2.1, for normalised codes and 8,192 of width 32; VQ-VAE
(arXiv:1711.00937) for the loss and, in its appendix, for codes as moving means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import Count, check_fields
from m2_encoder.errors import UserError

_INIT_STD = 0.02
_FFN_RATIO = 4
_ROWS_AT_ONCE = 8192  # vectors compared with all codes at a time: 256 MiB for 8,192 codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualTokenizerConfig:
    """Shape of a visual tokenizer."""

    image_size: Annotated[Count, Le(2**14)]  # side S of the square images, pixels
    patch_size: Annotated[Count, Le(2**14)]  # side P of a patch, pixels; S must be a multiple
    num_codes: Annotated[int, Ge(2), Le(2**24)] = 8192  # K
    code_dim: Annotated[Count, Le(2**16)] = 32  # d
    embed_dim: Annotated[Count, Le(2**16)] = 128  # D; a multiple of `num_heads`
    num_heads: Annotated[Count, Le(2**12)] = 4  # attention heads of every layer
    num_layers: Annotated[Count, Le(2**10)] = 2  # of the encoder
    num_decoder_layers: Annotated[Count, Le(2**10)] = 2  # of the decoder

    def __post_init__(self) -> None:
        check_fields(self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"must be a multiple of patch_size={self.patch_size}", key="image_size", value=self.image_size
            )
        if self.embed_dim % self.num_heads:
            rule = f"must divide embed_dim={self.embed_dim}"
            raise UserError(rule, key="num_heads", value=self.num_heads)

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, int]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisualTokenizerConfig:
        """Rebuild from `to_dict`.

        Raises:
            UserError: for unknown or missing fields.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields:
            raise UserError(
                f"visual tokenizer: fields {', '.join(sorted(values))}; must be {', '.join(sorted(fields))}"
            )
        return cls(**values)


class TokenizedImages(NamedTuple):
    """Output of `VisualTokenizer.forward`."""

    images: Tensor  # reconstructed, (B, 3, S, S)
    vectors: Tensor  # z, of length 1, (B, N, d)
    codes: Tensor  # chosen, (B, N) int64
    commitment: Tensor  # mean squared distance of the vectors to their codes, (); its gradient moves only the vectors


class Codebook(nn.Module):
    """K vectors of length 1, (K, d): moving means of the vectors that choose them."""

    vectors: Tensor
    usage: Tensor

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", functional.normalize(torch.randn(num_codes, code_dim), dim=1))
        self.register_buffer("usage", torch.zeros(num_codes))

    @torch.no_grad()
    def choose(self, vectors: Tensor) -> Tensor:
        """Index of the nearest code of each vector, (..., d) to (...) int64."""
        flat = vectors.flatten(0, -2).to(self.vectors.dtype)
        nearest = [(part @ self.vectors.t()).argmax(dim=1) for part in flat.split(_ROWS_AT_ONCE)]
        return torch.cat(nearest).view(vectors.shape[:-1])

    @torch.no_grad()
    def follow(self, vectors: Tensor, codes: Tensor, *, decay: float, restart_below: float) -> int:
        """Move codes towards the vectors that chose them, and restart unused ones; returns how many restarted.

        Args:
            vectors: of length 1, (..., d).
            codes: chosen by each, (...).
            decay: share of the past in the moving means.
            restart_below: codes chosen less often than this share of the mean restart from vectors of this batch,
                sampled without replacement.
        """
        flat, chosen = vectors.detach().flatten(0, -2).to(self.vectors.dtype), codes.flatten()
        counts = torch.bincount(chosen, minlength=len(self.vectors)).to(self.usage.dtype)
        sums = torch.zeros_like(self.vectors).index_add(0, chosen, flat)
        used = counts > 0
        moved = functional.normalize(decay * self.vectors + (1 - decay) * functional.normalize(sums, dim=1), dim=1)
        self.vectors[used] = moved[used]
        self.usage.mul_(decay).add_(counts, alpha=1 - decay)
        mean = len(flat) / len(self.vectors)
        unused = (self.usage < restart_below * mean).nonzero()[:, 0]
        drawn = torch.randperm(len(flat), device=flat.device)[: len(unused)]
        unused = unused[torch.randperm(len(unused), device=flat.device)[: len(drawn)]]
        self.vectors[unused] = flat[drawn]
        self.usage[unused] = mean
        return len(unused)


class VisualTokenizer(nn.Module):
    """Images to codes and back."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.embed_dim, 3 * config.patch_size**2
        self.from_pixels = nn.Linear(pixels, width)
        self.encoder_positions = nn.Parameter(torch.empty(config.num_patches, width))
        self.encoder = _Layers(config, config.num_layers)
        self.to_code = nn.Linear(width, config.code_dim)
        self.codebook = Codebook(config.num_codes, config.code_dim)
        self.from_code = nn.Linear(config.code_dim, width)
        self.decoder_positions = nn.Parameter(torch.empty(config.num_patches, width))
        self.decoder = _Layers(config, config.num_decoder_layers)
        self.to_pixels = nn.Linear(width, pixels)
        for positions in (self.encoder_positions, self.decoder_positions):
            nn.init.normal_(positions, std=_INIT_STD)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.config.num_codes

    @property
    def image_size(self) -> int:
        """S."""
        return self.config.image_size

    @property
    def patch_size(self) -> int:
        """P."""
        return self.config.patch_size

    def forward(self, images: Tensor) -> TokenizedImages:
        """Reconstruct images, with gradients straight through the argmax."""
        vectors = self._encode(images)
        codes = self.codebook.choose(vectors)
        chosen = self.codebook.vectors[codes].to(vectors.dtype)
        commitment = functional.mse_loss(vectors, chosen)
        return TokenizedImages(self._decode(vectors + (chosen - vectors).detach()), vectors, codes, commitment)

    def encode(self, images: Tensor) -> Tensor:
        """Codes of the patches, (B, N) int64, of images (B, 3, S, S), uint8 in 0..255 or floating in 0..1.

        Raises:
            UserError: for another size.
        """
        return self.codebook.choose(self._encode(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes, (B, N) to (B, 3, S, S) in 0..1."""
        return self._decode(self.codebook.vectors[codes]).clamp(0, 1)

    def _encode(self, images: Tensor) -> Tensor:
        side, patch = self.config.image_size, self.config.patch_size
        if images.shape[1:] != (3, side, side):
            raise UserError(f"images of shape {tuple(images.shape)}: the tokenizer reads (B, 3, {side}, {side})")
        pixels = self.to_unit(images) * 2 - 1
        patches = functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        hidden = self.encoder(self.from_pixels(patches) + self.encoder_positions)
        return functional.normalize(self.to_code(hidden), dim=-1)

    def _decode(self, vectors: Tensor) -> Tensor:
        side, patch = self.config.image_size, self.config.patch_size
        hidden = self.decoder(self.from_code(vectors) + self.decoder_positions)
        pixels = functional.fold(self.to_pixels(hidden).transpose(1, 2), side, patch, stride=patch)
        return (pixels + 1) / 2

    def to_unit(self, images: Tensor) -> Tensor:
        """Images in 0..1, in the precision of the parameters."""
        dtype = self.to_code.weight.dtype
        return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


class _Layers(nn.Module):
    """Pre-norm transformer layers and a final norm."""

    def __init__(self, config: VisualTokenizerConfig, number: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_heads,
                _FFN_RATIO * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(number)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)
