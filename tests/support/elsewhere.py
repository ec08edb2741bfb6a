"""Runs the loops of `docs/grouped_elsewhere.md` in gloo processes, and the same steps in one process by the formula.

    python -m tests.support.elsewhere WORLD_SIZE FOLDER CASES     (CASES: a JSON list of the fields of `Case`)

Prints one JSON object per case: how far gradients of any step, parameter and rank are from those of one process. All
ranks are forks of one process, because what the loops import takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from tests.support.plain_contrastive import world_loss
from tests.support.ranks import free_port
from tests.support.readme import split_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "grouped_elsewhere.md"
LOOPS = ("ddp", "accelerate", "trainer", "open_clip", "lightning", "strategy")
"""Names of the page's blocks, in order."""

STEPS, ROWS, LR = 2, 8, 0.1  # rows of a rank in a step
Gradients = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """One loop; `accum_freq` is that of open_clip, which then does without pieces."""

    loop: str
    group_size: int
    pieces: int = 1
    drop: float = 0.0
    accum_freq: int = 1


class Towers(nn.Module):
    """Two small towers with dropout; unit features and the log of the scale."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 5))
        self.text = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of both sides, and the scale."""
        image, text = nn.functional.normalize(self.image(images)), nn.functional.normalize(self.text(texts))
        return image, text, self.logit_scale


def make_model(case: Case) -> nn.Module:
    """The same on every rank, in fp64."""
    torch.manual_seed(3)
    if case.loop == "trainer":
        from transformers import CLIPConfig, CLIPModel

        common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config={
                **common, "vocab_size": 50, "max_position_embeddings": 8, "attention_dropout": case.drop,
                "bos_token_id": 48, "eos_token_id": 49,
            },
            vision_config={**common, "image_size": 16, "patch_size": 8, "attention_dropout": case.drop},
            projection_dim=12,
        )  # fmt: skip
        return CLIPModel(config).double().train()
    if case.loop == "open_clip":
        from open_clip import CLIP

        vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8}
        vision["patch_dropout"] = case.drop
        text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
        return CLIP(12, vision, text, output_dict=True).double().train()
    return Towers(case.drop).double().train()


def make_batch(case: Case, rank: int, step: int) -> Batch:
    """Images and texts of a rank; one pair is there twice."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    if case.loop in {"trainer", "open_clip"}:
        images = torch.randn(ROWS, 3, 16, 16, dtype=torch.float64, generator=generator)
        texts = torch.randint(1, 49, (ROWS, 8), generator=generator)
        texts[:, -1] = 49  # the end of a text
    else:
        images, texts = (torch.randn(ROWS, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    images[5], texts[5] = images[0], texts[0]
    return images, texts


def encode(case: Case, model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features of both sides, and the log of the scale."""
    if case.loop == "trainer":
        outputs = model(pixel_values=images, input_ids=texts)
        return outputs.image_embeds, outputs.text_embeds, model.logit_scale
    outputs = model(images, texts)
    if case.loop == "open_clip":
        return outputs["image_features"], outputs["text_features"], model.logit_scale
    return outputs


def train_rank(case: Case, rank: int, world_size: int) -> list[Gradients]:
    """Run the page's block on a rank; the gradients of every step."""
    model = make_model(case)
    steps = iter(range(STEPS * case.accum_freq * 2))
    # Pieces and recomputation do not pass this hook: it runs once per step, as random numbers of a step belong to it.
    seeding = model.register_forward_pre_hook(lambda *_: torch.manual_seed(_seed(rank, next(steps))) and None)
    found: list[Gradients] = []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if type(optimizer) is torch.optim.SGD:  # and not accelerate's, around it
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})

    names = _users_own(case, model, rank, world_size)
    taking = register_optimizer_step_post_hook(take)
    try:
        text = _block(case)
        exec(compile(text, f"{PAGE.name}: {case.loop}", "exec"), names)
        if case.loop == "open_clip":
            _train_open_clip(case, names, rank)
    finally:
        taking.remove()
        seeding.remove()
        if case.loop in {"accelerate", "trainer"}:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
    return found


def train_alone(case: Case, world_size: int) -> list[Gradients]:
    """The same steps in one process with all rows: whole logit matrices, and plain SGD."""
    model, found = make_model(case), list[Gradients]()
    for step in range(STEPS):
        images, texts = list[Tensor](), list[Tensor]()
        for rank in range(world_size):
            torch.manual_seed(_seed(rank, step))
            pieces = zip(*(side.chunk(case.pieces) for side in make_batch(case, rank, step)), strict=True)
            features = [encode(case, model, *piece) for piece in pieces]
            images.append(torch.cat([each[0] for each in features]))
            texts.append(torch.cat([each[1] for each in features]))
        model.zero_grad()
        world_loss(images, texts, model.logit_scale, group_size=case.group_size).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
    return found


