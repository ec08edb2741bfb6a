"""What `m2-export model=[A,B,…] shares=…` exports: a weighted mean of models that were trained from one start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from m2_encoder.checkpoints.card import CardInfo, model_card
from m2_encoder.checkpoints.card_words import MIXED, OF_ITS_WEIGHTS
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.mixing import check_shares, mix_models
from m2_encoder.config.model_choice import load_from, model_problems
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.trusted import refuse_foreign
from m2_encoder.errors import Problem, UserError
from m2_encoder.exports.base import ExportSource
from m2_encoder.hub import LoadedModel
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.record import describe_run
from m2_encoder.runs.folder import CONFIG_FILE, read_run
from m2_encoder.runs.soup import choose_greedily, read_score
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

EQUAL: Final = "equal"
GREEDY: Final = "greedy"
_ALONE: Final = ("weights", "tokenizer", "pictures", "adapter")


def is_mixed(cfg: Mapping[str, Any]) -> bool:
    """Whether several models are named."""
    return isinstance(cfg["model"], Sequence) and not isinstance(cfg["model"], str)


def mixed_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with several models and their shares, without loading anything."""
    models, shares = list(cfg["model"]), cfg["shares"]
    problems = [
        problem._replace(value=model) if problem.key == "model" else problem
        for model in models
        for problem in model_problems({**cfg, "model": model, "device": "cpu", **dict.fromkeys(_ALONE)})
    ]
    if len(models) < 2:
        problems.append(Problem("model", models, "must name at least two models to be mixed", "give one as model=A"))
    alone = [key for key in _ALONE if cfg[key] is not None]
    problems += [Problem(key, cfg[key], "goes with one model, and there are several", "leave it out") for key in alone]
    if shares is None:
        problems.append(Problem("shares", None, "must be given with several models", "use shares=equal, or [0.5,0.5]"))
    elif shares == GREEDY:
        if not _config_of_run(models[0]).is_file():
            rule = "does not lie in the folder of its run, whose validation set shares=greedy needs"
            problems.append(Problem("model", models[0], rule, "give outputs/NAME/export, or use shares=equal"))
    elif shares != EQUAL:
        problems += _share_problems(shares, len(models))
    return problems


def _config_of_run(model: Any) -> Path:
    return find_path(str(model)).resolve().parent / CONFIG_FILE


def _share_problems(shares: Any, number: int) -> list[Problem]:
    fix = f"use shares=equal, shares=greedy, or {number} numbers such as {[round(1 / number, 3)] * number}"
    are_numbers = isinstance(shares, Sequence) and not isinstance(shares, str)
    if not are_numbers or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in shares):
        return [Problem("shares", shares, "is no list of numbers", fix)]
    if len(shares) != number:
        return [Problem("shares", shares, f"has {len(shares)} numbers for {number} models", fix)]
    try:
        check_shares(shares)
    except UserError:
        return [Problem("shares", shares, "must be at least 0 each, with the sum 1", fix)]
    return []


def mixed_source(cfg: dict[str, Any]) -> ExportSource:
    """The mean of several models.

    Raises:
        UserError: as `m2_encoder.load`; for models of different architectures, tokenizers or picture policies.
    """
    names = [str(each) for each in cfg["model"]]
    first = _load(cfg, names[0])

    def load(index: int) -> M2Encoder:
        loaded = _load(cfg, names[index])
        _check_same(first, loaded, names[0], names[index])
        return loaded.model

    shares = _find_shares(cfg, names, load)
    model = mix_models(map(load, range(len(names))), shares)
    mixed = {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
    facts = describe_run()
    origin = {
        "mixed": ", ".join(f"{share:g} {Path(name).name}" for name, share in mixed.items()),
        "git_revision": facts["git_revision"],
        "versions": ", ".join(map(" ".join, facts["versions"].items())),
    }
    known: dict[str, Any] = {
        "pictures": first.preprocess.pictures,
        "metrics": {},
        "provenance": origin,
        "card": CardInfo(
            summary=MIXED,
            licence=OF_ITS_WEIGHTS,
        ),
    }
    assert isinstance(first.tokenizer, SentencePieceTokenizer)
    write = partial(export_model, model=model, tokenizer=first.tokenizer, **known)
    return ExportSource(first._replace(model=model), model_card(model, **known), write)


def _load(cfg: Mapping[str, Any], name: str) -> LoadedModel:
    return load_from({**cfg, **dict.fromkeys(_ALONE), "model": name, "device": "cpu"})


def _check_same(first: LoadedModel, other: LoadedModel, name: str, other_name: str) -> None:
    one, two = first.tokenizer, other.tokenizer
    assert isinstance(one, SentencePieceTokenizer)
    assert isinstance(two, SentencePieceTokenizer)
    if one.digest != two.digest:
        raise UserError(f"{name} and {other_name} have different tokenizers, and cannot be mixed", key="model")
    if first.preprocess.pictures != other.preprocess.pictures:
        raise UserError(f"{name} and {other_name} read pictures differently, and cannot be mixed", key="model")


def _find_shares(cfg: Mapping[str, Any], names: Sequence[str], load: Callable[[int], M2Encoder]) -> list[float]:
    wanted = cfg["shares"]
    if wanted == EQUAL:
        return [1 / len(names)] * len(names)
    if wanted != GREEDY:
        return [float(each) for each in wanted]
    run = read_run(_config_of_run(names[0]))
    refuse_foreign({"data": run.get("data"), "model": run["model"]})
    score, dataset = read_score(run)
    soup = choose_greedily(load, len(names), score)
    for name, share, alone in zip(names, soup.shares, soup.alone, strict=True):
        say(f"{name}: mean recall {alone:.2f} on {dataset}; {'in the soup' if share else 'left out'}")
    say(f"the soup: {soup.mixed:.2f}")
    return soup.shares
