"""Masked objectives: memory of the vocabulary head, speed of whole-word masking, cost of the full mixture.

1. The masked-language head at the published vocabulary (115,244 pieces, width 768) on a batch of 64 captions of 52
   tokens of which half are hidden: peak memory and time, forward and backward, of ours and of the plain version, which
   makes all logits and then picks (fp32; the losses must agree).
2. Whole-word masking on one core: tokens, words, choice and replacement of captions of the embedded set, zh and en,
   after a pass that warms caches, against tokenising alone and against jieba alone.
3. A training step of the tiny model at a batch of 128, zh and en captions, by the contrastive loss alone and by all
   three of objective=[itc,cmlm,cmim]: forward and backward, in turns.

Figures: `mlm_memory_ratio` is the plain peak over ours; `wwm_captions_per_s`; `full_step_ratio` is the time of the full
mixture over that of the contrastive loss alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import PeakMemory, Report, interleave, parse_arguments, speedup
from torch import Tensor
from torch.nn import functional

from m2_encoder.data.batch_masking import BatchMasking
from m2_encoder.data.emoji import load_emoji_concepts, load_emoji_tokenizer_model
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.token_prediction import token_cross_entropy
from m2_encoder.objectives.base import LocalObjective, ObjectiveInputs
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.step_encoder import StepEncoder, mean_terms
from m2_encoder.types import ImageTextBatch

VOCABULARY, WIDTH, CAPTIONS, LENGTH = 115_244, 768, 64, 52
NEEDED_GB = 8
BATCH = 128
AGREEMENT = 1e-4


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
        return float(value), float(gradient.norm())

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
    """Time of a training step, forward and backward: the contrastive loss alone, and the full mixture."""
    config = M2EncoderConfig.from_name("tiny")
    torch.manual_seed(0)
    model = M2Encoder(config)
    contrastive = ImageTextContrastive()
    local: dict[str, LocalObjective] = {"cmlm": MaskedLanguage(), "cmim": MaskedImage()}
    for objective in local.values():
        objective.build(config)
    batch = _make_batch(config)

    def step(objectives: dict[str, LocalObjective]) -> None:
        encoder = StepEncoder(model, objectives, trains_features=True, trains_backbone_features=False)
        encoded = encoder.encode(batch, micro_batches=1, recompute=False)
        loss = contrastive(ObjectiveInputs(encoded.heads, batch.identity, None)).loss
        loss = loss + sum(output.loss for output in mean_terms(encoded.terms).values())
        loss.backward()
        for module in (model, *local.values()):
            module.zero_grad(set_to_none=True)

    timings = interleave(
        {
            "itc": lambda: step({}),
            "itc, cmlm": lambda: step({"cmlm": local["cmlm"]}),
            "itc, cmim": lambda: step({"cmim": local["cmim"]}),
            "itc, cmlm, cmim": lambda: step(local),
        },
        rounds=rounds,
    )
    for name, timing in timings.items():
        report.add(f"step, {name}", **timing.row(), times_itc=round(speedup(timing, timings["itc"]), 3))
    report.figures["full_step_ratio"] = speedup(timings["itc, cmlm, cmim"], timings["itc"])


def _make_batch(config: M2EncoderConfig) -> ImageTextBatch:
    """Images of noise with a name in either language each, as `data=emoji` pairs them."""
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=config.context_length)
    grid = config.image_size // config.patch_size
    masking = BatchMasking(tokenizer, grid=grid, word_ratio=0.5, patch_ratio=80 / 196)
    concepts = load_emoji_concepts()[:BATCH]
    texts = [_captions(concept, language)[-1] for concept in concepts for language in ("zh", "en")]
    text, masked = masking.mask_texts(texts, [(0, row) for row in range(len(texts))])
    side = config.image_size
    return ImageTextBatch(
        images=torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8),
        text=text,
        language=torch.tensor([1, 0] * BATCH),
        identity=torch.arange(BATCH),
        keys=tuple(concept.key for concept in concepts),
        sources=("emoji",) * BATCH,
        masked_text=masked,
        patch_mask=masking.mask_images([(0, row) for row in range(BATCH)]),
    )


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
