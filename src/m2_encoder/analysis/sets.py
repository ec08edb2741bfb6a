"""The sets of pictures and captions that a run is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2_encoder.config.emoji_folder import EMOJI_TARGET, find_emoji_folder
from m2_encoder.config.metric_names import EMOJI_SETS
from m2_encoder.config.model_choice import model_shape
from m2_encoder.config.paths import find_path
from m2_encoder.data.emoji.dataset import write_emoji_shards
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.data.retrieval_set import RetrievalSet, read_retrieval_set
from m2_encoder.errors import UserError
from m2_encoder.pictures import STANDARD, read_policy


def read_run_set(cfg: Mapping[str, Any], name: str | None, image_size: int | None = None) -> RetrievalSet:
    """A set by its name in tables; `RecordedRun.read_set` explains the arguments.

    Raises:
        UserError: if there is no such set, or it cannot be read.
    """
    data, model = cfg["data"], cfg["model"]
    size = model_shape(model).image_size if image_size is None else image_size
    transform = EvalTransform(size, pictures=read_policy(model.get("pictures") or STANDARD))
    if data["_target_"] != EMOJI_TARGET:
        places = dict(data.get("validation") or {})
        chosen = _choose(name, list(places))
        return read_retrieval_set(find_path(str(places[chosen])), name=chosen, transform=transform)
    splits = [each.removeprefix("emoji_") for each in (*EMOJI_SETS[1:], EMOJI_SETS[0])]
    chosen = _choose(name, splits)
    settings = {"heldout_style": data["heldout_style"]}
    folder = write_emoji_shards(find_emoji_folder(data.get("folder"), settings), **settings)
    return read_retrieval_set(folder / chosen, name=f"emoji_{chosen}", transform=transform, split=chosen)


def _choose(name: str | None, known: list[str]) -> str:
    if not known:
        raise UserError("the run has no validation set; read one with read_retrieval_set(FOLDER, ...)")
    if name is not None and name not in known:
        raise UserError(f"is no set of the run; there are {', '.join(known)}", key="name", value=name)
    return known[0] if name is None else name
