"""The end of a run that trained a visual tokenizer: numbers, a picture, and the folder that objectives read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from m2_encoder.checkpoints.visual_tokenizer import save_visual_tokenizer
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.console import open_console
from m2_encoder.evaluation.pictures.reconstructions import ReconstructedImages, draw_reconstructions
from m2_encoder.evaluation.tasks.showcase import SPLIT_TITLES
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.runs.export import EXPORT_FOLDER
from m2_encoder.runs.provenance import command_line, git_revision, machine, peak_memory_bytes, versions
from m2_encoder.runs.report import SUMMARY_FILE, EvaluatedData, short_path
from m2_encoder.training.visual_tokenizer_module import Reconstruction, ReconstructionMeter

PICTURE_FILE: Final = "reconstructions.png"
_SHOWN = 10
_CHUNK = 256


def finish_visual_tokenizer(
    tokenizer: VisualTokenizer, data: EvaluatedData, run_folder: Path, cfg: Mapping[str, Any], *, started: float
) -> dict[str, float]:
    """Measures, draws and exports a trained tokenizer, and says where everything lies. Call it on one rank.

    Args:
        tokenizer: trained.
        data: holds the sets of images.
        run_folder: exists; `reconstructions.png`, `summary.json` and `export` in it are replaced.
        cfg: the resolved configuration of the run.
        started: `time.time()` when the command started.

    Returns:
        Metrics by name, such as `val/emoji_val/psnr`.
    """
    console = open_console()
    tokenizer.eval()
    found, shown = {}, []
    for split, images in data.retrieval_sets().items():
        found[images.name], drawn = _measure(tokenizer, images)
        shown.append(drawn._replace(title=SPLIT_TITLES.get(split, split), note=_describe(found[images.name], images)))
    metrics = {f"val/{name}/{key}": float(value) for name, of in found.items() for key, value in of._asdict().items()}
    facts = {
        "metrics": metrics,
        "tokenizer": tokenizer.config.to_dict(),
        "wall_time_s": round(time.time() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "git_revision": git_revision(),
        "versions": versions(),
        "machine": machine(),
        "command": command_line(),
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    (run_folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
    places = [("numbers", run_folder / SUMMARY_FILE)]
    if shown:
        subtitle = (
            f"{tokenizer.num_codes:,} codes, {tokenizer.config.num_patches} per image of {tokenizer.image_size} px"
        )
        title = "Images and what their codes give back"
        places.insert(
            0, ("picture", draw_reconstructions(run_folder / PICTURE_FILE, shown, title=title, subtitle=subtitle))
        )
    if cfg["run"]["export"]:
        provenance = {"run": cfg["run"]["name"], "git_revision": git_revision(), "command": command_line(), **metrics}
        exported = save_visual_tokenizer(run_folder / EXPORT_FOLDER, tokenizer, provenance=provenance, overwrite=True)
        places.append(("export", exported))
    console.print()
    for what, path in places:
        console.print(f"  [bold]{what:<12}[/bold] {short_path(path)}", soft_wrap=True, highlight=False)
    for name, of in found.items():
        console.print(
            f"  [bold]{name:<24}[/bold] PSNR {of.psnr:.2f} dB, {of.codes_used:,} codes used, "
            f"perplexity {of.perplexity:,.0f}",
            highlight=False,
        )
    return metrics


@torch.no_grad()
def _measure(tokenizer: VisualTokenizer, images: RetrievalSet) -> tuple[Reconstruction, ReconstructedImages]:
    device = tokenizer.to_code.weight.device
    meter = ReconstructionMeter(tokenizer.num_codes)
    every = max(1, len(images.images) // _SHOWN)
    chosen = torch.arange(0, len(images.images), every)[:_SHOWN]
    for part in images.images.split(_CHUNK):
        codes = tokenizer.encode(part.to(device))
        meter.add(tokenizer.to_unit(part.to(device)), tokenizer.decode(codes), codes)
    drawn = tokenizer.decode(tokenizer.encode(images.images[chosen].to(device))).cpu()
    pixels = (drawn * 255).round().to(torch.uint8)
    return meter.compute(), ReconstructedImages("", "", images.images[chosen], pixels)


def _describe(found: Reconstruction, images: RetrievalSet) -> str:
    return (
        f"{len(images.images):,} images   ·   PSNR {found.psnr:.2f} dB   ·   "
        f"{found.codes_used:,} codes used, perplexity {found.perplexity:,.0f}"
    )
