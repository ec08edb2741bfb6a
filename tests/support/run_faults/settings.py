"""Faults of configurations: of strangers, and of the user."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.support.run_faults.case import STEPS, Place, RunFault, Told

Act = Callable[[Place], Told]


def saved_configurations() -> tuple[RunFault, ...]:
    """Of a folder from a stranger."""
    refused = "is named by a saved configuration, which could run any code by it"
    return (
        RunFault("configuration whose _target_ is foreign code, by --config-path", refused, _stranger("foreign")),
        RunFault("the same in a run that goes on", refused, _stranger_resumed),
        RunFault("the same in a run that is exported", refused, _stranger_exported, is_slow=True),
        RunFault("_target_ of a function that deletes folders", refused, _stranger("function")),
        RunFault("configuration with Hydra's own settings", "holds hydra", _stranger("hydra")),
        RunFault("configuration with a resolver", "a saved configuration has values only", _stranger("resolver")),
        RunFault("configuration that links to /dev/zero", "config", _stranger("endless")),
    )


def resumed() -> tuple[RunFault, ...]:
    """Of a run that goes on with other settings."""
    decides = "whose checkpoint decides"
    return (
        RunFault("resumed with another learning rate", decides, _resume("optimizer.lr=0.02")),
        RunFault("resumed with another weight decay", decides, _resume("optimizer.weight_decay=0.0"), is_slow=True),
        RunFault("resumed with another seed", decides, _resume("seed=4"), is_slow=True),
        RunFault("resumed with another optimizer", "must be", _resume("optimizer=muon")),
        RunFault("resumed with another size of the model", "must be 32", _resume("model.embed_dim=64"), is_slow=True),
        RunFault("resumed with other weights to start from", decides, _other_weights),
        RunFault(
            "resumed with another setting after the last step",
            "changes nothing, as all 2 steps are done",
            _resume("objective.itc.label_smoothing=0.1", max_steps=STEPS),
        ),
        RunFault("started again under the name of a finished run", "run.resume=auto", _again),
        RunFault("resumed without a run", "run.resume=must", _train("run.resume=must")),
    )


def settings() -> tuple[RunFault, ...]:
    """Of a command line."""
    return (
        RunFault("key that does not exist", "optimizer.rate", _train("optimizer.rate=1")),
        RunFault("text where a number belongs", "optimizer.lr=fast", _train("optimizer.lr=fast")),
        RunFault("number out of its bounds", "optimizer.lr=-1", _train("optimizer.lr=-1")),
        RunFault(
            "new entry without its +", r"\+data\.validation\.mine", _train("data.validation.mine=x", "data=webdataset")
        ),
        RunFault("model of absurd width", "embed_dim", _train("model.embed_dim=1000000000000")),
        RunFault("model of absurd depth", "num_layers", _train("model.num_layers=1000000000")),
        RunFault(
            "batch of absurd size", "global_batch_size", _train("data.global_batch_size=1000000000000"), is_slow=True
        ),
        RunFault("absurd number of workers", "num_workers", _train("data.num_workers=1000000")),
        RunFault("absurd number of devices", "devices", _train("trainer.devices=1000000")),
        RunFault("run name that leaves its folder", "run.name", _train("run.name=../x")),
        RunFault("run name of 300 letters", "run.name", _train(f"run.name={'n' * 300}")),
        RunFault("run name in Chinese", "实验一", _chinese, 0, "checkpoints, export and metrics"),
        RunFault("folder of runs that is a file", "run.folder", _file_as_folder),
        RunFault("sweep whose jobs are all wrong", "optimizer.lr=-1", _train("-m", "optimizer.lr=-1", "seed=0,1")),
    )


def _train(*lines: str) -> Act:
    return lambda place: place.told(place.train, *lines)


def _resume(*lines: str, max_steps: int = STEPS + 1) -> Act:
    def act(place: Place) -> Told:
        assert place.run.is_dir()
        return place.told(place.resume, f"trainer.max_steps={max_steps}", *lines)

    return act


def _other_weights(place: Place) -> Told:
    return _resume(f"model.weights={place.export / 'model.safetensors'}")(place)


def _again(place: Place) -> Told:
    assert place.run.is_dir()
    return place.told(place.train)


def _trap(folder: Path) -> None:
    """A module that leaves a mark when it is imported or called."""
    mark = folder / "mark"
    text = f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef run(**_): Path({str(mark)!r}).touch()\n"
    (folder / "trap_of_a_stranger.py").write_text(text)


_LINES = {
    "foreign": "objective:\n  own: {_target_: trap_of_a_stranger.run}",
    "function": "objective:\n  own: {_target_: m2_encoder.files.shutil.rmtree, path: x}",
    "hydra": "hydra: {callbacks: {own: {_target_: trap_of_a_stranger.run}}}\nobjective:",
    "resolver": "own: ${oc.env:HOME}\nobjective:",
}


def _spoil(config: Path, kind: str) -> None:
    if kind == "endless":
        config.unlink()
        config.symlink_to("/dev/zero")
    else:
        text = config.read_text()
        assert "objective:\n" in text
        config.write_text(text.replace("objective:", _LINES[kind], 1))


def _untouched(place: Place, act: Callable[[], Told]) -> Told:
    """What a command says while the trap could be imported."""
    _trap(place.folder)
    with mock.patch.object(sys, "path", [str(place.folder), *sys.path]):
        told = act()
    assert "trap_of_a_stranger" not in sys.modules
    return told._replace(kept="CODE WAS EXECUTED") if (place.folder / "mark").exists() else told


def _stranger(kind: str) -> Act:
    def act(place: Place) -> Told:
        _spoil(place.run / "config.yaml", kind)
        lines = ("--config-path", str(place.run), "--config-name", "config", "run.name=mine")
        return _untouched(place, lambda: place.told(place.plain_train, *lines))

    return act


def _stranger_resumed(place: Place) -> Told:
    _spoil(place.run / "config.yaml", "foreign")
    lines = ("--config-path", str(place.run), "--config-name", "config", "run.resume=must", "trainer.max_steps=3")
    return _untouched(place, lambda: place.told(place.plain_train, *lines))


def _stranger_exported(place: Place) -> Told:
    config = place.run / "config.yaml"
    config.write_text(config.read_text().replace("m2_encoder.training.adaptation.Full", "trap_of_a_stranger.run"))
    return _untouched(place, lambda: place.told(place.export_run))


def _chinese(place: Place) -> Told:
    ended = place.train("run.name=实验一", "trainer.max_steps=1")
    found = [name for name in ("checkpoints", "export", "metrics.jsonl") if (place.folder / "实验一" / name).exists()]
    return Told(
        ended.code, f"{ended.out}\n{ended.err}", "checkpoints, export and metrics" if len(found) == 3 else str(found)
    )


def _file_as_folder(place: Place) -> Told:
    (place.folder / "f").write_text("")
    return place.told(place.train, f"run.folder={place.folder / 'f'}")
