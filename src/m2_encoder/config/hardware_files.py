"""Files with the constants of a cluster for m2-plan; each may be based on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2_encoder.config.paths import find_conf, find_path
from m2_encoder.config.problems import flatten, nearest, show
from m2_encoder.errors import UserError


def find_constants(name: str, *, beside: Path | None = None) -> Path:
    """The file of a cluster: a shipped one, or a path; that of a `base` counts from the file that names it, too.

    Raises:
        UserError: if there is none.
    """
    folder = find_conf() / "cluster" / "hardware"
    places = [folder / f"{name}.yaml", *([] if beside is None else [beside.parent / name]), find_path(name)]
    if (found := next((place for place in places if place.is_file()), None)) is not None:
        return found
    known = sorted(option.stem for option in folder.glob("*.yaml"))
    fix = f"choose from {', '.join(known)}, or give a YAML file like theirs"
    where = "" if beside is None else f"{beside}: base={name}: "
    raise UserError(f"{where}no such cluster; {fix}{nearest(name, known)}")


def read_constants(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, over those of its `base`; `above` are the files that have it as theirs.

    Raises:
        UserError: naming the file that is damaged, or whose base is not found.
    """
    try:
        content = OmegaConf.load(path)  # YAML's own reader takes 1e-1 for a text
        values = OmegaConf.to_container(content, resolve=True) if content else content
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not valid YAML: {flatten(error)[:300]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold constants as `name: number`")
    if "defaults" in values:
        raise UserError(f"{path}: defaults belong to Hydra's own files; name the file to start from as `base: NAME`")
    base, chain = values.pop("base", None), (*above, path.resolve())
    if base is None:
        return {str(name): value for name, value in values.items()}
    if not isinstance(base, str):
        raise UserError(f"{path}: base={show(base)}: must be the name of a cluster, or of a file")
    found = find_constants(base, beside=path)
    if found.resolve() in chain:
        raise UserError(f"{path}: base={base}: is its own base, by way of {path}")
    return read_constants(found, chain) | {str(name): value for name, value in values.items()}
