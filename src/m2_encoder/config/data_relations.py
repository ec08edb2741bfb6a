"""Rules of `data=webdataset` that look at more than one value: sources, weights, copies of remote shards, folders.

Other people's data may have keys of these names for something else: values of other kinds are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2_encoder.config.known import Known, UnknownValueError, count_ranks
from m2_encoder.config.paths import find_pattern
from m2_encoder.data.retrieval_source import describe_source
from m2_encoder.data.shards.paths import is_remote, list_shards, what_is_there
from m2_encoder.errors import Problem, UserError


def _sources(known: Known) -> dict[str, Mapping[str, Any]]:
    """Those that are used, by name."""
    sources = known("data.sources")
    nodes = sources.items() if isinstance(sources, Mapping) else ()
    return {name: values for name, values in nodes if isinstance(values, Mapping)}


def check_source_weights(known: Known) -> Iterator[Problem]:
    """All sources have a weight, or none; one of them is above 0."""
    weights = {name: known(f"data.sources.{name}.weight", None) for name in _sources(known)}
    silent = [name for name, weight in weights.items() if weight is None]
    if silent and len(silent) < len(weights):
        given = next(name for name in weights if name not in silent)
        rule = f"must be given for all sources or for none, and data.sources.{given} has one"
        yield Problem(f"data.sources.{silent[0]}.weight", None, rule, "give all of them one, or null")
    elif weights and not silent and not any(weights.values()):
        name = next(iter(weights))
        fix = f"for example data.sources.{name}.weight=1"
        yield Problem(f"data.sources.{name}.weight", weights[name], "must be above 0 for at least one source", fix)


def check_lanes(known: Known) -> Iterator[Problem]:
    """Every rank has a lane."""
    lanes, ranks = known("data.lanes"), count_ranks(known)
    if isinstance(lanes, int) and lanes < ranks:
        least = 1 << (ranks - 1).bit_length()
        rule = f"must be at least the {ranks} ranks, or ranks read the same shards"
        yield Problem("data.lanes", lanes, rule, f"for example data.lanes={least}")


def check_shards(known: Known) -> Iterator[Problem]:
    """Patterns that fit nothing, and urls without a place for copies; what they name is not opened."""
    for name in _sources(known):
        key = f"data.sources.{name}.shards"
        try:
            shards = known(key)
        except UnknownValueError:
            continue  # this one is reported; the others may have faults of their own
        patterns = [shards] if isinstance(shards, str) else shards
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            continue
        if problem := _problem_of([find_pattern(each) for each in patterns], known("data.cache", {})):
            yield Problem(key, shards, problem)


def _problem_of(patterns: Sequence[str], cache: Any) -> str | None:
    """Why these are no shards, or None; of a brace expression only the first name is looked for."""
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    if cache is None and len(local) < len(patterns):
        url = next(filter(is_remote, patterns))
        return (
            f"{url} is remote, and there is no place for copies; give "
            "'data.cache={folder: cache, max_bytes: 2e11}', as large as the shards of all open windows at least"
        )
    try:
        for pattern in local:
            if not os.path.exists(first := list_shards(pattern)[0]):
                return f"{first} does not exist; {what_is_there(first)}"
        if len(local) > 1:
            list_shards(local)  # refuses what comes twice
    except UserError as error:
        return " ".join(error.text.split())
    return None


def check_validation(known: Known) -> Iterator[Problem]:
    """Validation sets are tars, or what m2-data pack reads."""
    found = known("data.validation")
    for name, source in found.items() if isinstance(found, Mapping) else ():
        if isinstance(source, str) and (problem := describe_source(find_pattern(source))):
            yield Problem(f"data.validation.{name}", source, problem)
