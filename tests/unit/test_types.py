"""The batch's own cut: whole images with their captions, whatever columns the batch has."""

from __future__ import annotations

import torch

from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens


def test_rows_of_a_batch_keep_their_captions_and_columns() -> None:
    ids = torch.arange(8).reshape(8, 1)
    batch = ImageTextBatch(
        images=torch.arange(4).reshape(4, 1, 1, 1),
        text=TextTokens(ids, ids > 0),
        language=torch.arange(8),
        identity=torch.arange(4),
        keys=("a", "b", "c", "d"),
        sources=("s",) * 4,
        masked_text=MaskedText(ids, ids > 1),
        extra={"score": torch.arange(4.0), "length": torch.arange(8)},
    )
    part = batch.rows(slice(1, 3))
    assert part.images.flatten().tolist() == part.identity.tolist() == [1, 2]
    assert part.text.ids.flatten().tolist() == part.language.tolist() == [2, 3, 4, 5]
    assert part.masked_text is not None
    assert part.masked_text.ids.flatten().tolist() == [2, 3, 4, 5]
    assert (part.keys, part.sources, part.patch_mask) == (("b", "c"), ("s", "s"), None)
    assert {name: values.tolist() for name, values in part.extra.items()} == {"score": [1, 2], "length": [2, 3, 4, 5]}
    assert part.captions_per_image == 2
