"""Composition that reports every wrong override at once, in words, before Hydra runs anything.

Hydra stops at the first mistake and explains it in terms of its own machinery. Here each override is parsed and looked
up on its own, what is wrong is collected, and the rest is composed, so that its values can be checked, too.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2_encoder.config.groups import CHOSEN_AS_LISTS, drop_unchosen, find_conflict, read_options
from m2_encoder.config.numbers import register_resolvers
from m2_encoder.config.old_names import update_line, update_names
from m2_encoder.config.overrides import (
    adds,
    key_problem,
    line_problem,
    parse_overrides,
    refuse_repeated,
    refuse_sweeps,
)
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import UNSET, find_problems, flatten, nearest
from m2_encoder.errors import Problem, UserError

HYDRA_VERSION_BASE: Final = "1.3"
# Folders of conf/ that offer no choice: Hydra's settings, and configurations of commands without groups.
_NO_GROUPS: Final = ("hydra", "commands")
PRESETS: Final = "sweep"
"""The group of presets of sweeps."""
_NO_MAPPING: Final = re.compile(r"Error merging override (.*?)(?: \(|$)")
_TWICE: Final = re.compile(r"(\w+) appears more than once in the final defaults list")
_PLACEHOLDERS: Final = {
    "model": "FOLDER",
    "name": "NAME",
    "output": "PATH",
    "shards": "PATHS",
    "targets.tokenizer": "FOLDER (a visual tokenizer's, such as outputs/visual_tokenizer/export)",
    "teacher": "FOLDER (of m2-export)",
    "tokenizer": "FILE (the SentencePiece model of the weights, such as the official sp.model)",
}
_REFERENCE: Final = re.compile(r"\$\{([\w.]+)\}")


class Composition(NamedTuple):
    """What a command line composes to."""

    cfg: dict[str, Any]  # the configuration as plain containers; values that are missing or unresolvable are `UNSET`
    problems: list[Problem]  # everything that is wrong so far
    references: dict[str, str]  # keys that take their value from another key, with that key
    hydra: DictConfig  # Hydra's own settings for the run
    unchosen: list[str]  # keys that were left out, because they say something of options that are not chosen
    refused: list[Problem]  # the part of `problems` that lies in the overrides, whatever the values of other keys are
    # dotted keys to which single values were given; None where files that are not shipped take part
    changed: set[str] | None

    def without_echoes(self, problems: Sequence[Problem]) -> list[Problem]:
        """Those that do not only repeat the wrong value of another key."""
        keys, found = {problem.key for problem in problems}, []
        for problem in problems:
            seen, key = {problem.key}, self.references.get(problem.key)
            while key in self.references and key not in seen:  # a circle repeats nothing
                seen.add(key)
                key = self.references[key]
            if key in seen or self.references.get(problem.key) not in keys:
                found.append(problem)
        return found


class Composer:
    """Composes one primary configuration; use `open_composer`."""

    def __init__(self, loader: ConfigLoader, folder: Path, config_name: str, fixed: Sequence[str]) -> None:
        self._loader = loader
        self.folder = folder
        self._config_name = config_name
        self._fixed = list(fixed)
        self._default: DictConfig | None = None
        self._loaded: dict[tuple[str, ...], DictConfig] = {}
        self._options: dict[str, list[str]] = {}  # Hydra reads all configurations again whenever it is asked

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

    def update(self, lines: Sequence[str]) -> list[str]:
        """Overrides as they would be written today; for a saved configuration of then, as they were."""
        if "_target_" in (self._load_default().get("logger") or {}):
            return list(lines)
        return [update_line(line) for line in lines]

    def compose(self, lines: Sequence[str]) -> Composition:
        """Composes with all overrides that make sense and says what is wrong with the others.

        Raises:
            UserError: if nothing can be composed at all; the message says why.
        """
        overrides, problems = parse_overrides(lines, self._suggest)
        problems += [*refuse_repeated(lines), *refuse_sweeps(overrides)]
        overrides = [override for override in overrides if not override.is_sweep_override()]
        groups = [override for override in overrides if self._is_group(override)]
        preset = self._load_preset(groups)
        reasons = {id(override): self._group_problem(override, preset) for override in groups}
        choices = [override for override in groups if reasons[id(override)] is None]
        try:
            base = self._load_once(choices) if choices else self._load_default()
        except UserError as error:
            problems += find_problems(error)
            base, choices = self._load_default(), []
        unchosen = self._drop_unchosen(base)
        values = [override for override in overrides if override not in groups]
        for override in values:
            reason = key_problem(override, base)
            reasons[id(override)] = (reason and self._other_option(override, base)) or reason
        problems += [reason for override in overrides if (reason := reasons[id(override)])]
        good = [override for override in values if reasons[id(override)] is None]
        cfg = base
        if good:
            cfg = self._load_leniently([*choices, *good], base) if problems else self._load([*choices, *good])
            unchosen = self._drop_unchosen(cfg)
        problems += [reason for override in good if (reason := self._lost(override, unchosen, base))]
        plain, unresolved, references = to_plain(cfg)
        # A value that was refused is not missing as well.
        refused = {line.partition("=")[0] for line in lines} - {str(override.key_or_group) for override in good}
        unresolved = [each for each in unresolved if each.value is not UNSET or each.key not in refused]
        is_shipped = not self._fixed and self.folder.is_relative_to(find_conf())
        changed = {str(override.key_or_group) for override in good} if is_shipped else None
        return Composition(plain, problems + unresolved, references, cfg.hydra, unchosen, problems, changed)

    def _drop_unchosen(self, cfg: DictConfig) -> list[str]:
        return drop_unchosen(cfg, self.folder, cfg.hydra.searchpath)

    def _lost(self, override: Override, unchosen: Sequence[str], base: DictConfig) -> Problem | None:
        """Refuses `+objective.x.y=1` where objective x is not selected; null is allowed."""
        is_value = adds(override) and override.value() is not None
        is_lost = is_value and any(f"{override.key_or_group}.".startswith(f"{key}.") for key in unchosen)
        return self._other_option(override, base) if is_lost else None

    def _other_option(self, override: Override, base: DictConfig) -> Problem | None:
        """The problem of a key that other options of its group have and the chosen one does not, or None."""
        group, _, rest = override.key_or_group.partition(".")
        key = rest.partition(".")[0]
        chosen = base.get(group)
        if group not in self.groups() or not key or not isinstance(chosen, DictConfig) or key in list(chosen):
            return None
        files = read_options(group, self.folder, base.hydra.searchpath)
        form = f"{group}=[...,%s]" if group in CHOSEN_AS_LISTS else f"{group}=%s"
        having = [form % option for option in self.options(group) if option in files and key in files[option][1]]
        rule = f"the chosen {group} has no {key}, unlike {' and '.join(having)}"
        choose = "choose it" if len(having) == 1 else "choose one of them"
        return line_problem(override.input_line, rule, choose) if having else None

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

    def _load_once(self, overrides: Sequence[Override]) -> DictConfig:
        """As `_load`, of a few choices that all jobs of a sweep have: Hydra reads some thirty files for each."""
        key = tuple(override.input_line or "" for override in overrides)
        if key not in self._loaded:
            self._loaded[key] = self._load(overrides)
        return copy.deepcopy(self._loaded[key])

    def _load(self, overrides: Sequence[Override]) -> DictConfig:
        lines = [line for override in overrides if (line := override.input_line)]
        try:
            cfg = compose(self._config_name, overrides=[*self._fixed, *lines], return_hydra_config=True)
        except yaml.YAMLError as error:
            raise UserError(f"{self.folder}: a file is not valid YAML: {flatten(error)}") from error
        except (HydraException, OmegaConfBaseException) as error:
            if (twice := _TWICE.search(flatten(error))) is not None:
                value = next(
                    (line.partition("=")[2] for line in lines if line.lstrip("+").startswith(f"{twice[1]}=")), ""
                )
                rule = "is chosen by another choice, such as the experiment, too; leave it out here"
                raise UserError(rule, key=twice[1], value=value) from error
            raise UserError(self._explain(error)) from error
        OmegaConf.set_struct(cfg, False)
        for group in CHOSEN_AS_LISTS:
            node = cfg.get(group)
            if isinstance(node, DictConfig) and node.get("_target_") is not None:
                for name, (path, content) in read_options(group, self.folder, cfg.hydra.searchpath).items():
                    if content.get("_target_") == node["_target_"]:
                        fix = f"{path} must begin with `{name}:`, with its values indented below"
                        raise UserError(f"{group}=[...,{name}]: {fix}")
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
            fix = f"give single ones, {key}.KEY=VALUE, or a mapping {{KEY: VALUE}}, or {key}=null first"
            return f"{match[1]}: {key} holds keys; {fix}"
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

    def _load_preset(self, groups: Sequence[Override]) -> DictConfig | None:
        """The configuration with the preset of a sweep, which may choose an experiment; None without one."""
        own = [each for each in groups if each.key_or_group == PRESETS and not each.is_add()]
        lines = [each for each in own if each.value() in self.options(PRESETS)]
        return self._load_once(lines) if lines else None

    def _group_problem(self, override: Override, preset: DictConfig | None) -> Problem | None:
        group, line, options = override.key_or_group, override.input_line, self.options(override.key_or_group)
        if not options:
            rule = f"there is no group {group!r}{nearest(group, self.groups())}"
            return line_problem(line, rule, f"the groups are {', '.join(self.groups())}")
        default, value = preset or self._load_default(), override.value()
        # A group chosen as a list is a key of the configuration only.
        is_chosen = group in default.hydra.runtime.choices or group in default
        if override.is_add() and is_chosen:
            return line_problem(line, f"{group} is chosen already", "leave out the +")
        if not adds(override) and not is_chosen:
            fix = "leave this out" if value is None else f"add it with +{line}"  # a ~group has no value
            return line_problem(line, f"{group} is not chosen by default", fix)
        if override.is_delete():
            return line_problem(line, "a group cannot be taken away", f"choose one of {', '.join(options)}")
        if value is None:
            return line_problem(line, "a group cannot be null", f"choose from {', '.join(options)}")
        chosen = ["null" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]
        for name in chosen:
            if name not in options:
                fix = f"choose from {', '.join(options)}"
                return line_problem(f"{group}={name}", f"no such option{nearest(name, options)}", fix)
        return find_conflict(line, chosen, read_options(group, self.folder, default.hydra.searchpath))


@contextlib.contextmanager
def open_composer(folder: Path, config_name: str, fixed: Sequence[str] = ()) -> Iterator[Composer]:
    """A composer for `folder/config_name.yaml`; `fixed` are overrides of Hydra's settings for every composition.

    Raises:
        UserError: if the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"--config-path {folder}: no such folder; give the folder that holds {config_name}.yaml")
    register_resolvers()
    with initialize_config_dir(str(folder), version_base=HYDRA_VERSION_BASE, job_name=config_name):
        hydra = GlobalHydra.instance()
        yield Composer(hydra.config_loader(), folder, config_name, fixed)