def deviation(found: list[Gradients], expected: list[Gradients]) -> float:
    """The largest of any parameter, relative to its gradient, or to a thousandth of the largest one of all."""
    assert len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}"
    worst = 0.0
    for given, right in zip(found, expected, strict=True):
        floor = 1e-3 * max(float(each.abs().max()) for each in right.values())
        for name, gradient in right.items():
            off = float((given[name] - gradient).abs().max()) / max(floor, float(gradient.abs().max()))
            worst = max(worst, off if off == off else float("inf"))
    return worst


def _seed(rank: int, step: int) -> int:
    return 7 + 1000 * step + rank


def _block(case: Case) -> str:
    """The page's block, with the case's numbers in place of its own."""
    blocks, _ = split_blocks(PAGE.read_text(encoding="utf-8"))
    shown = [block.text for block in blocks if block.kind == "python"]
    text = dict(zip(LOOPS, shown, strict=True))[case.loop]
    numbers = (("make_group(", 2), ("group_size=", 2), ("in_pieces(model, ", 4), ("micro_batches=", 4))
    for name, number in numbers:
        value = case.group_size if number == 2 else case.pieces
        text = text.replace(f"{name}{number}", f"{name}{value}")
    return text


def _users_own(case: Case, model: nn.Module, rank: int, world_size: int) -> dict[str, Any]:
    """What the page calls the reader's own."""
    own = [make_batch(case, rank, step) for step in range(STEPS)]
    names: dict[str, Any] = {
        "__name__": "__main__",
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=LR),
        "loader": own,
        "args": Namespace(accum_freq=case.accum_freq),
    }
    every = [make_batch(case, other, step) for step in range(STEPS) for other in range(world_size)]
    images, texts = (torch.cat(side) for side in zip(*every, strict=True))
    if case.loop == "accelerate":
        names["loader"] = DataLoader(TensorDataset(images, texts), batch_size=ROWS)
    if case.loop == "trainer":
        names["dataset"] = [
            {"pixel_values": image, "input_ids": text} for image, text in zip(images, texts, strict=True)
        ]
        names["arguments"] = _trainer_arguments()
    if case.loop in {"lightning", "strategy"}:
        names["loader"] = DataLoader(own, batch_size=None)  # type: ignore[arg-type]
        names["options"] = _lightning_options(world_size)
    return names


def _trainer_arguments() -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=os.environ["ELSEWHERE_FOLDER"],
        per_device_train_batch_size=ROWS,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def _lightning_options(world_size: int) -> dict[str, Any]:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    return {
        "accelerator": "cpu", "devices": world_size, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "plugins": [LightningEnvironment()],
    }  # fmt: skip


def _train_open_clip(case: Case, names: dict[str, Any], rank: int) -> None:
    from open_clip_train.train import train_one_epoch

    class Loader(list[Batch]):
        num_batches, num_samples = STEPS * case.accum_freq, STEPS * ROWS

    parts = [zip(*(side.chunk(case.accum_freq) for side in batch), strict=True) for batch in names["loader"]]
    loader = Loader(piece for batch in parts for piece in batch)
    args = Namespace(
        **vars(names["args"]), device="cpu", precision="fp32", distill=False, skip_scheduler=True, horovod=False,
        grad_clip_norm=None, log_every_n_steps=100, world_size=1, batch_size=ROWS, rank=rank, local_rank=rank,
        distributed=True, log_local=False, wandb=False,
    )  # fmt: skip
    data = {"train": Namespace(dataloader=loader, set_epoch=lambda epoch: None)}
    train_one_epoch(names["model"], data, names["loss"], 0, names["optimizer"], None, None, None, args)


def _import_all(cases: list[Case]) -> None:
    """Before the ranks are forked."""
    loops = {case.loop for case in cases}
    if "trainer" in loops:
        from transformers import CLIPModel, Trainer  # noqa: F401
    if "accelerate" in loops:
        from accelerate import Accelerator  # noqa: F401
    if "open_clip" in loops:
        from open_clip_train.train import train_one_epoch  # noqa: F401
    if loops & {"lightning", "strategy"}:
        import m2_encoder.strategies.grouped_ddp  # noqa: F401


def _fork(function: Callable[[int], None], world_size: int) -> None:
    """Call the function in forks of this process, by rank; all have to end well."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                function(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), f"ranks ended with {codes}"


def main() -> None:
    """Run all cases, first by the ranks, then by this process."""
    world_size, folder = int(sys.argv[1]), Path(sys.argv[2])
    cases = [Case(**fields) for fields in json.loads(sys.argv[3])]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size), "NODE_RANK": "0",
        "ELSEWHERE_FOLDER": str(folder), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    _import_all(cases)

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        for number, case in enumerate(cases):
            torch.save(train_rank(case, rank, world_size), folder / f"{number}-{rank}.pt")
        dist.destroy_process_group()

    _fork(work, world_size)
    for number, case in enumerate(cases):
        expected = train_alone(case, world_size)
        found = [torch.load(folder / f"{number}-{rank}.pt") for rank in range(world_size)]
        print(json.dumps({**case._asdict(), "deviation": max(deviation(each, expected) for each in found)}))


if __name__ == "__main__":
    main()
