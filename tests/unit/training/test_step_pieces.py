"""Encoding in pieces: the same features and gradients, the same random numbers, the memory of one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.objectives import encode_pieces, image_text_contrastive
from m2_encoder.training.step import split_rows
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.training import tiny_config


def make_batch(rows: int, *, captions: int = 1, length: int = 9) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(rows)
    texts = rows * captions
    lengths = torch.randint(2, length + 1, (texts, 1), generator=generator)
    mask = torch.arange(length) < lengths
    ids = torch.randint(5, 90, (texts, length), generator=generator) * mask
    return ImageTextBatch(
        images=torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8),
        text=TextTokens(ids, mask),
        language=torch.zeros(texts, dtype=torch.int64),
        identity=torch.arange(rows),
        keys=tuple(f"row{i}" for i in range(rows)),
        sources=("test",) * rows,
    )


class TestSplit:
    @pytest.mark.parametrize("captions", [1, 3])
    def test_rows_stay_with_their_captions_and_in_order(self, captions: int) -> None:
        batch = make_batch(6, captions=captions)
        pieces = split_rows(batch, 3)
        assert [len(piece.images) for piece in pieces] == [2, 2, 2]
        assert torch.equal(torch.cat([piece.images for piece in pieces]), batch.images)
        assert torch.equal(torch.cat([piece.text.ids for piece in pieces]), batch.text.ids)
        assert torch.equal(torch.cat([piece.text.mask for piece in pieces]), batch.text.mask)
        assert [piece.text.ids.shape for piece in pieces] == [(2 * captions, 9)] * 3

    @pytest.mark.parametrize(("rows", "pieces"), [(6, 4), (2, 3), (1, 2)])
    def test_what_cannot_be_divided_is_named(self, rows: int, pieces: int) -> None:
        with pytest.raises(
            UserError, match=f"strategy.micro_batches={pieces} must divide the {rows} rows of a rank; .*batch_size"
        ):
            split_rows(make_batch(rows), pieces)


class Noisy(nn.Module):
    """Counts its calls, and the autocast dtype it sees; drops half of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.seen: list[tuple[int, torch.dtype]] = []

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        out = nn.functional.dropout(self.linear(rows), 0.5)
        self.seen.append((len(rows), out.dtype))
        return out.tanh(), out.sin()


def run_noisy(*, recompute: bool, pieces: int = 3, autocast: bool = False) -> tuple[list[Tensor], Noisy, Tensor]:
    torch.manual_seed(3)
    module, rows = Noisy(), torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        one, two = encode_pieces(module, rows.chunk(pieces), recompute=recompute)
    (one.float() * two.float()).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [one.detach(), two.detach(), *gradients], module, torch.rand(5)


class TestPieces:
    @pytest.mark.parametrize("autocast", [False, True])
    def test_recomputation_changes_no_bit_and_no_random_number_after_it(self, autocast: bool) -> None:
        kept, once, drawn = run_noisy(recompute=False, autocast=autocast)
        replayed, twice, drawn_after = run_noisy(recompute=True, autocast=autocast)
        dtype = torch.bfloat16 if autocast else torch.float32
        assert once.seen == [(2, dtype)] * 3
        assert twice.seen == [(2, dtype)] * 6, "every piece is encoded again, in the precision of the first time"
        assert all(torch.equal(*pair) for pair in zip(kept, replayed, strict=True))
        assert torch.equal(drawn, drawn_after)
        assert (kept[0] == 0).any(), "nothing was dropped"
        assert not torch.equal(kept[0][:2], kept[0][2:4])

    def test_one_piece_is_kept_and_one_without_gradient_too(self) -> None:
        _, module, _ = run_noisy(recompute=True, pieces=1)
        assert [rows for rows, _ in module.seen] == [6]
        module = Noisy()
        with torch.no_grad():
            (features, _) = encode_pieces(module, list(torch.randn(6, 4).chunk(3)), recompute=True)
        assert len(module.seen) == 3
        assert not features.requires_grad

    @pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpointed-layers"])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_the_encoder_in_pieces(self, recompute: bool, checkpoint: bool) -> None:
        """Without random numbers, pieces are the whole batch; with stochastic depth, recomputing changes nothing."""
        expected = encoder_step(pieces=1, drop=0.0, recompute=False)
        given = encoder_step(pieces=4, drop=0.0, recompute=recompute, checkpoint=checkpoint)
        for name, gradient in expected.items():
            torch.testing.assert_close(given[name], gradient, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        kept = encoder_step(pieces=4, drop=0.5, recompute=False)
        given = encoder_step(pieces=4, drop=0.5, recompute=recompute, checkpoint=checkpoint)
        assert all(torch.equal(given[name], gradient) for name, gradient in kept.items())
        assert not torch.equal(kept["logit_scale"], expected["logit_scale"])


def encoder_step(*, pieces: int, drop: float, recompute: bool, checkpoint: bool = False) -> dict[str, Tensor]:
    """Gradients of the real encoder in fp64, two layers."""
    torch.manual_seed(5)
    model = M2Encoder(tiny_config(num_layers=2, drop_path_rate=drop)).double().train()
    if checkpoint:
        checkpoint_layers(model)
    encode_and_backward(model, make_batch(8), pieces=pieces, recompute=recompute)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def encode_and_backward(model: M2Encoder, batch: ImageTextBatch, *, pieces: int, recompute: bool) -> None:
    rows = split_rows(batch, pieces)
    (image,) = encode_pieces(lambda piece: (model.encode_image(piece.images),), rows, recompute=recompute)
    (text,) = encode_pieces(lambda piece: (model.encode_text(piece.text),), rows, recompute=recompute)
    image_text_contrastive(image, text, model.logit_scale).backward()


def peak_bytes(body: Callable[[], Any]) -> int:
    """The most memory that `body` holds at once beyond what was there before, by the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        body()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def step_peak(*, pieces: int, rows: int, recompute: bool) -> int:
    """Peak of a step of a model whose activations are most of it; gradients are there already."""
    model = M2Encoder(tiny_config(embed_dim=64, num_heads=4, num_layers=3, patch_size=2)).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = make_batch(rows)
    return peak_bytes(lambda: encode_and_backward(model, batch, pieces=pieces, recompute=recompute))


def test_eight_recomputed_micro_batches_take_little_more_memory_than_one() -> None:
    one = step_peak(pieces=1, rows=8, recompute=True)
    eight = step_peak(pieces=8, rows=64, recompute=True)
    kept = step_peak(pieces=8, rows=64, recompute=False)
    assert one > 5e6, "too small to tell"
    assert eight <= 1.25 * one, f"{eight / one:.3f} times the memory of one micro-batch"
    assert kept > 5 * one, f"keeping all graphs took {kept / one:.2f} times one, so that nothing was measured"


def test_the_yardstick_sees_what_is_held_at_once() -> None:
    def body() -> None:
        for _ in range(5):
            part = torch.empty(1_000_000, dtype=torch.uint8)
            del part
        parts = [torch.empty(1_000_000, dtype=torch.uint8) for _ in range(3)]
        del parts

    assert peak_bytes(body) == pytest.approx(3e6, rel=0.01)
