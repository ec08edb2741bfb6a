"""Faults of exports, weights and checkpoints."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch

from m2_encoder.checkpoints import digests
from m2_encoder.checkpoints.visual_tokenizer import save_visual_tokenizer
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from tests.support.damage import Attack, cut, flip, hostile_safetensors, safetensors_entry, train_other_tokenizer
from tests.support.run_faults.case import STEPS, Place, RunFault, Told

Act = Callable[[Place], Told]


def exports() -> tuple[RunFault, ...]:
    """Of a model that `m2-evaluate` reads, or that `m2-train` starts from."""
    return (
        RunFault(
            "flipped bit in the weights of an export", "damaged: its tensors", _export(lambda e: flip(e / _W, 0.7))
        ),
        RunFault("weights of an export cut in half", "damaged", _export(lambda e: cut(e / _W))),
        RunFault("weights of an export missing", "model.safetensors", _export(lambda e: (e / _W).unlink())),
        RunFault("tokenizer of an export cut in half", "tokenizer", _export(lambda e: cut(e / _T))),
        RunFault("tokenizer of an export replaced by another", "tokenizer", _export(_other_tokenizer)),
        RunFault("NaN in the weights of an export", "NaN", _export(_with_nan)),
        RunFault("config.json with an absurd size", "embed_dim=", _export(_edit_config(embed_dim=10**12))),
        RunFault("config.json nested 100,000 deep", "config.json", _export(_write_config(b"[" * 100_000))),
        RunFault("config.json that is a pipe", "config.json", _export(_pipe)),
        RunFault("config.json that links to /dev/zero", "config.json", _export(_endless)),
        RunFault("visual tokenizer in place of an encoder", "is a visual tokenizer", _visual_tokenizer),
        RunFault("pickled code as weights", "could execute code", _weights(_attack), kept="nothing was executed"),
        RunFault(
            "hostile header of safetensors",
            "not a safetensors file",
            _weights(lambda p: p.write_bytes(hostile_safetensors(safetensors_entry(), bytes(8), size=2**62))),
        ),
        RunFault(
            "safetensors whose tensors lie outside of the file",
            "not a safetensors file",
            _weights(
                lambda p: p.write_bytes(hostile_safetensors(safetensors_entry(data_offsets=[0, 4000], shape=[1000])))
            ),
        ),
        RunFault(
            "pointer of Git LFS as weights",
            "w.ckpt",
            _weights(lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
        ),
        RunFault("weights of another model", "none of its", _weights(_other_model)),
        RunFault("NaN in weights that a run starts from", "NaN", _nan_weights),
        RunFault("weights that are a folder of something else", "w.ckpt", _weights(lambda p: p.mkdir())),
    )


def checkpoints() -> tuple[RunFault, ...]:
    """Of a run that goes on, or is exported."""
    first = "continues at step 1, steps 1 to 3 once each"
    second = "continues at step 2, steps 1 to 3 once each"
    whole = "is the newest whole checkpoint"
    return (
        RunFault("flipped bit in the weights of the newest checkpoint", whole, _resume(_damage_newest(0.3)), 0, first),
        RunFault("flipped bit in its optimizer state", whole, _resume(_damage_newest(0.9)), 0, first),
        RunFault("newest checkpoint cut in half", whole, _resume(_cut_newest), 0, first, is_slow=True),
        RunFault("last.ckpt missing", whole, _resume(lambda c: (c / _LAST).unlink()), 0, second),
        RunFault("last.ckpt a folder", whole, _resume(_folder_as_last), 0, second),
        RunFault("last.ckpt a link to nothing", whole, _resume(_dangling_last), 0, second, is_slow=True),
        RunFault("file of a save that was killed", "continuing at step 2", _resume(_partial), 0, second),
        RunFault("all checkpoints damaged", "no whole checkpoint", _refused_resume(_cut_all)),
        RunFault("checkpoint of pickled code", "no whole checkpoint", _refused_resume(_attack_all)),
        RunFault("checkpoint of another model", "its checkpoint does not fit", _refused_resume(_other_sizes)),
        RunFault(
            "line of metrics.jsonl cut, later steps in it",
            "continuing at step 2",
            _resume(_cut_metrics),
            0,
            second,
            is_slow=True,
        ),
        RunFault("export of a run whose checkpoint is damaged", "damaged", _export_damaged),
        RunFault("disk full under an export", "No space left on device", _full_export),
    )


_W, _T, _LAST = "model.safetensors", "tokenizer.model", "last.ckpt"


def _export(damage: Callable[[Path], object]) -> Act:
    def act(place: Place) -> Told:
        damage(place.export)
        return place.told(place.evaluate)

    return act


def _weights(write: Callable[[Path], object]) -> Act:
    def act(place: Place) -> Told:
        path = place.folder / "w.ckpt"
        write(path)
        told = place.told(place.train, f"model.weights={path}")
        executed = (place.folder / "executed").exists()
        return told if write is not _attack else told._replace(kept="CODE WAS EXECUTED" if executed else _KEPT_ATTACK)

    return act


_KEPT_ATTACK = "nothing was executed"


def _attack(path: Path) -> None:
    torch.save({"state_dict": Attack(path.parent / "executed")}, path)


def _other_tokenizer(export: Path) -> None:
    (export / _T).write_bytes(train_other_tokenizer(size=60))


def _with_nan(export: Path) -> None:
    """A file whose digest is right: so were its values when it was written."""
    tensors = safetensors.torch.load_file(export / _W)
    with safetensors.safe_open(export / _W, framework="pt") as file:
        metadata = dict(file.metadata())
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    metadata[digests.DIGEST_KEY] = digests.digest_tensors(tensors)
    safetensors.torch.save_file(tensors, export / _W, metadata=metadata)


def _edit_config(**values: int) -> Callable[[Path], object]:
    def edit(export: Path) -> None:
        content = json.loads((export / "config.json").read_text())
        content["model"].update(values)
        (export / "config.json").write_text(json.dumps(content))

    return edit


def _write_config(content: bytes) -> Callable[[Path], object]:
    return lambda export: (export / "config.json").write_bytes(content)


def _pipe(export: Path) -> None:
    (export / "config.json").unlink()
    os.mkfifo(export / "config.json")


def _endless(export: Path) -> None:
    (export / "config.json").unlink()
    (export / "config.json").symlink_to("/dev/zero")


def _visual_tokenizer(place: Place) -> Told:
    config = VisualTokenizerConfig(image_size=32, patch_size=8, num_codes=5, code_dim=4, embed_dim=8, num_heads=2)
    folder = save_visual_tokenizer(place.folder / "codes", VisualTokenizer(config))
    return place.told(place.evaluate, f"model={folder}")


def _other_model(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def _nan_weights(place: Place) -> Told:
    _with_nan(place.export)
    return place.told(place.train, f"model.weights={place.export / _W}")


def _resume(damage: Callable[[Path], object]) -> Act:
    def act(place: Place) -> Told:
        damage(place.checkpoints)
        ended = place.resume()
        text = (place.run / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        begun = [word for word in ("1", "2", "0") if f"continuing at step {word} of 3" in ended.out]
        kept = "steps 1 to 3 once each" if steps == [1, 2, 3] else f"steps {steps}"
        last = torch.load(place.checkpoints / _LAST, weights_only=True)["global_step"]
        assert last == STEPS + 1, "the last checkpoint is that of the last step"
        return Told(ended.code, f"{ended.out}\n{ended.err}", f"continues at step {''.join(begun)}, {kept}")

    return act


def _refused_resume(damage: Callable[[Path], object]) -> Act:
    def act(place: Place) -> Told:
        damage(place.checkpoints)
        return place.told(place.resume)

    return act


def _damage_newest(where: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        flip(folder / f"step={STEPS}.ckpt", where)
        shutil.copyfile(folder / f"step={STEPS}.ckpt", folder / _LAST)

    return damage


def _cut_newest(folder: Path) -> None:
    for name in (f"step={STEPS}.ckpt", _LAST):
        cut(folder / name)


def _cut_all(folder: Path) -> None:
    for path in folder.iterdir():
        cut(path)


def _attack_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
        torch.save(Attack(folder / "executed"), path)


def _other_sizes(folder: Path) -> None:
    for path in folder.iterdir():
        content = torch.load(path, weights_only=True)
        content["state_dict"] = {
            name: value[:1].clone() if value.ndim else value for name, value in content["state_dict"].items()
        }
        path.unlink()
        torch.save(content, path)


def _folder_as_last(folder: Path) -> None:
    (folder / _LAST).unlink()
    (folder / _LAST).mkdir()


def _dangling_last(folder: Path) -> None:
    (folder / _LAST).unlink()
    (folder / _LAST).symlink_to(folder / "step=99.ckpt")


def _partial(folder: Path) -> None:
    content = (folder / _LAST).read_bytes()
    (folder / ".step=3.ckpt.01234567.tmp").write_bytes(content[: len(content) // 2])


def _cut_metrics(folder: Path) -> None:
    path = folder.parent / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "a": 1}\n{"step": 4, "samples_')


def _export_damaged(place: Place) -> Told:
    for path in place.checkpoints.iterdir():
        flip(path, 0.3)
    return place.told(place.export_run)


def _full_export(place: Place) -> Told:
    assert place.run.is_dir()

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(safetensors.torch, "save_file", fill):
        return place.told(place.export_run)
