"""Folders of sentence-transformers around a model of pictures and texts, such as its CLIP models.

They hold a folder of transformers, which is opened without sentence-transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from m2_encoder.errors import UserError
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.evaluation.models.transformers_model import open_transformers
from m2_encoder.pictures import PicturePolicy

MODULES_FILE: Final = "modules.json"
_TOWERS: Final = ("CLIPModel", "Transformer")


def open_sentence_transformers(folder: Path, *, name: str, pictures: PicturePolicy, trust: bool) -> EvaluatedModel:
    """Such a folder; its features are those of its first module, L2-normalised.

    Raises:
        UserError: for other folders, and for those with modules that change features after the towers.
    """
    path = folder / MODULES_FILE
    try:
        modules = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no list of modules of sentence-transformers: {error!r}") from error
    kinds = [kind for kind, _ in modules]
    if not kinds or kinds[0] not in _TOWERS or set(kinds[1:]) - {"Normalize"}:
        rule = f"expected {' or '.join(_TOWERS)}, and nothing but Normalize after it"
        raise UserError(f"{folder}: has the modules {', '.join(kinds) or 'none'}; {rule}")
    place = str(folder / modules[0][1])
    return open_transformers(place, name=name, pictures=pictures, trust=trust, kind="sentence-transformers")
