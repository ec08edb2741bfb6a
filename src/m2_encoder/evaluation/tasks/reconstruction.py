"""How well images survive the codes of a visual tokenizer."""

from __future__ import annotations

from typing import Final

import torch

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import evaluation_mode
from m2_encoder.evaluation.pictures.reconstructions import ReconstructedImages, draw_reconstructions
from m2_encoder.evaluation.reconstruction import Reconstruction as Numbers
from m2_encoder.evaluation.reconstruction import ReconstructionMeter
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.models.visual_tokenizer import VisualTokenizer

PICTURE_FILE: Final = "reconstructions.png"
_SHOWN = 10
_CHUNK = 256


class Reconstruction(EvaluationTask):
    """PSNR and use of the codes on every set; draws `reconstructions.png`."""

    def applies(self, context: EvaluationContext) -> bool:
        """Visual tokenizers."""
        return isinstance(context.model, VisualTokenizer)

    def measure(self, context: EvaluationContext) -> TaskResult:
        """Measures all sets, and draws some images of each."""
        tokenizer = context.model
        assert isinstance(tokenizer, VisualTokenizer), "others are left out"
        metrics: dict[str, float] = {}
        rows, shown = [], []
        for split, images in context.sets.items():
            numbers, drawn = _measure(tokenizer, images)
            metrics |= {f"val/{images.name}/{key}": float(value) for key, value in numbers._asdict().items()}
            words = f"{numbers.codes_used:,} codes used, perplexity {numbers.perplexity:,.0f}"
            rows.append(f"  [bold]{images.name:<24}[/bold] PSNR {numbers.psnr:.2f} dB, {words}")
            note = f"{len(images.images):,} images   ·   PSNR {numbers.psnr:.2f} dB   ·   {words}"
            shown.append(drawn._replace(title=context.titles[split], note=note))
        title = "Images and what their codes give back"
        patches, size = tokenizer.config.num_patches, tokenizer.image_size
        subtitle = f"{tokenizer.num_codes:,} codes, {patches} per image of {size} px"
        return TaskResult(
            metrics,
            rows=rows,
            record={"tokenizer": tokenizer.config.to_dict()},
            pictures={PICTURE_FILE: lambda path: draw_reconstructions(path, shown, title=title, subtitle=subtitle)}
            if shown
            else {},
        )


def _measure(tokenizer: VisualTokenizer, images: RetrievalSet) -> tuple[Numbers, ReconstructedImages]:
    meter = ReconstructionMeter(tokenizer.num_codes)
    every = max(1, len(images.images) // _SHOWN)
    chosen = torch.arange(0, len(images.images), every)[:_SHOWN]
    with evaluation_mode(tokenizer) as device:
        for part in images.images.split(_CHUNK):
            codes = tokenizer.encode(part.to(device))
            meter.add(tokenizer.to_unit(part.to(device)), tokenizer.decode(codes), codes)
        drawn = tokenizer.decode(tokenizer.encode(images.images[chosen].to(device))).cpu()
    pixels = (drawn * 255).round().to(torch.uint8)
    return meter.compute(), ReconstructedImages("", "", images.images[chosen], pixels)
