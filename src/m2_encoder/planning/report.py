"""A plan as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from m2_encoder.planning.communication import METHODS
from m2_encoder.planning.cost import ModelCost
from m2_encoder.planning.hardware import Hardware
from m2_encoder.planning.memory import PEAK_BYTES_PER_LOGIT
from m2_encoder.planning.search import Request, ScalingPoint
from m2_encoder.planning.setting import Setting
from m2_encoder.planning.step import Prediction

NOT_MODELLED: Final = (
    "congestion, other jobs, and topology beyond the two levels of nodes and what joins them;",
    "loading and decoding data, launching kernels, compilation, validation, checkpoints;",
    "that small batches use a device less well than large ones: one `mfu` holds for all;",
    "padding inside attention, fragments of memory beyond `reserved_memory_gb`, offloading;",
    "identities of several positives (8 bytes a row), the one-sided form of the loss, Muon's state;",
    "ranks that are slow for good (they delay every method alike), and failures;",
    "what a larger contrastive batch is worth: fewer negatives make a faster step, not a better model.",
)
_MAX_ROWS: Final = 6
_TITLES: Final = {"local_loss": "local loss", "full_logits": "full logits", "local_form": "GBA-ITC"}


def print_plan(
    console: Console,
    cost: ModelCost,
    request: Request,
    best: Sequence[Prediction],
    baselines: Sequence[Prediction],
    *,
    cluster: str,
    train: str,
) -> None:
    """Print the predictions, the best first, and the m2-train command for the best one."""
    chosen = best[0]
    pair = (cost.forward_flops + cost.backward_flops) / 1e12
    lines = [
        f"{cost.name}: {cost.parameters / 1e6:,.0f} M parameters, {cost.trainable_parameters / 1e6:,.0f} M trained, "
        f"{pair:.3g} TFLOP a pair; {cluster}: {request.world_size:,} ranks, {request.memory_gb:g} GB each",
        f"{request.global_rows:,} rows a step; {_choice(chosen.setting, request)}:",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(settings_table([*best[:_MAX_ROWS], *baselines], request, num_best=min(len(best), _MAX_ROWS)))
    shown = [chosen, *baselines]
    console.print(parts_table(shown, "time", title=f"{'a step, ms':<22}", scale=1e3))
    console.print(parts_table(shown, "memory", title=f"{'memory of a rank, GB':<22}", scale=1e-9))
    naive_head = baselines[-1]
    never = f"{chosen.logits:,} logits a rank and step never exist, {_bytes(PEAK_BYTES_PER_LOGIT * chosen.logits)}"
    naive = f"all logits on every rank: {naive_head.logits:,}, {_bytes(naive_head.memory.contrast)} at a time"
    console.print(f"{never} of a materialised head; {naive}.", soft_wrap=True, highlight=False)
    console.print(f"m2-train {train}", soft_wrap=True, highlight=False, markup=False, style="bold")
    console.print("\nPredicted, not measured. Not modelled:", highlight=False)
    for line in NOT_MODELLED:
        console.print(f"  {line}", soft_wrap=True, highlight=False, style="dim")


def _choice(setting: Setting, request: Request) -> str:
    """The heading of the table: a search over group sizes, or the group size that was given."""
    if request.group_size is None:
        return f"the fastest setting of each group size that contrasts {request.contrasted_rows:,} rows or more"
    rows = setting.group_size * setting.micro_batches * setting.rows
    fewer = f", not the {request.contrasted_rows:,} of group_batch_size" if rows < request.contrasted_rows else ""
    return f"groups of {setting.group_size} as given, which contrast {rows:,} rows{fewer}"


def settings_table(predictions: Sequence[Prediction], request: Request, *, num_best: int) -> Table:
    """One line a setting; a line separates the first `num_best` from the baselines."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    headings = (
        "\ng", "\nk", "\nB", "rows con-\ntrasted", "encoded\nagain", "memory\nGB", "step\nms", "\npairs/s",
        "sent\nMB", "collec-\ntives",
    )  # fmt: skip
    for heading in ("\nmethod", "\nstrategy"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, item in enumerate(predictions):
        setting, memory = item.setting, item.memory.total / 1e9
        table.add_row(
            _TITLES[setting.method],
            setting.strategy.removeprefix("grouped_"),
            f"{setting.group_size:,}",
            f"{setting.micro_batches:,}",
            f"{setting.rows:,}",
            f"{setting.contrasted_rows:,}",
            _again(setting),
            f"{memory:,.1f}" if memory <= request.memory_gb else f"[red]{memory:,.1f}!",
            f"{1e3 * item.time.total:,.1f}",
            f"{item.pairs_per_s:,.0f}",
            f"{item.communication.bytes_sent / 1e6:,.1f}",
            f"{item.communication.collectives:,}",
            style="bold" if index == 0 else "dim" if index >= num_best else "",
            end_section=index == num_best - 1,
        )
    return table


def parts_table(predictions: Sequence[Prediction], part: str, *, title: str, scale: float) -> Table:
    """Where the time of a step or the memory of a rank goes, a column for each prediction."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column(title, no_wrap=True)
    for item in predictions:
        table.add_column(_TITLES[item.setting.method], justify="right", no_wrap=True)
    *rows, total = _part_rows(predictions, part, scale)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total, style="bold")
    return table


def adaptation_table(adapted: Prediction, whole: Prediction) -> Table:
    """What an adaptation spares: the same setting with everything trained beside it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for heading, justify in (("the same setting", "left"), ("adapted", "right"), ("full", "right"), ("ratio", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rows = {
        "weights, GB": [each.memory.weights / 1e9 for each in (adapted, whole)],
        "gradients, GB": [each.memory.gradients / 1e9 for each in (adapted, whole)],
        "optimizer's state, GB": [each.memory.optimizer / 1e9 for each in (adapted, whole)],
        "activations, GB": [each.memory.activations / 1e9 for each in (adapted, whole)],
        "memory of a rank, GB": [each.memory.total / 1e9 for each in (adapted, whole)],
        "gradients sent, MB": [each.gradient_bytes / 1e6 for each in (adapted, whole)],
        "a step, ms": [each.time.total * 1e3 for each in (adapted, whole)],
    }
    for name, (mine, full) in rows.items():
        table.add_row(name, f"{mine:,.2f}", f"{full:,.2f}", f"{mine / full:.2f}" if full else "")
    return table


def _part_rows(predictions: Sequence[Prediction], part: str, scale: float) -> list[list[str]]:
    """A line for every part that any prediction has, and the total last."""
    tuples = [getattr(item, part) for item in predictions]
    names = [*(name for name in tuples[0]._fields if any(getattr(values, name) for values in tuples)), "total"]
    return [[name.replace("_", " "), *(f"{scale * getattr(values, name):,.1f}" for values in tuples)] for name in names]


def train_overrides(cfg: Mapping[str, Any], setting: Setting, hardware: Hardware) -> str:
    """The overrides with which m2-train uses a setting."""
    devices = min(setting.world_size, hardware.devices_per_node)
    words = [
        f"model={cfg['model']}",
        *([] if cfg["image_size"] is None else [f"model.image_size={cfg['image_size']}"]),
        f"trainer.precision={cfg['precision']}",
        *(["'objective.itc.heads=[features,backbone_features]'"] if cfg["heads"] == 2 else []),
        *(["objective.itc.feature_dtype=bfloat16"] if setting.feature_bytes == 2 else []),
        f"trainer.devices={devices}",
        f"trainer.num_nodes={setting.world_size // devices}",
        f"strategy={setting.strategy}",
        f"strategy.group_size={setting.group_size}",
        f"strategy.micro_batches={setting.micro_batches}",
        *(["strategy.recompute=false"] if setting.micro_batches > 1 and not setting.recompute else []),
        *(["strategy.activation_checkpointing=true"] if setting.activation_checkpointing else []),
        f"data.global_batch_size={setting.global_rows}",
        *(["cluster=slurm"] if setting.world_size > devices else []),
    ]
    return " ".join(words)


def to_report(
    cost: ModelCost,
    hardware: Hardware,
    request: Request,
    best: Sequence[Prediction],
    baselines: Sequence[Prediction],
    scaling: Sequence[ScalingPoint],
    whole: Prediction | None = None,
) -> dict[str, Any]:
    """Everything as plain values, ready for JSON."""
    return {
        "best": to_plain(best[0]),
        "by_group_size": [to_plain(item) for item in best],
        "baselines": {item.setting.method: to_plain(item) for item in baselines},
        "scaling": [
            {key: to_plain(value) if isinstance(value, Prediction) else value for key, value in point._asdict().items()}
            for point in scaling
        ],
        **({} if whole is None else {"trained_whole": to_plain(whole)}),
        "model": dataclasses.asdict(cost),
        "hardware": dataclasses.asdict(hardware),
        "wish": dataclasses.asdict(request),
        "methods": METHODS,
        "not_modelled": list(NOT_MODELLED),
        "units": {"time": "s", "memory": "bytes", "bytes": "sent by one rank in one optimizer step"},
    }


def to_plain(item: Prediction) -> dict[str, Any]:
    """One prediction as plain values; seconds and bytes."""
    return {
        **dataclasses.asdict(item.setting),
        "global_rows": item.setting.global_rows,
        "contrasted_rows": item.setting.contrasted_rows,
        "pairs_per_s": item.pairs_per_s,
        "step_s": item.time.total,
        "time": item.time._asdict(),
        "memory_bytes": item.memory.total,
        "memory": item.memory._asdict(),
        "contrast_bytes_sent": item.communication.bytes_sent,
        "contrast_collectives": item.communication.collectives,
        "gradient_bytes_sent": item.gradient_bytes,
        "logits": item.logits,
    }


def _again(setting: Setting) -> str:
    if setting.encodes_again and setting.activation_checkpointing:
        return "both"
    return "micro-batches" if setting.encodes_again else "layers" if setting.activation_checkpointing else "-"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
