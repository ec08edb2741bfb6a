"""Masked objectives: memory of the vocabulary head, speed of whole-word masking, cost of the full mixture.

1. The masked-language head at the published vocabulary (115,244 pieces, width 768) on a batch of 64 captions of 52
   tokens of which half are hidden: peak memory and time, forward and backward, of ours and of the plain version, which
   makes all logits and then picks (fp32; the losses must agree).
2. Whole-word masking on one core: tokens, words, choice and replacement of captions of the built-in set, zh and en,
   after a pass that warms caches, against tokenising alone and against jieba alone.
3. A training step of +experiment=emoji_full (128 drawings, a Chinese and an English caption each, of the real loader)
   by the contrastive loss alone and with masked objectives, in turns: the whole step (forward, backward, clipping,
   update), and forward and backward alone. Batches are loaded beforehand.

Figures: `mlm_memory_ratio` is the plain peak over ours; `wwm_captions_per_s`; `full_step_ratio` is the step of the full
mixture over that of the contrastive loss alone, `full_passes_ratio` the same without clipping and update.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import PeakMemory, Report, interleave, parse_arguments, speedup
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.data.emoji.dataset import load_emoji_concepts, load_emoji_tokenizer_model
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.token_prediction import token_cross_entropy
from m2_encoder.objectives.base import LocalObjective, ObjectiveInputs
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.runs.build import build_data, build_objectives
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.optim import build_muon
from m2_encoder.training.step import StepEncoder, mean_terms
from m2_encoder.types import ImageTextBatch

VOCABULARY, WIDTH, CAPTIONS, LENGTH = 115_244, 768, 64, 52
NEEDED_GB = 8
BATCH = 128
AGREEMENT = 1e-4
MIXTURES = ("itc", "itc, cmlm", "itc, cmim", "itc, cmlm, cmim")


def measure_head(report: Report, *, rounds: int) -> None:
    """Peak memory and time of the vocabulary head, ours and plain."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((CAPTIONS, LENGTH, WIDTH), generator=generator)
    table = 0.02 * torch.randn((VOCABULARY, WIDTH), generator=generator)
    bias = torch.zeros(VOCABULARY)
    ids = torch.randint(VOCABULARY, (CAPTIONS, LENGTH), generator=generator)
    chosen = torch.rand((CAPTIONS, LENGTH), generator=generator) < 0.5

    def plain(states: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        logits = states @ weight.t() + offset
        return functional.cross_entropy(logits.flatten(0, 1), torch.where(chosen, ids, -100).flatten())

    def ours(states: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return token_cross_entropy(states[chosen], weight, offset, ids[chosen])[0].mean()

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, float]:
        leaves = [part.detach().requires_grad_() for part in (hidden, table, bias)]
        value = loss(*leaves)
        value.backward()
        gradient = leaves[0].grad
        assert gradient is not None
        return float(value.detach()), float(gradient.norm())

    candidates = {"ours": ours, "plain": plain}
    found = {name: step(loss) for name, loss in candidates.items()}  # and what is only made once
    for own, expected in zip(found["ours"], found["plain"], strict=True):
        assert abs(own - expected) <= AGREEMENT * abs(expected), f"ours {found['ours']}, plain {found['plain']}"
    memory, peaks, seconds = PeakMemory(), {name: [] for name in candidates}, {name: [] for name in candidates}
    for i in range(rounds):
        for name in list(candidates) if i % 2 == 0 else reversed(list(candidates)):
            with memory.measure():
                start = time.perf_counter()
                step(candidates[name])
                seconds[name].append(time.perf_counter() - start)
            peaks[name].append(memory.bytes)
    for name in candidates:
        report.add(
            f"vocabulary head, {name}",
            peak_mb=round(statistics.median(peaks[name]) / 1e6),
            median_s=round(statistics.median(seconds[name]), 2),
            rounds=rounds,
        )
    report.figures["mlm_memory_ratio"] = statistics.median(peaks["plain"]) / statistics.median(peaks["ours"])
    report.figures["mlm_time_ratio"] = statistics.median(
        plain / own for plain, own in zip(seconds["plain"], seconds["ours"], strict=True)
    )


def measure_words(report: Report, *, rounds: int) -> None:
    """Captions per second of whole-word masking on one core, and of its parts alone."""
    import jieba

    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=LENGTH)
    masking = BatchMasking(tokenizer, grid=14, word_ratio=0.5)
    texts = [
        text for concept in load_emoji_concepts() for language in ("zh", "en") for text in _captions(concept, language)
    ]
    chinese = [text for text in texts if any("\u4e00" <= character <= "\u9fff" for character in text)]
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]

    def mask() -> None:
        for number, batch in enumerate(batches):
            masking.mask_texts(batch, [(0, number, row) for row in range(len(batch))])

    def tokenise() -> None:
        for batch in batches:
            tokenizer(batch)

    def cut() -> None:
        for text in chinese:
            jieba.lcut(text)

    jieba.setLogLevel("ERROR")
    candidates: dict[str, Callable[[], object]] = {"masking": mask, "tokenising alone": tokenise, "jieba alone": cut}
    timings = interleave(candidates, rounds=rounds)
    counts = {"masking": len(texts), "tokenising alone": len(texts), "jieba alone": len(chinese)}
    for name, timing in timings.items():
        report.add(
            f"words, {name}", captions_per_s=round(counts[name] / timing.median), captions=counts[name], **timing.row()
        )
    report.figures["wwm_captions_per_s"] = counts["masking"] / timings["masking"].median


