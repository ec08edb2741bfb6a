"""What a configuration that lies in a run's folder may name: it may come from a stranger, and `_target_` runs code.

The shipped configurations, the command line and `--config-dir` are the user's own word. A file of `--config-path`, or
the `config.yaml` of a run that is exported or goes on, is not: its targets must be among those that they name, and it
holds values only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from hydra.core.hydra_config import HydraConfig

from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import refuse_all
from m2_encoder.errors import Problem, UserError

_TARGET: Final = re.compile(r"""_target_["']?\s*[:=]\s*["']?(\w+(?:\.\w+)+)""")
_COMMENT: Final = re.compile(r"(?:^|\s)#.*", re.MULTILINE)
_RESOLVER: Final = re.compile(r"\$\{[^{}]*[:$]")
_FOLDER: Final = re.compile(r"""(?:file://)?(/[^"',\[\]]+)""")
_MAX_BYTES: Final = 16 << 20
_MAX_NODES: Final = 1_000_000


def trusted_targets(lines: Sequence[str] = (), folders: Iterable[Path] = ()) -> frozenset[str]:
    """The targets that shipped configurations, overrides, and the YAML files below some folders name."""
    found = {target for line in lines for target in _TARGET.findall(line)}
    for folder in (find_conf(), *folders):
        for path in sorted(folder.rglob("*.yaml")):
            text = path.read_text(encoding="utf-8", errors="replace")
            found.update(_TARGET.findall(_COMMENT.sub("", text)))
    return frozenset(found)


def read_folders(searchpath: str) -> list[Path]:
    """The folders of an override of `hydra.searchpath`, or of one of its entries."""
    return [Path(folder) for folder in _FOLDER.findall(searchpath.partition("=")[2] or searchpath)]


def find_foreign(cfg: Any, trusted: Collection[str], *, path: str = "", takes_keys: bool = True) -> Iterator[Problem]:
    """Every target of a configuration that is not trusted; `takes_keys` says whether the command line may name it."""
    if isinstance(cfg, Mapping):
        target = cfg.get("_target_")
        if isinstance(target, str) and target not in trusted:
            key = f"{path}._target_".lstrip(".")
            rule = "is named by a saved configuration, which could run any code by it"
            more = f", or {key}={target}" if takes_keys else ""
            fix = f"if you trust it, give --config-dir FOLDER with a YAML file that names it{more}"
            yield Problem(key, target, rule, fix)
        for name, value in cfg.items():
            yield from find_foreign(value, trusted, path=f"{path}.{name}".lstrip("."), takes_keys=takes_keys)
    elif isinstance(cfg, list):
        for index, value in enumerate(cfg):
            yield from find_foreign(value, trusted, path=f"{path}[{index}]", takes_keys=takes_keys)


def find_targets(cfg: Any) -> set[str]:
    """Every target that a configuration names."""
    return {problem.value for problem in find_foreign(cfg, ())}


def refuse_foreign(cfg: Any, *, named: Collection[str] = ()) -> None:
    """Refuse a saved configuration, or a part of one; `--config-dir` of this command allows its targets.

    Args:
        cfg: the configuration.
        named: more targets that the user's own configuration names.

    Raises:
        UserError: naming every target that is not trusted.
    """
    places = HydraConfig.get().searchpath if HydraConfig.initialized() else ()
    folders = [folder for place in places or () for folder in read_folders(str(place))]
    refuse_all(list(find_foreign(cfg, {*trusted_targets(folders=folders), *named}, takes_keys=False)))


def check_values_only(path: Path) -> None:
    """Refuse a saved configuration that holds more than values: Hydra's settings, other files, resolvers.

    A file that is missing is left to whoever composes it.

    Raises:
        UserError: naming file and key; also for what is no YAML.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB; no configuration is")
        text = content.decode("utf-8")
        # Hydra's reader takes more, such as paths by !!python/object: what this one does not know is no value.
        _check_loaded(yaml.safe_load(text), text, path)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply; no configuration is") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())[:300]})") from error


def check_choices(choices: Mapping[Any, Any], folder: Path) -> None:
    """Refuse options that a saved configuration's folder brings along: their files may hold more than values.

    Args:
        choices: of Hydra, by group.
        folder: of the configuration.

    Raises:
        UserError: naming the first one.
    """
    for group, chosen in choices.items():
        for name in chosen if isinstance(chosen, list) else [chosen]:
            if (path := folder / str(group) / f"{name}.yaml").is_file():
                rule = f"{path} lies beside a saved configuration, and an option may run any code"
                raise UserError(f"{rule}; {_trust(folder)}", key=str(group), value=name)


def _trust(folder: Path) -> str:
    return f"if you trust it, name its folder as --config-dir, too: --config-dir {folder}"


def _check_loaded(loaded: Any, text: str, path: Path) -> None:
    keys = [key for key in ("hydra", "defaults") if isinstance(loaded, dict) and key in loaded]
    if "@package" in text:
        keys.append("@package")
    if keys:
        rule = f"holds {keys[0]}, which a saved configuration does not, and which runs code"
        raise UserError(f"{path}: {rule}; {_trust(path.parent)}")
    for count, value in enumerate(_strings(loaded)):
        if count > _MAX_NODES:
            raise UserError(f"{path}: holds more than {_MAX_NODES:,} values; no configuration does")
        if _RESOLVER.search(value):
            shown = " ".join(value.split())[:80]
            rule = f"holds {shown}, but a saved configuration has values only"
            raise UserError(f"{path}: {rule}; {_trust(path.parent)}")


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from _strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value)
    else:
        yield str(node)
