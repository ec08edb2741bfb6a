"""What stands in a run's folder: `config.yaml`, the last checkpoint, and `frozen.json`.

`frozen.json` lists the files that the run reads and never changes, without which its targets would mean something else:
the tokenizer, teachers, visual tokenizers, whatever objectives name. A run does not go on with others, wherever they
lie. Weights may be large, so that of a file above `WHOLE_BYTES` only samples are digested.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2_encoder.checkpoints.download import is_url
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.config.model_choice import EMBEDDED_TOKENIZER, build_model_config
from m2_encoder.config.objective_files import find_files
from m2_encoder.config.old_names import update_names
from m2_encoder.config.paths import LAST_CHECKPOINT as LAST_CHECKPOINT
from m2_encoder.config.paths import RUN_LOCK, find_path, is_debug
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.trusted import check_values_only, find_targets
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import file_sha256, write_json, write_text
from m2_encoder.models.m2_encoder import M2Encoder

CONFIG_FILE: Final = "config.yaml"
FROZEN_FILE: Final = "frozen.json"
CHECK_FILE: Final = "data_check.json"
"""What was found in the sources of the run before its first step, and in which."""

WHOLE_BYTES: Final = 1 << 24
"""Files up to this size are digested whole."""

_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 20, 16

_HEADER: Final = """\
# Resolved configuration of a run. To repeat it, in a folder of its own:
#   m2-train --config-path {folder} --config-name config
"""
_NEEDED: Final[Mapping[str, Mapping[str, type]]] = {
    "run": {"name": str}, "model": {"name": str, "tokenizer": str}, "trainer": {"max_steps": int},
}  # fmt: skip
_PARTS: Final = (
    "data", "objective", "adaptation", "optimizer", "scheduler", "strategy", "cluster", "logger", "callbacks",
    "evaluation", "task",
)  # fmt: skip
UNSAID: Final = {"adaptation": {"_target_": "m2_encoder.training.adaptation.Full"}}
"""What configurations of earlier versions leave out."""


def write_config(path: Path, cfg: Mapping[str, Any]) -> None:
    """Writes the resolved configuration, which composes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.create(dict(cfg)))
    write_text(path, _HEADER.format(folder=f"outputs/{path.parent.name}") + text)