def _captions(concept: Any, language: str) -> list[str]:
    """A concept's texts, and its keywords as one list, the longest caption that training draws."""
    captions = concept.captions[language]
    return [*captions.texts(), ("，" if language == "zh" else ", ").join(captions.keywords)]


def measure_step(report: Report, *, rounds: int) -> None:
    """Time of a training step, without and with each masked objective, on real batches."""
    config = M2EncoderConfig.from_name("tiny")
    steps: dict[str, Callable[[], None]] = {}
    passes: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        batches = _load_batches(Path(folder), count=8)
    for name in MIXTURES:
        torch.manual_seed(0)
        module = nn.ModuleDict({"model": M2Encoder(config)})
        for key in name.split(", ")[1:]:
            objective: LocalObjective = MaskedLanguage() if key == "cmlm" else MaskedImage()
            objective.build(config)
            module[key] = objective
        unused = {"backbone_features", "official_leftovers", "vl_text_expert"}
        module["model"].freeze_parts(unused if "cmim" in module else {*unused, "mask_token"})
        steps[name] = _make_step(module, batches, updates=True)
        passes[name] = _make_step(module, batches, updates=False)
    for title, candidates in (("step", steps), ("forward and backward", passes)):
        timings = interleave(candidates, rounds=rounds)
        for name, timing in timings.items():
            report.add(f"{title}, {name}", **timing.row(), times_itc=round(speedup(timing, timings["itc"]), 3))
        ratio = speedup(timings[MIXTURES[-1]], timings["itc"])
        report.figures["full_step_ratio" if candidates is steps else "full_passes_ratio"] = ratio


def _make_step(module: nn.ModuleDict, batches: Sequence[ImageTextBatch], *, updates: bool) -> Callable[[], None]:
    """One step on the next batch: forward and backward, then clipping and the update of `+experiment=emoji_full`."""
    model = module["model"]
    assert isinstance(model, M2Encoder)
    local = {name: objective for name, objective in module.items() if isinstance(objective, LocalObjective)}
    contrastive = ImageTextContrastive()
    encoder = StepEncoder(model, local, trains_features=True, trains_backbone_features=False)
    optimizer = build_muon(module, lr=1e-3, matrix_lr=2e-3, weight_decay=0.5, logit_scale_lr_ratio=20.0)
    following = itertools.cycle(batches)

    def step() -> None:
        batch = next(following)
        encoded = encoder.encode(batch, micro_batches=1, recompute=False)
        loss = contrastive(ObjectiveInputs(encoded.heads, batch.identity, None)).loss
        loss = loss + sum(output.loss for output in mean_terms(encoded.terms).values())
        loss.backward()
        if updates:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _load_batches(folder: Path, *, count: int) -> list[ImageTextBatch]:
    """Batches that `+experiment=emoji_full` trains on: 128 drawings with a Chinese and an English caption each."""
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base=None):
        composed = compose("train", overrides=["+experiment=emoji_full", f"data.folder={folder}"])
    cfg = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(cfg, dict)
    data = build_data(cfg, build_objectives(cfg))  # type: ignore[arg-type]  # keys are strings
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    return list(itertools.islice(iter(loader), count))


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = Report("Masked objectives", distributions=("sentencepiece", "jieba"))
    measure_step(report, rounds=3 if arguments.quick else 15)
    torch.set_num_threads(1)
    measure_words(report, rounds=3 if arguments.quick else 15)
    torch.set_num_threads(arguments.threads)
    if report.machine["memory_gb"] < NEEDED_GB:
        print(f"the plain vocabulary head needs {NEEDED_GB} GB; left out", file=sys.stderr)
    else:
        measure_head(report, rounds=2 if arguments.quick else 5)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
