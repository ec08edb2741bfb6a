"""Numbers that nobody can mean: each is refused in one line, before anything is read or allocated."""

from __future__ import annotations

import copy
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, Predicate

from m2_encoder.cli import commands
from m2_encoder.config.check import read_parameters
from m2_encoder.config.command import Command
from m2_encoder.config.compose import open_composer
from m2_encoder.config.groups import lend_groups
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import format_problem
from m2_encoder.config.schema import Cluster, Model, Run, SlurmCluster, Trainer
from m2_encoder.data.inspect.start_check import StartCheck
from m2_encoder.data.order.manifest import SourceSpec
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.errors import MAX_LINE, Problem
from tests.support.shards import make_sample, write_tar

ABSURD: Mapping[type, tuple[Any, ...]] = {int: (10**23,), float: (1e300, float("nan"))}
_OTHERS = ("seed", "image_size", "max_steps", "patch_size", "bucket_cap_mb_list", "model_averaging_period")
"""Arguments that the command passes itself, and of torch."""
_OURS = "m2_encoder."


def test_every_number_of_every_option_has_a_ceiling() -> None:
    """Of what `_target_` names anywhere in conf/, and of the keys without one."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in find_conf().rglob("*.yaml")]
    called = {node["_target_"] for content in files for node in _targets(content)}
    classes = [pkgutil.resolve_name(name) for name in sorted(called) if name.startswith(_OURS)]
    assert len(classes) > 25
    open_ended = [
        f"{each.__name__}.{name}"
        for each in (*classes, Run, Model, Cluster, SlurmCluster, Trainer, SourceSpec, StartCheck, RemoteShards)
        for name, item in read_parameters(each).items()
        if name not in _OTHERS and _is_open(item.annotation)
    ]
    assert not open_ended


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tar of four samples."""
    folder = tmp_path_factory.mktemp("photos")
    write_tar(folder / "tars" / "0.tar", [member for i in range(4) for member in make_sample(f"{i}", i)])
    (folder / "captions.txt").write_text("a dog\n", encoding="utf-8")
    return folder


COMMANDS: tuple[tuple[Command, tuple[str, ...]], ...] = (
    (commands.TRAIN, ()),
    (commands.TRAIN, (
        "data=webdataset", "data.sources.main.shards={tars}", "model.tokenizer=emoji", "strategy=grouped_ddp",
        "data.cache={{folder: x, max_bytes: 2e11, timeout_s: 60, attempts: 4}}", "optimizer=muon", "logger=csv",
        "objective=[itm,cmim,cmlm,captioning,text_contrast,soft_targets]", "data.captions.every_language=true",
    )),
    (commands.EVALUATE, ("model=tiny", "weights={text}", "tokenizer={text}")),
    (commands.EMBED, ("model=tiny", "weights={text}", "texts={text}", "tokenizer={text}", "output=o.parquet")),
    (commands.PLAN, ("hardware.overlap=0.5", "hardware.mfu=0.3")),
    (commands.DATA_EMOJI, ()),
    (commands.DATA_PACK, ("source={folder}", "output=packed", "max_side=512", "quality=90")),
    (commands.DATA_CHECK, ("source={tars}",)),
    (commands.DATA_STATS, ("source={tars}", "context_length=52")),
    (commands.DATA_SPLIT, ("source={tars}", "output=sides", "max_repeats=20")),
    (commands.DATA_TOKENIZER, ("source={text}", "output=t.model")),
    (commands.DATA_CURATE, ("shards={tars}", "output=curated", "score.model=tiny")),
    (commands.SEARCH_INDEX, ("photos={folder}", "model=tiny", "weights={text}", "tokenizer={text}")),
    (commands.SEARCH_QUERY, ("index=photos.index", "query=dog")),
    (commands.SEARCH_SIMILAR, ("index=photos.index", "picture=dog.jpg")),
    (commands.SEARCH_DUPLICATES, ("index=photos.index",)),
)  # fmt: skip


@pytest.mark.parametrize(("command", "lines"), COMMANDS, ids=lambda value: getattr(value, "name", ""))
def test_absurd_numbers_are_refused_by_their_key(
    command: Command, lines: tuple[str, ...], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"folder": photos, "tars": photos / "tars", "text": photos / "captions.txt"}
    folder = find_conf() / command.config_folder
    with lend_groups(command.groups), open_composer(folder, command.config_name, []) as composer:
        cfg = composer.compose([line.format(**places) for line in lines]).cfg
    check: Callable[[dict[str, Any]], list[Problem]] = pkgutil.resolve_name(str(command.check))
    taken = []
    for path, kind in _numbers(cfg):
        for value in ABSURD[kind]:
            changed = copy.deepcopy(cfg)
            _set(changed, path, value)
            found = [problem for problem in check(changed) if _is_about(path, problem)]
            if not found:
                taken.append((".".join(path), value))
            assert all(len(format_problem(problem)) <= MAX_LINE for problem in found)
    assert not taken


def _is_about(path: tuple[str, ...], problem: Problem) -> bool:
    key = ".".join(path)
    return problem.key == key or key.startswith(f"{problem.key}.") or path[-1] in problem.rule


def _numbers(node: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*above, name))
        elif type(value) in (int, float):
            yield (*above, name), type(value)


def _set(node: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value


def _targets(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if isinstance(node.get("_target_"), str):
            yield node
        for value in node.values():
            yield from _targets(value)


def _is_open(annotation: Any, bounds: tuple[Any, ...] = ()) -> bool:
    """Whether an annotation takes numbers without end; what code looks at does not count."""
    if hasattr(annotation, "__metadata__"):
        bounds += annotation.__metadata__
        annotation = typing.get_args(annotation)[0]
        if any(isinstance(each, Predicate) for each in bounds):
            return False
    if annotation in (int, float):
        return not all(any(isinstance(each, kinds) for each in bounds) for kinds in ((Ge, Gt), (Le, Lt)))
    return any(_is_open(item) for item in typing.get_args(annotation))
