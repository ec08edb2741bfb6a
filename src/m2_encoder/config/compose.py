"""Composition that reports every wrong override at once, in words, before Hydra runs anything.

Hydra stops at the first mistake and explains it in terms of its own machinery. Here each override is parsed
and looked up on its own, what is wrong is collected, and the rest is composed, so that its values can be
validated too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2_encoder.config.choices import config_folders, describe_nameless, find_conflict, read_options
from m2_encoder.config.keys import key_problem
from m2_encoder.config.missing import describe_missing
from m2_encoder.config.overrides import adds, parse_overrides, refuse_sweeps, repeated_shards
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import UNSET, flatten, nearest
from m2_encoder.config.unchosen import CHOSEN_AS_LIST, drop_unchosen
from m2_encoder.errors import UserError

HYDRA_VERSION_BASE: Final = "1.3"
# Folders of conf/ that offer no choice: Hydra's settings, and configurations of commands without groups.
_NO_GROUPS: Final = ("hydra", "commands")
_NO_MAPPING: Final = re.compile(r"Error merging override (.*?)(?: \(|$)")
_REFERENCE: Final = re.compile(r"\$\{([\w.]+)\}")


class Composition(NamedTuple):
    """What a command line composes to.

    Attributes:
        cfg: the configuration as plain containers; values that are missing or unresolvable are `UNSET`.
        problems: everything that is wrong so far, one line each.
        references: keys that take their value from another key, with that key.
        hydra: Hydra's own settings for the run.
        unchosen: keys that were left out, because they say something of options that are not chosen.
        refused: the part of `problems` that lies in the overrides, whatever the values of other keys are.
        changed: nodes at the top in which values are not those of the files.
    """

    cfg: dict[str, Any]
    problems: list[str]
    references: dict[str, str]
    hydra: DictConfig
    unchosen: list[str]
    refused: list[str]
    changed: set[str]

    def without_echoes(self, problems: Sequence[str]) -> list[str]:
        """Leaves out problems of a key that only repeats the wrong value of another."""
        wrong = {problem.partition("=")[0] for problem in problems}
        return [text for text in problems if self.references.get(text.partition("=")[0]) not in wrong]


class Composer:
    """Composes one primary configuration; use `open_composer`.

    Attributes:
        folder: where the configurations are.
    """

    def __init__(self, loader: ConfigLoader, folder: Path, config_name: str, fixed: Sequence[str]) -> None:
        self._loader = loader
        self.folder = folder
        self._config_name = config_name
        self._fixed = list(fixed)
        self._default: DictConfig | None = None
        self._options: dict[str, list[str]] = {}  # Hydra reads all configurations again whenever it is asked

    @property
    def has_own_files(self) -> bool:
        """Whether files other than the shipped ones can be part of a configuration."""
        return bool(self._fixed) or self.folder != find_conf()

    def groups(self) -> dict[str, list[str]]:
        """Every group of the configuration folder with its options."""
        names = [name for name in self._loader.list_groups("") if name not in _NO_GROUPS]
        return {name: self.options(name) for name in sorted(names)}

    def chosen(self) -> dict[str, list[str]]:
        """By group, the options that are the default."""
        default = self._load_default()
        choices = default.hydra.runtime.choices
        found = {group: [choices[group]] for group in self.groups() if isinstance(choices.get(group), str)}
        # A group chosen as a list is missing there: its options are the keys of its node.
        lists = [group for group in self.groups() if group not in found and isinstance(default.get(group), DictConfig)]
        return found | {group: [str(key) for key in default[group]] for group in lists}

    def options(self, group: str) -> list[str]:
        """Options of a group; `base` files are shared parts, not choices."""
        if group not in self._options:
            found = self._loader.get_group_options(
                group, results_filter=ObjectType.CONFIG, config_name=self._config_name, overrides=self._fixed
            )
            self._options[group] = sorted(name for name in found if name != "base")
        return self._options[group]

    def compose(self, lines: Sequence[str]) -> Composition:
        """Composes with all overrides that make sense and says what is wrong with the others.

        Raises:
            UserError: if nothing can be composed at all; the message says why.
        """
        overrides, problems = parse_overrides(lines, self._suggest)
        problems += [*repeated_shards(lines), *refuse_sweeps(overrides)]
        overrides = [override for override in overrides if not override.is_sweep_override()]
        default = self._load_default()
        selected = {*default.hydra.runtime.choices, *default}  # a group chosen as a list is only in the latter
        groups = [override for override in overrides if self._is_group(override)]
        reasons = {id(override): self._group_problem(override, selected) for override in groups}
        choices = [override for override in groups if reasons[id(override)] is None]
        try:
            base = self._load(choices) if choices else default
        except UserError as error:
            problems.append(str(error))
            base, choices = default, []
        unchosen = self._drop_unchosen(base)
        for override in overrides:
            if override not in groups:
                reason = key_problem(override, base)
                reasons[id(override)] = (reason and self._other_option(override, base)) or reason
        problems += [reason for override in overrides if (reason := reasons[id(override)])]
        good = [override for override in overrides if reasons[id(override)] is None]
        good = [override for override in good if override in choices or override not in groups]
        cfg = base
        if good != choices:
            cfg = self._load_leniently(good, base) if problems else self._load(good)
            unchosen = self._drop_unchosen(cfg)
        problems += [reason for override in good if (reason := self._lost(override, unchosen, base))]
        values, unresolved, references = to_plain(cfg)
        changed = {override.key_or_group.partition(".")[0] for override in good if override not in groups}
        return Composition(values, problems + unresolved, references, cfg.hydra, unchosen, problems, changed)

    def _drop_unchosen(self, cfg: DictConfig) -> list[str]:
        return drop_unchosen(cfg, self._folders(cfg))

    def _folders(self, cfg: DictConfig) -> list[Path]:
        """Where options are looked for, those of groups that are lent to this folder included."""
        return [*config_folders(self.folder, cfg.hydra.searchpath), find_conf()]

    def _lost(self, override: Override, unchosen: Sequence[str], base: DictConfig) -> str | None:
        """The problem of a value that was added to an option that is not chosen, or None; null is no loss."""
        is_value = adds(override) and override.value() is not None
        is_lost = is_value and any(f"{override.key_or_group}.".startswith(f"{key}.") for key in unchosen)
        return self._other_option(override, base) if is_lost else None

    def _other_option(self, override: Override, base: DictConfig) -> str | None:
        """The problem of a key that other options of its group have and the chosen one does not, or None."""
        group, _, rest = override.key_or_group.partition(".")
        key = rest.partition(".")[0]
        chosen = base.get(group)
        if group not in self.groups() or not key or not isinstance(chosen, DictConfig) or key in list(chosen):
            return None
        files = read_options(self._folders(base), group)
        form = f"{group}=[...,%s]" if group == CHOSEN_AS_LIST else f"{group}=%s"
        having = [form % option for option in self.options(group) if option in files and key in files[option][1]]
        line, choose = override.input_line, "choose it" if len(having) == 1 else "choose one of them"
        return f"{line}: the chosen {group} has no {key}, unlike {' and '.join(having)}; {choose}" if having else None

    def _load_default(self) -> DictConfig:
        if self._default is None:
            self._default = self._load([])
            self._drop_unchosen(self._default)
        return self._default

    def _load_leniently(self, good: Sequence[Override], base: DictConfig) -> DictConfig:
        # Something is wrong already: what else Hydra dislikes will come out in the next attempt.
        try:
            return self._load(good)
        except UserError:
            return base

    def _load(self, overrides: Sequence[Override]) -> DictConfig:
        lines = [line for override in overrides if (line := override.input_line)]
        try:
            cfg = compose(self._config_name, overrides=[*self._fixed, *lines], return_hydra_config=True)
        except yaml.YAMLError as error:
            raise UserError(f"{self.folder}: a file is not valid YAML: {flatten(error)}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(self._explain(error)) from error
        OmegaConf.set_struct(cfg, False)
        for group in (CHOSEN_AS_LIST, "evaluation"):
            chosen = cfg.get(group)
            is_nameless = isinstance(chosen, DictConfig) and "_target_" in chosen
            if is_nameless and (problem := describe_nameless(self._folders(cfg), group, chosen["_target_"])):
                raise UserError(problem)
        return cfg

    def _explain(self, error: Exception) -> str:
        text = flatten(error)
        if "submitit" in text and "launcher" in text:
            return "cluster=slurm: needs an extra; install it with pip install 'm2-encoder[slurm]'"
        if f"primary config '{self._config_name}'" in text:
            known = ", ".join(sorted(path.stem for path in self.folder.glob("*.yaml"))) or "none"
            return f"--config-name {self._config_name}: no such file in {self.folder}; there is: {known}"
        if match := _NO_MAPPING.search(text):
            key = match[1].partition("=")[0].lstrip("+")
            return f"{match[1]}: {key} holds keys; give single ones, as in {key}.KEY=VALUE, or a mapping {{KEY: VALUE}}"
        cause = f" ({flatten(error.__cause__)})" if error.__cause__ else ""
        return f"cannot compose {self._config_name}: {text}{cause}"

    def _is_group(self, override: Override) -> bool:
        key = override.key_or_group
        return "/" in key or ("." not in key and bool(self.options(key)))

    def _suggest(self, word: str) -> str:
        """What a word without a value may have meant: an option of a group."""
        for group, options in self.groups().items():
            if word.lstrip("+-") in options:
                added = "" if group in self._load_default().hydra.runtime.choices else "+"
                return f" (did you mean {added}{group}={word.lstrip('+-')}?)"
        return ""

    def _group_problem(self, override: Override, selected: Collection[Any]) -> str | None:
        group, line = override.key_or_group, override.input_line
        options = self.options(group)
        if not options:
            known = ", ".join(self.groups())
            near = nearest(group, self.groups())
            return f"{line}: there is no group {group!r}{near}; the groups are {known}"
        value = override.value()
        if override.is_add() and group in selected:
            return f"{line}: {group} is chosen already; leave out the +"
        if not adds(override) and group not in selected:
            fix = "leave this out" if value is None else f"add it with +{line}"  # a ~group has no value
            return f"{line}: {group} is not chosen by default; {fix}"
        if override.is_delete():
            return f"{line}: a group cannot be taken away; choose one of {', '.join(options)}"
        if value is None:
            return f"{line}: a group cannot be null; choose from {', '.join(options)}"
        chosen = value if isinstance(value, list) else [value]
        for name in chosen:
            if name not in options:
                shown = "null" if name is None else name
                return f"{group}={shown}: no such option{nearest(str(name), options)}; choose from {', '.join(options)}"
        default = self._load_default()
        conflict = find_conflict(self._folders(default), group, chosen)
        return None if conflict is None else f"{line}: {conflict}"


@contextlib.contextmanager
def lend_groups(names: Sequence[str]) -> Iterator[None]:
    """Offers groups of `conf/` to a command whose configuration lies in a folder of its own, while the block runs.

    Args:
        names: of the groups.
    """
    store = ConfigStore.instance()
    for name in names:
        for path in sorted((find_conf() / name).glob("*.yaml")):
            store.store(group=name, name=path.stem, node=OmegaConf.load(path))
    try:
        yield
    finally:
        for name in names:
            store.repo.pop(name, None)


@contextlib.contextmanager
def open_composer(folder: Path, config_name: str, fixed: Sequence[str] = ()) -> Iterator[Composer]:
    """A composer for `folder/config_name.yaml`, closed when the block ends.

    Args:
        folder: where the configurations are.
        config_name: the primary one, without suffix.
        fixed: overrides of Hydra's own settings that hold for every composition.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"--config-path {folder}: no such folder; give the folder that holds {config_name}.yaml")
    with initialize_config_dir(str(folder), version_base=HYDRA_VERSION_BASE, job_name=config_name):
        hydra = GlobalHydra.instance()
        yield Composer(hydra.config_loader(), folder, config_name, fixed)


