"""What adaptations spare: memory, time of a step and size of a checkpoint, of the 0.4B model against full training.

A step is what training does: features of images and texts, InfoNCE, backward, AdamW. Images are 224 x 224, captions
have 6 to 24 tokens. Peak memory is that of a fresh process above what its imports take, for building model and
optimizer and for two steps (on a GPU, what torch allocates). Times are taken in turns, in one process. A checkpoint
holds weights and the optimizer's state; an adapter the trained parameters alone.

On the CPU in fp32 with small batches, weights, gradients and moments are most of the memory. `--device cuda` takes
batches of 256 in bf16, where activations are; low-rank updates keep nearly all of them, unless they begin in an upper
layer: below it nothing is kept.

`--quick` takes the tiny model, on which ratios say nothing: it shows that everything runs.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from _common import PeakMemory, Report, interleave, parse_arguments, speedup
from torch import nn
from torch.nn import functional

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.training.adaptation import Adaptation, Full
from m2_encoder.training.adaptations.last import Last
from m2_encoder.training.adaptations.locked import Locked
from m2_encoder.training.adaptations.lora import Lora
from m2_encoder.training.optim import build_optimizer
from m2_encoder.types import TextTokens

MODEL, QUICK_MODEL = "m2-encoder-0.4b", "tiny"
BATCHES = {"cpu": 4, "cuda": 256}
SHORTEST, LONGEST = 6, 24

CANDIDATES: dict[str, Callable[[], Adaptation]] = {
    "full": Full,
    "lora": Lora,
    "lora from layer 6": lambda: Lora(first_layer=6),
    "locked image tower": lambda: Locked(towers=["image"]),
    "last": Last,
}


class Step:
    """One training step of an adapted model, which is built with its optimizer here."""

    def __init__(self, name: str, *, model: str, device: str, batch: int) -> None:
        config = M2EncoderConfig.from_name(model)
        torch.manual_seed(0)
        with torch.device(device):
            self.model = M2Encoder(config)
            CANDIDATES[name]().apply(self.model)
        self.model.freeze_parts(OPTIONAL_PARTS)
        self.model.train()
        self.optimizer = build_optimizer(self.model, lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        size = config.image_size
        images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        lengths = torch.linspace(SHORTEST, LONGEST, batch).round().long()
        ids = torch.randint(0, config.vocab_size, (batch, LONGEST), generator=generator)
        self.images = images.to(device)
        self.text = TextTokens(ids.to(device), (torch.arange(LONGEST) < lengths[:, None]).to(device))
        self.device = device

    def __call__(self) -> float:
        """The loss."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device != "cpu"):
            features = self.model.encode_image(self.images), self.model.encode_text(self.text)
        logits = self.model.similarity(*features)
        target = torch.arange(len(logits), device=self.device)
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target)) / 2
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}


class _Counter(io.RawIOBase):
    """Counts what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def write(self, content: Any) -> int:
        self.bytes += len(content)
        return len(content)


def saved_bytes(content: Any) -> int:
    """Bytes that `torch.save` writes."""
    counter = _Counter()
    torch.save(content, counter)
    return counter.bytes


def run_alone(name: str, *, model: str, device: str, batch: int) -> None:
    """In a fresh process: prints peak memory and sizes as JSON."""
    peak = PeakMemory()
    with peak.measure():
        step = Step(name, model=model, device=device, batch=batch)
        losses = [step(), step()]
    allocated = torch.cuda.max_memory_allocated() if device == "cuda" else peak.bytes
    trained = {name: value.detach() for name, value in step.trained.items()}
    whole = {"state_dict": step.model.state_dict(), "optimizer_states": [step.optimizer.state_dict()]}
    found = {"peak": allocated, "losses": losses, "trained": sum(value.numel() for value in trained.values())}
    print(json.dumps({**found, "checkpoint": saved_bytes(whole), "adapter": saved_bytes(trained)}))


def measure_alone(report: Report, names: list[str], arguments: Any) -> dict[str, dict[str, Any]]:
    """Each candidate in a process of its own."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--alone", name, "--device", arguments.device]
        command += ["--batch", str(arguments.batch), "--threads", str(arguments.threads)]
        command += ["--quick"] if arguments.quick else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = result = json.loads(done.stdout)
        if not all(loss == loss for loss in result["losses"]):
            raise SystemExit(f"{name}: the loss is NaN, the comparison means nothing")
        report.add(
            f"{name}, batch {arguments.batch}",
            trained_millions=round(result["trained"] / 1e6, 2),
            peak_gb=round(result["peak"] / 1e9, 2),
            checkpoint_gb=round(result["checkpoint"] / 1e9, 2),
            trained_alone_mb=round(result["adapter"] / 1e6, 1),
        )
    starts = {name: result["losses"][0] for name, result in found.items()}
    if max(starts.values()) - min(starts.values()) > 1e-3 * max(starts.values()):
        raise SystemExit(f"losses of the first step differ: {starts}: adaptations must begin as the base")
    return found


def main() -> None:
    """Measure, print, write."""

    def configure(parser: Any) -> None:
        parser.add_argument("--device", choices=list(BATCHES), default="cpu", help="default: %(default)s")
        parser.add_argument("--batch", type=int, metavar="B", help="pairs of a step (default: 4, on cuda 256)")
        parser.add_argument("--alone", choices=list(CANDIDATES), help="memory of one candidate, as JSON")

    arguments = parse_arguments(__doc__, configure=configure)
    arguments.batch = arguments.batch or BATCHES[arguments.device]
    model = QUICK_MODEL if arguments.quick else MODEL
    if arguments.alone is not None:
        run_alone(arguments.alone, model=model, device=arguments.device, batch=arguments.batch)
        return
    names = ["full", "lora"] if arguments.quick else list(CANDIDATES)
    report = Report(f"Adaptations of {model}, {arguments.device}, batch {arguments.batch}")
    alone = measure_alone(report, names, arguments)
    steps = {name: Step(name, model=model, device=arguments.device, batch=arguments.batch) for name in names}
    rounds = 3 if arguments.quick else 11
    timings = interleave(steps, rounds=rounds)
    for name, timing in timings.items():
        report.add(f"{name}, a step", **timing.row())
    for name in names[1:]:
        word = name.replace(" ", "_")
        report.figures[f"{word}_memory_ratio"] = alone[name]["peak"] / alone["full"]["peak"]
        report.figures[f"{word}_time_ratio"] = 1 / speedup(timings["full"], timings[name])
        report.figures[f"{word}_checkpoint_ratio"] = alone[name]["checkpoint"] / alone["full"]["checkpoint"]
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