def to_plain(cfg: DictConfig) -> tuple[dict[str, Any], list[Problem], dict[str, str]]:
    """Plain containers, `UNSET` where there is no value, a problem for each of those; which keys refer to which.

    Hydra's own part is left out.
    """
    problems: list[Problem] = []
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
            problems.append(Problem(path, raw[key], "cannot be resolved", flatten(error)))
            return UNSET
        return plain(value, path)

    values = update_names(plain(cfg, ""))
    return values, [*describe_missing(missing), *problems], references


def describe_missing(keys: Sequence[str]) -> list[Problem]:
    """A problem for each key that is `???`; one where several parts of a mapping lack the same key.

    >>> describe_missing(["a.x.shards", "seed", "a.y.shards"])[0].fix
    'add a.x.shards=PATHS and so on, or leave a part out: ~a.x'
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        above, _, last = key.rpartition(".")
        parent, _, part = above.rpartition(".")
        groups.setdefault((parent, last) if parent else (key, ""), []).append(part if parent else key)
    problems = []
    for (parent, last), parts in groups.items():
        first = f"{parent}.{parts[0]}.{last}" if last else parent
        key, fix = first, f"add {first}={_placeholder(first)}"
        if len(parts) > 1:
            key = f"{parent}.{{{','.join(parts)}}}.{last}"
            fix = f"add {first}={_placeholder(last)} and so on, or leave a part out: ~{parent}.{parts[0]}"
        problems.append(Problem(key, UNSET, "must be given", fix))
    return problems


def _placeholder(key: str) -> str:
    parts = key.split(".")
    return _PLACEHOLDERS.get(".".join(parts[-2:])) or _PLACEHOLDERS.get(parts[-1], "VALUE")