def to_plain(cfg: DictConfig) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Resolves a configuration leaf by leaf, Hydra's own part left out.

    Returns:
        Plain containers with `UNSET` where there is no value; a problem for each of those; and which keys refer to
        which others.
    """
    problems: list[str] = []
    missing: list[str] = []
    references: dict[str, str] = {}

    def plain(node: Any, path: str) -> Any:
        if isinstance(node, DictConfig):
            if node._is_none():
                return None
            keys = [key for key in node if path or key != "hydra"]
            return {str(key): item(node, key, f"{path}.{key!s}".lstrip(".")) for key in keys}
        if isinstance(node, ListConfig):
            return [item(node, index, f"{path}[{index}]") for index in range(len(node))]
        return node

    def item(parent: Any, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(parent, key):
            missing.append(path)
            return UNSET
        if isinstance(parent, DictConfig) and OmegaConf.is_interpolation(parent, key):
            text = str(OmegaConf.to_container(parent, resolve=False)[key])  # type: ignore[index]
            if match := _REFERENCE.fullmatch(text):
                references[path] = match[1]
        try:
            value = parent[key]
        except OmegaConfBaseException as error:
            raw: Any = OmegaConf.to_container(parent, resolve=False)
            problems.append(f"{path}={raw[key]}: cannot be resolved; {flatten(error)}")
            return UNSET
        return plain(value, path)

    values = plain(cfg, "")
    return values, [*describe_missing(missing), *problems], references
