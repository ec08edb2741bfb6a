"""Rules between values, and between values and this machine: ranks, shapes, files, run folders.

Each check asks `Known` for the values it needs and is left out as soon as one of them is missing or already
reported: one mistake, one line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.positions import check_stretch, find_context_length
from m2_encoder.config import callback_relations, data_relations, foreign_relations, objective_relations
from m2_encoder.config.emoji_folder import EMOJI_TARGET, emoji_folder_problems
from m2_encoder.config.known import Known, count_devices, count_gpus, count_ranks, run_check
from m2_encoder.config.loggers import check_loggers
from m2_encoder.config.model_choice import build_model_config, build_tokenizer, takes_files
from m2_encoder.config.objective_files import check_files
from m2_encoder.config.paths import (
    LAST_CHECKPOINT,
    RUN_LOCK,
    anchor,
    default_run_folder,
    find_path,
    has_checkpoint,
    is_debug,
)
from m2_encoder.config.problems import UNSET, find_problems, show
from m2_encoder.config.run_folder import holds_run, is_at_work, is_there
from m2_encoder.config.schema import MODEL_FIELDS, REAL_MODEL_FIELDS, is_foreign
from m2_encoder.data.emoji.dataset import count_training_samples
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.distributed.topology import divisors, resolve_group_size
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.files import find_holder
from m2_encoder.models.config import NAME_TO_CONFIG, M2EncoderConfig

MAX_CPU_RANKS: Final = 8
_FORGETTING_TARGET: Final = "m2_encoder.evaluation.tasks.forgetting.Forgetting"
_FULL_TARGET: Final = "m2_encoder.training.adaptation.Full"
_TOKENIZER_TARGET: Final = "m2_encoder.training.visual_tokenizer_module.VisualTokenizerModule"
_SINGLE_TARGET: Final = "m2_encoder.strategies.single.LocalStrategy"
_FSDP_TARGET: Final = "m2_encoder.strategies.grouped_fsdp.GroupedFSDPStrategy"
_FSDP_PRECISIONS: Final = ("32-true", "bf16-mixed", "bf16-true", "16-true", "32", "bf16", 32)
_MUON_TARGET: Final = "m2_encoder.training.optim.build_muon"
_GPU_PRECISIONS: Final = ("16-mixed", "16-true", "16", 16)
_SIZES: Final = tuple(field for field in MODEL_FIELDS if field not in REAL_MODEL_FIELDS)


def check_relations(cfg: Mapping[str, Any], reported: set[str], *, on_this_machine: bool = True) -> list[Problem]:
    """Every rule that looks at more than one value; what depends on reported keys is left out."""
    reported = set(reported)  # grows, so that one mistake does not come up again in a later check
    known = Known(cfg, reported)
    problems: list[Problem] = []
    for check in _CHECKS:
        if on_this_machine or check not in _MACHINE_CHECKS:
            found = run_check(check, known)
            reported |= {problem.key for problem in found}
            problems += found
    return problems


def _check_model(known: Known) -> Iterator[Problem]:
    """What the model's own constructor refuses; a size that is reported already counts as its name's."""
    if known.has("model._target_"):
        return  # `foreign_model.check_model`
    wrong = [field for field in _SIZES if known(f"model.{field}", UNSET) is UNSET and known.has(f"model.{field}")]
    sizes = {field: None if field in wrong else known(f"model.{field}", None) for field in _SIZES}
    try:
        stretched = known("model.stretch_positions", None)
        build_model_config({"name": known("model.name"), "stretch_positions": stretched, **sizes})
    except UserError as error:
        for problem in find_problems(error.under("model")):
            if not any(problem.key == f"model.{field}" or f"{field}=" in problem.rule for field in wrong):
                yield problem


def _check_weights(known: Known) -> Iterator[Problem]:
    weights = known("model.weights", None)
    if weights is not None and not weights.startswith(("http://", "https://")) and not find_path(weights).exists():
        fix = "give the path of a checkpoint, or null to train from scratch"
        yield Problem("model.weights", weights, "no such file", fix)
    for name in ("num_prompts", "adapter_width", "mixture_copies"):
        if weights is None and (value := known(f"model.{name}", None)):
            fix = "use adaptation=prompts, adapters or mixture, or add model.weights=FILE"
            yield Problem(f"model.{name}", value, "is of weights that were adapted, and there are none", fix)
    for name, node in (known("evaluation", None) or {}).items():
        if weights is None and isinstance(node, Mapping) and node.get("_target_") == _FORGETTING_TARGET:
            fix = "add model.weights=FOLDER of m2-export or FILE, or leave it out of evaluation"
            yield Problem(f"evaluation.{name}", NOTHING, "compares with what a run starts from, model.weights", fix)


def _check_stretch(known: Known) -> Iterator[Problem]:
    """Whether positions of the weights are stretched to something longer; weights at a url are not known yet."""
    keep, weights = known("model.stretch_positions"), known("model.weights")
    if keep is None or known.has("model._target_"):
        return
    if weights is None:
        yield Problem("model.stretch_positions", keep, "there are no weights to stretch", "add model.weights=FILE")
    elif not is_url(weights):
        name = known("model.name")
        new = known("model.context_length") or NAME_TO_CONFIG[name].context_length
        try:
            check_stretch(keep, old=find_context_length(find_path(weights), model=name), new=new)
        except UserError as error:
            yield from find_problems(error.under("model"))


def _check_tokenizer(known: Known) -> Iterator[Problem]:
    name = known("model.tokenizer")
    if isinstance(name, Mapping):
        return  # somebody else's, with somebody else's model
    try:
        tokenizer = build_tokenizer({"tokenizer": name}, M2EncoderConfig())
    except UserError as error:
        yield Problem("model.tokenizer", name, " ".join(error.text.split()))
        return
    if known.has("model._target_"):
        return
    vocab_size = known("model.vocab_size") if known.has("model.vocab_size") else None
    if vocab_size is None:
        vocab_size = NAME_TO_CONFIG[known("model.name")].vocab_size
    if tokenizer.vocab_size > vocab_size:
        rule = f"must be at least {tokenizer.vocab_size}, the pieces of model.tokenizer={name}"
        fix = f"for example model.vocab_size={tokenizer.vocab_size}, or give another tokenizer"
        yield Problem("model.vocab_size", vocab_size, rule, fix)
        return
    if mapped := known("model.map_tokenizer", None):
        if known("model.weights", None) is None:
            yield Problem("model.map_tokenizer", mapped, "there are no weights to map", "add model.weights=FILE")
        if isinstance(mapped, str) and not find_path(mapped).is_file():
            yield Problem("model.map_tokenizer", mapped, "no such file", "give true, or the tokenizer of the weights")
        if tokenizer.vocab_size != vocab_size:
            rule = f"must be {tokenizer.vocab_size}, the pieces of model.tokenizer={name}, where pieces are mapped"
            yield Problem("model.vocab_size", vocab_size, rule, f"use model.vocab_size={tokenizer.vocab_size}")


def _check_length(known: Known) -> Iterator[Problem]:
    """How long a run is, by steps and by epochs."""
    for name in ("steps", "epochs"):
        least, most = known(f"trainer.min_{name}", None), known(f"trainer.max_{name}", None)
        if least is not None and most not in (None, -1) and least > most:
            fix = f"for example trainer.min_{name}={most}"
            yield Problem(f"trainer.min_{name}", least, f"must not exceed trainer.max_{name}={most}", fix)
    if known("trainer.max_steps") == -1 and known("trainer.max_epochs", -1) in (None, -1):
        fix = "give trainer.max_steps, or trainer.max_epochs; trainer.max_time alone does not tell the schedule its end"
        yield Problem("trainer.max_steps", -1, "must end somewhere, as there is no trainer.max_epochs either", fix)


def check_steps(known: Known) -> Iterator[Problem]:
    """Whether the warm-up ends before the run; asked again when the steps of an epoch are known."""
    warmup, steps = known("scheduler.warmup_steps"), known("trainer.max_steps")
    if warmup > steps != -1:
        fix = f"for example scheduler.warmup_steps={steps // 10}"
        yield Problem("scheduler.warmup_steps", warmup, f"must be in 0..trainer.max_steps={steps}", fix)


def _check_devices(known: Known) -> Iterator[Problem]:
    if known("cluster.name", "local") == "slurm":
        return  # the machine that trains is another one
    accelerator, devices, gpus = known("trainer.accelerator"), known("trainer.devices"), count_gpus(known)
    if gpus == 0:
        fix = "use trainer.accelerator=cpu or auto"
        yield Problem("trainer.accelerator", accelerator, "must be a device of this machine, which has no GPU", fix)
        return
    available = max(MAX_CPU_RANKS, os.cpu_count() or 1) if gpus is None else gpus
    wanted = max(devices) + 1 if isinstance(devices, list) else count_devices(devices, available)
    if wanted > available:
        what = f"{available} processes on this machine's CPU" if gpus is None else f"the {gpus} GPU(s) of this machine"
        yield Problem("trainer.devices", devices, f"must not exceed {what}", f"for example trainer.devices={available}")
    if gpus is None and known("trainer.precision", None) in _GPU_PRECISIONS:
        fix = "use trainer.precision=bf16-mixed or 32-true"
        yield Problem("trainer.precision", known("trainer.precision"), "must be one that the CPU can compute", fix)


def _check_compiled(known: Known) -> Iterator[Problem]:
    if not known("trainer.compile", False):
        return
    fix = "use trainer.compile=false"
    if known("task", None) is not None:
        yield Problem("trainer.compile", True, "has no meaning here: it compiles the layers of an encoder", fix)
    elif is_foreign(known("model", None)):
        rule = "compiles the layers of this project's encoder alone, and model is another"
        yield Problem("trainer.compile", True, rule, f"{fix}, and call compile() in the constructor of the model")
    elif known("strategy._target_", None) == _FSDP_TARGET:
        rule = "is not proven with strategy=grouped_fsdp, which gathers the weights of a layer when that is called"
        yield Problem("trainer.compile", True, rule, f"{fix}, or strategy=grouped_ddp")
    elif count_gpus(known) is None and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        yield Problem(
            "trainer.compile", True, "needs a C++ compiler on the CPU, and there is none", f"install g++, or {fix}"
        )


def _check_ranks(known: Known) -> Iterator[Problem]:
    ranks = count_ranks(known)
    if ranks > 1 and known("strategy._target_", None) == _SINGLE_TARGET:
        rule = f"must be one that lets ranks cooperate: there are {ranks} (trainer.devices x trainer.num_nodes)"
        yield Problem("strategy", "single", rule, "use strategy=ddp or grouped_ddp, or trainer.devices=1")
    batch = known("data.global_batch_size")
    if isinstance(batch, int) and batch % ranks:
        fix = f"for example data.global_batch_size={max(1, batch // ranks) * ranks}"
        yield Problem("data.global_batch_size", batch, f"must be a multiple of the {ranks} ranks", fix)


def _check_groups(known: Known) -> Iterator[Problem]:
    size, nodes = known("strategy.group_size", None), known("strategy.group_nodes", None)
    ranks = count_ranks(known)
    per_node = ranks // known("trainer.num_nodes")
    try:
        resolve_group_size(world_size=ranks, ranks_per_node=per_node, group_size=size, group_nodes=nodes)
    except UserError as error:
        yield from find_problems(error)


def _check_micro_batches(known: Known) -> Iterator[Problem]:
    pieces, ranks, batch = known("strategy.micro_batches", 1), count_ranks(known), known("data.global_batch_size")
    if not isinstance(batch, int):
        return
    rows = batch // ranks
    if rows % pieces:
        fits = max(d for d in divisors(rows) if d < pieces)
        rule = f"must divide the {rows} rows of a rank (data.global_batch_size={batch} over {ranks} rank(s))"
        yield Problem("strategy.micro_batches", pieces, rule, f"for example strategy.micro_batches={fits}")


def _check_sharding(known: Known) -> Iterator[Problem]:
    if known("strategy._target_", None) != _FSDP_TARGET:
        return
    if known("optimizer._target_", None) == _MUON_TARGET:
        rule = "must be one that needs no whole matrices, which strategy=grouped_fsdp splits over ranks"
        yield Problem("optimizer", "muon", rule, "use optimizer=adamw, or strategy=grouped_ddp")
    if (precision := known("trainer.precision", "32-true")) not in _FSDP_PRECISIONS:
        rule = f"must be one of {', '.join(map(str, _FSDP_PRECISIONS[:4]))} with strategy=grouped_fsdp"
        yield Problem("trainer.precision", precision, rule, "use trainer.precision=bf16-mixed")
    if count_ranks(known) > 1 and (chunk := known("data.eval_batch_size", 2)) < 2:
        rule = "must be 2 or more with strategy=grouped_fsdp, whose ranks must all encode the same number of batches"
        yield Problem("data.eval_batch_size", chunk, rule, "for example data.eval_batch_size=256")


def _check_cluster(known: Known) -> Iterator[Problem]:
    cluster, nodes = known("cluster.name"), known("trainer.num_nodes")
    if cluster == "local" and nodes > 1:
        fix = "use cluster=slurm or cluster=torchrun, or trainer.num_nodes=1"
        yield Problem("trainer.num_nodes", nodes, "must be 1 with cluster=local, which is this machine", fix)
    if cluster == "slurm" and shutil.which("srun") is None:
        yield Problem("cluster", "slurm", "there is no srun on this machine", "start from a SLURM login node")
    if cluster != "torchrun":
        return
    started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is None:
        fix = "torchrun --nproc-per-node=N -m m2_encoder.cli.train ..., or cluster=local"
        yield Problem("cluster", "torchrun", "must be started by torchrun", fix)
    elif started != str(count_ranks(known)):
        rule = f"must give the {started} ranks that torchrun started, times trainer.num_nodes={nodes}"
        yield Problem("trainer.devices", known("trainer.devices"), rule, "make both the same")


def _check_training_set(known: Known) -> Iterator[Problem]:
    batch, heldout = known("data.global_batch_size"), known("data.heldout_style")
    if known("data._target_", None) != EMOJI_TARGET:
        return
    size = count_training_samples(heldout)
    if batch > size:
        fix = "for example data.global_batch_size=256"
        yield Problem("data.global_batch_size", batch, f"must not exceed the {size} training samples", fix)


def _check_tokenizer_task(known: Known) -> Iterator[Problem]:
    if known("task._target_") != _TOKENIZER_TARGET:
        return
    if count_ranks(known) > 1 or known("strategy._target_", _SINGLE_TARGET) != _SINGLE_TARGET:
        rule = "must be single, on one device: the codes follow the batch of one process"
        yield Problem("strategy", NOTHING, rule, "use strategy=single trainer.devices=1")
        return
    for key, neutral in (("micro_batches", 1), ("activation_checkpointing", False)):
        if (value := known(f"strategy.{key}", neutral)) != neutral:
            rule = "has no meaning for a visual tokenizer, which is small"
            yield Problem(f"strategy.{key}", value, rule, f"use strategy.{key}={show(neutral)}")
    if (weights := known("model.weights", None)) is not None:
        rule = "must be null: of the model only the sizes of images and patches count here"
        yield Problem("model.weights", weights, rule, "use model.weights=null")
    if (adaptation := known("adaptation._target_", _FULL_TARGET)) != _FULL_TARGET:
        rule = "must be full: a visual tokenizer is trained as a whole"
        yield Problem("adaptation._target_", adaptation, rule, "use adaptation=full")


def _check_task_heads(known: Known) -> Iterator[Problem]:
    width, heads = known("task.embed_dim"), known("task.num_heads")
    if known("task._target_") == _TOKENIZER_TARGET and width % heads:
        fits = min(divisors(width), key=lambda divisor: (abs(divisor - heads), -divisor))
        rule = f"must divide task.embed_dim={width}"
        yield Problem("task.num_heads", heads, rule, f"for example task.num_heads={fits}")


def _check_folders(known: Known) -> Iterator[Problem]:
    """Folders that cannot be written, a run's that is in use, or one that is missing where it has to be there."""
    for key in ("run.folder", "data.folder"):
        if isinstance(value := known(key, None), str) and (reason := _unusable(anchor(value))):
            yield Problem(key, value, reason, "give a folder that you may write to")
    name, resume = known("run.name"), known("run.resume")
    run = {"name": name, "folder": known("run.folder"), "debug": known("run.debug", False)}
    tries = is_debug({"run": run, "trainer": {"fast_dev_run": known("trainer.fast_dev_run", False)}})
    folder = default_run_folder({"run": {**run, "debug": tries}})
    if not is_first_rank() or _unusable(folder):
        return  # the first rank decides, before the others start
    if (holder := find_holder(folder / RUN_LOCK)) is not None:
        yield is_at_work(name, holder)
        return
    if tries:
        return  # it begins anew, whatever is there
    if resume == "never" and holds_run(folder):
        yield is_there(name, folder)
    if resume == "must" and not has_checkpoint(folder):
        fix = "give the run.name of a run with a checkpoint, or run.resume=auto to start it if there is none"
        yield Problem("run.resume", resume, f"there is no checkpoint in {(folder / LAST_CHECKPOINT).parent}", fix)


