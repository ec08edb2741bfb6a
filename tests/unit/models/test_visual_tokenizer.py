from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.visual_tokenizer import Codebook, VisualTokenizer, VisualTokenizerConfig

SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "num_codes": 20,
    "code_dim": 6,
    "embed_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "num_decoder_layers": 1,
}


@pytest.fixture
def tokenizer() -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(VisualTokenizerConfig(**SMALL)).double()


def unit(*shape: int, seed: int = 1) -> torch.Tensor:
    raw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(raw, dim=-1)


def test_the_nearest_code_is_chosen() -> None:
    book = Codebook(20, 6).double()
    vectors = unit(3, 4, 6)
    chosen = book.choose(vectors)
    for row in range(3):
        for place in range(4):
            distances = [(vectors[row, place] - code).norm() for code in book.vectors]
            assert int(chosen[row, place]) == min(range(20), key=distances.__getitem__)


def test_codes_follow_the_mean_of_what_chose_them() -> None:
    book = Codebook(5, 6).double()
    book.usage.fill_(1.0)  # nobody starts again
    before, vectors = book.vectors.clone(), unit(40, 6)
    codes = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))
    assert book.follow(vectors, codes, decay=0.9, restart_below=0.0) == 0
    for code in range(4):
        mean = vectors[codes == code].sum(dim=0)
        moved = 0.9 * before[code] + 0.1 * mean / mean.norm()
        torch.testing.assert_close(book.vectors[code], moved / moved.norm())
        assert float(book.usage[code]) == pytest.approx(0.9 + 0.1 * int((codes == code).sum()))
    assert torch.equal(book.vectors[4], before[4])
    assert float(book.usage[4]) == pytest.approx(0.9)


def test_unused_codes_start_again_from_the_batch() -> None:
    torch.manual_seed(3)
    book = Codebook(8, 6).double()
    vectors, codes = unit(30, 6), torch.arange(30) % 3
    book.usage[:3] = 10.0
    assert book.follow(vectors, codes, decay=0.9, restart_below=0.1) == 5
    starts = [int((vectors == code).all(dim=1).nonzero()) for code in book.vectors[3:]]
    assert len(set(starts)) == 5
    assert bool((book.usage[3:] == 30 / 8).all())
    assert book.follow(vectors, codes, decay=0.9, restart_below=0.1) == 0
    few = Codebook(50, 6).double()
    assert few.follow(vectors, few.choose(vectors), decay=0.9, restart_below=0.5) == 30, "no vector twice"


def test_gradients_pass_the_choice(tokenizer: VisualTokenizer) -> None:
    """What reaches the vectors is the decoder's gradient at the codes, and twice the distance to them."""
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    found = tokenizer(images)
    codes = tokenizer.codebook.vectors[found.codes].clone().requires_grad_()
    (through,) = torch.autograd.grad(found.images.square().sum(), found.vectors, retain_graph=True)
    (expected,) = torch.autograd.grad(tokenizer._decode(codes).square().sum(), codes)
    torch.testing.assert_close(through, expected)
    (pull,) = torch.autograd.grad(found.commitment, found.vectors)
    torch.testing.assert_close(pull, 2 * (found.vectors - codes).detach() / codes.numel())
    assert not tokenizer.codebook.vectors.requires_grad


def test_codes_and_back(tokenizer: VisualTokenizer) -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 4)
    assert torch.equal(codes, tokenizer.encode(images.double() / 255))
    assert torch.equal(codes, tokenizer(images).codes)
    drawn = tokenizer.decode(codes)
    assert drawn.shape == (3, 3, 16, 16)
    torch.testing.assert_close(drawn, tokenizer(images).images.clamp(0, 1))


def test_patches_keep_their_place(tokenizer: VisualTokenizer) -> None:
    """With layers that do nothing, a code draws the same patch wherever it stands."""
    with torch.no_grad():
        tokenizer.decoder_positions.zero_()
    drawn = tokenizer.decode(torch.tensor([[1, 1, 1, 1]]))
    assert torch.allclose(drawn[..., :8, :8], drawn[..., 8:, 8:])
    mixed = tokenizer.decode(torch.tensor([[1, 2, 1, 2]]))
    assert torch.allclose(mixed[..., :8, :8], mixed[..., 8:, :8])
    assert not torch.allclose(mixed[..., :8, :8], mixed[..., :8, 8:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 0}, "num_codes=0: must be a whole number, in 2..16777216"),
        ({"image_size": 12}, "image_size=12: must be a multiple of patch_size=8"),
        ({"num_heads": 3}, "num_heads=3: must divide embed_dim=16"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VisualTokenizerConfig(**{**SMALL, **changes})


def test_wrong_images_are_refused(tokenizer: VisualTokenizer) -> None:
    with pytest.raises(UserError, match=r"the tokenizer reads \(B, 3, 16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="must be code_dim, embed_dim"):
        VisualTokenizerConfig.from_dict({"image_size": 16})