def read_config(path: Path) -> dict[str, Any]:
    """Reads what `write_config` wrote, with today's names of what has moved since.

    Nothing in it is trusted (`config.trusted`): whoever builds an object by it checks its targets.

    Raises:
        UserError: if there is no such file, it is no YAML mapping, or it holds more than values.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the run.name of a run that m2-train has started")
    check_values_only(path)
    try:
        # OmegaConf's reader, because YAML's own takes 1e-05 for a text.
        cfg = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(cfg, dict):
        raise UserError(f"{path}: must hold a mapping")
    _check_form(cfg, path)
    return update_names({str(key): value for key, value in cfg.items()})


def read_run(path: Path, *, needed: Collection[str] = ("run", "model", "trainer")) -> dict[str, Any]:
    """As `read_config`, of a run: the parts that are `needed` are there.

    Raises:
        UserError: see there; also for a part that is missing.
    """
    cfg = read_config(path)
    _refuse_form([name for name in needed if not cfg.get(name)], path)
    _refuse_form([f"{name}.{key}" for name in needed for key in _needed(cfg, name) if key not in cfg[name]], path)
    return cfg


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as flat columns, such as `optimizer.lr`; a list is one value."""

    def walk(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", value

    return dict(walk(config, ""))


def _check_form(cfg: Mapping[Any, Any], path: Path) -> None:
    """Refuse parts that no run has written, as far as they are read without being built."""
    parts = {name: cfg.get(name) for name in (*_NEEDED, *_PARTS)}
    loggers = _mapping(cfg.get("logger"))
    for name in ("objective", "callbacks", "evaluation", *(() if "_target_" in loggers else ("logger",))):
        parts |= {f"{name}.{key}": each for key, each in _mapping(cfg.get(name)).items()}
    wrong = [name for name, part in parts.items() if part is not None and not isinstance(part, dict)]
    for name in _NEEDED:
        part = _mapping(cfg.get(name))
        wrong += [
            f"{name}.{key}" for key, kind in _needed(cfg, name).items() if key in part and not _has(part, key, kind)
        ]
    wrong += [
        f"{name}.weight" for name, part in parts.items() if not _has({"weight": 1} | _mapping(part), "weight", float)
    ]
    _refuse_form(wrong, path)


def _needed(cfg: Mapping[Any, Any], name: str) -> Mapping[str, type]:
    """Kinds of the keys that a part has; somebody else's model need not have a name."""
    is_own = name == "model" and is_foreign(cfg.get(name))
    return {"tokenizer": object, "image_size": int} if is_own else _NEEDED[name]


def _refuse_form(wrong: list[str], path: Path) -> None:
    if wrong:
        rule = f"is no configuration of a run: {wrong[0][:120]} is missing, or of another kind"
        raise UserError(f"{path}: {rule}; restore the file, or give another run.name")


def _has(part: Any, key: str, kind: type) -> bool:
    value = _mapping(part).get(key)
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def fill_in(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every size of its model, also those that it leaves to the model's name.

    What a run has written, of whatever version, and what a command line gives compare equal by it; `num_parameters` is
    no setting, and goes.
    """
    filled = dict(cfg)
    if isinstance(trainer := cfg.get("trainer"), Mapping):
        filled["trainer"] = {"compile": False, **trainer}
    model = {key: value for key, value in _mapping(cfg.get("model")).items() if key != "num_parameters"}
    if "name" in model and not is_foreign(model):
        filled["model"] = model | dataclasses.asdict(build_model_config(model))
    return filled


def with_length(cfg: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the steps that its epochs had in a run, and with what a share of an epoch means.

    The data say how long an epoch is (`runs.length`); this asks what the run has recorded, and does not open them. One
    of other epochs ends later than any.
    """
    keys = ("max_epochs", "max_steps", "val_check_interval", "limit_train_batches", "overfit_batches")
    now, then = ({**dict.fromkeys(keys), **_mapping(each.get("trainer"))} for each in (cfg, before))
    trainer, scheduler = dict(cfg["trainer"]), dict(cfg["scheduler"])
    if isinstance(now["val_check_interval"], float) and now.get("check_val_every_n_epoch", 1) is None:
        trainer["check_val_every_n_epoch"] = 1
    given = now["max_steps"]
    if now["max_epochs"] not in (None, -1):
        same = all(now[key] == then[key] for key in keys if key != "max_steps")
        if same and not 0 < given < then["max_steps"]:
            trainer["max_steps"] = then["max_steps"]
        elif given == -1:
            trainer["max_steps"] = 10**9
    if scheduler.get("max_steps") == given:
        scheduler["max_steps"] = trainer["max_steps"]
    return {**cfg, "trainer": trainer, "scheduler": scheduler}


def clear_debug(folder: Path) -> None:
    """Remove what the last debug run of a name has left; on the first rank.

    Raises:
        UserError: if a run that is none lies there.
    """
    if not is_first_rank() or not folder.is_dir():
        return
    if (folder / CONFIG_FILE).is_file() and not is_debug(read_run(folder / CONFIG_FILE)):
        rule = f"{folder} holds a run that is no debug run; move it, or give another run.name"
        raise UserError(rule, key="run.name", value=folder.name)
    for entry in folder.iterdir():
        if entry.name in (".hydra", Path(RUN_LOCK).name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def count_parameters(cfg: Mapping[str, Any]) -> int:
    """Parameters of the encoder that a configuration names, without making them."""
    with torch.device("meta"):
        model = M2Encoder(build_model_config(cfg["model"]))
    return sum(parameter.numel() for parameter in model.parameters())


class Frozen(NamedTuple):
    """A file that a run reads and never changes."""

    key: str  # of the setting that names it
    value: str  # of that setting
    path: Path  # the file


def find_frozen(cfg: Mapping[str, Any], *, trusted: Collection[str] | None = None) -> dict[str, Frozen]:
    """The files that give a run's ids, codes and teachers their meaning, by the setting that asks for them.

    A file that is not there is left for whoever loads it. Only classes of `trusted` are imported; None for all.
    """
    found: dict[str, Frozen] = {}
    tokenizer = cfg["model"].get("tokenizer")
    if cfg.get("task") is None and isinstance(tokenizer, str) and tokenizer != EMBEDDED_TOKENIZER:
        found["model.tokenizer"] = Frozen("model.tokenizer", tokenizer, find_path(tokenizer))
    files = find_files(cfg.get("objective") or {}, trusted=trusted)
    found |= {file.key: Frozen(*file.locate()) for file in files if not file.is_start}
    weights = cfg["model"].get("weights")
    if isinstance(weights, str) and not is_url(weights) and any(file.is_start for file in files):
        found["model.weights"] = Frozen("model.weights", weights, find_weights(find_path(weights)))
    return {what: each for what, each in found.items() if each.path.is_file()}


def check_frozen(cfg: Mapping[str, Any], folder: Path, *, resumes: bool) -> dict[str, Frozen]:
    """Refuse to go on with other files than a run began with, wherever they lie.

    Returns what `write_frozen` keeps; nothing on all ranks but the first, which alone reads the files.

    Raises:
        UserError: naming the first that differs.
    """
    if not is_first_rank():
        return {}
    frozen = find_frozen(cfg)
    if not resumes:
        return frozen
    before = _read_record(folder / FROZEN_FILE)
    places: dict[str, Frozen] = {}
    if (folder / CONFIG_FILE).is_file():
        places = find_frozen(read_config(folder / CONFIG_FILE), trusted=find_targets(cfg))
    for what, (key, value, path) in frozen.items():
        if what in before:
            origin, same = before[what]["file"], _digest(path, like=before[what]).items() <= before[what].items()
        else:  # the run began before there were digests, or without this file: the same place must do
            origin = str(places[what].path.resolve()) if what in places else ""
            same = origin in ("", str(path.resolve()))
        if not same:
            rule = f"{path} is not the file that this run began with, {origin}: what it learns would change its meaning"
            raise UserError(f"{rule}; restore that file, or give another run.name", key=key, value=value)
    return frozen


def write_frozen(folder: Path, frozen: Mapping[str, Frozen], *, resumes: bool) -> None:
    """Keep what a run reads, beside what it read before if it goes on."""
    before = _read_record(folder / FROZEN_FILE) if resumes else {}
    now = {what: {"file": str(each.path.resolve()), **_digest(each.path)} for what, each in frozen.items()}
    if before or now:
        write_json(folder / FROZEN_FILE, {**before, **now})
    else:
        (folder / FROZEN_FILE).unlink(missing_ok=True)


def _digest(path: Path, *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What tells a file from another one: of small ones all bytes, of large ones the size and samples.

    `like` is an earlier record to compare with; earlier versions digested large files whole.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES or (like is not None and "sha256" in like):
        return {"sha256": file_sha256(path)}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for sample in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return {"size": size, "sampled_sha256": digest.hexdigest()}


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        return {what: {**each, "file": str(each["file"])} for what, each in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is damaged; restore it, or start again with another run.name") from error