def _check_emoji_folder(known: Known) -> Iterator[Problem]:
    if known("data._target_", None) == EMOJI_TARGET:
        settings = {"heldout_style": known("data.heldout_style")}
        yield from emoji_folder_problems("data.folder", known("data.folder"), settings)


_CHECKS: Final[tuple[Callable[[Known], Iterator[Problem]], ...]] = (
    _check_model,
    _check_weights,
    _check_stretch,
    _check_tokenizer,
    _check_length,
    check_steps,
    objective_relations.check_kinds,
    objective_relations.check_weights,
    objective_relations.check_schedules,
    objective_relations.check_shared_passes,
    objective_relations.check_captions,
    objective_relations.check_routing,
    check_files,
    objective_relations.build_objectives,
    _check_devices,
    _check_compiled,
    _check_ranks,
    _check_groups,
    objective_relations.check_components,
    _check_micro_batches,
    _check_sharding,
    _check_cluster,
    _check_training_set,
    data_relations.check_source_weights,
    data_relations.check_lanes,
    data_relations.check_shards,
    data_relations.check_validation,
    foreign_relations.check_task,
    foreign_relations.check_towers,
    foreign_relations.check_scheduler,
    _check_tokenizer_task,
    _check_task_heads,
    callback_relations.check_kept,
    callback_relations.check_best,
    callback_relations.check_average,
    callback_relations.check_validations,
    _check_folders,
    _check_emoji_folder,
    check_loggers,
)

_MACHINE_CHECKS: Final = (
    _check_devices, _check_cluster, check_files, data_relations.check_shards, data_relations.check_validation,
    check_loggers,
)  # fmt: skip


def _unusable(folder: Path) -> str | None:
    """Why a folder cannot be made or written, or None."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not takes_files(existing):
        return f"{existing} may not be written"
    return None
