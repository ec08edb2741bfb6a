"""The study of a search: Optuna's journal in the sweep's folder, and trials that do not depend on restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import optuna
from hydra.utils import instantiate
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from m2_encoder.bounds import Count, Seed
from m2_encoder.config.problems import flatten
from m2_encoder.errors import NOTHING, Problem, UserError
from m2_encoder.search.space import Dimension

JOURNAL_FILE: Final = "study.journal"
STUDY_NAME: Final = "search"  # some pruners make random numbers of it
PRUNED_AT: Final = "pruned_at"  # the step at which a trial's own process ended it
PRUNER: Final = "pruner"
_MADE_OF: Final = "made_of"
_REHEARSED: Final = 3
_EXHAUSTED: Final = "exhausted"
_NAME: Final = "name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The keys of `hydra.sweeper`."""

    sampler: Mapping[str, Any]
    n_trials: Count = 20
    direction: Literal["maximize", "minimize"] = "maximize"
    seed: Seed | None = 0
    pruner: Mapping[str, Any] | None = None
    params: Mapping[str, Any] | None = None


class Study:
    """Trials of a search, kept in a journal that a killed process can go on with."""

    def __init__(self, folder: Path, settings: SearchSettings, space: Sequence[Dimension]) -> None:
        """Opens the journal of a folder, or begins one.

        Raises:
            UserError: if the journal is damaged.
        """
        self._settings, self._space = settings, list(space)
        with _quiet():
            self._storage = open_journal(folder)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=STUDY_NAME,
                direction=settings.direction,
                pruner=build_pruner(settings.pruner),  # some samplers ask which it is
                load_if_exists=True,
            )
        self._study.stop = self._note_exhausted  # type: ignore[method-assign]

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, oldest first."""
        return self._study.get_trials()

    @property
    def is_exhausted(self) -> bool:
        """Whether the sampler has said that there is nothing left to try."""
        return bool(self._study.user_attrs.get(_EXHAUSTED))

    def describe_changes(self, made_of: Mapping[str, Any]) -> Iterator[Problem]:
        """What a search that goes on is not made of any more; a new one keeps what it is made of."""
        before = self._study.user_attrs.get(_MADE_OF)
        if before is None:
            self._study.set_user_attr(_MADE_OF, dict(made_of))
            return
        for key in dict.fromkeys((*before, *made_of)):
            if before.get(key) != made_of.get(key):
                is_now = key if key not in made_of else f"{key}={made_of[key]}"
                rule = f"the search that is there has {f'{key}={before[key]}' if key in before else 'nothing of it'}"
                fix = "go on with its command line, or give another run.name for another search"
                yield Problem(is_now, NOTHING, rule, fix)

    def keep(self, key: str, value: Any) -> bool:
        """Keeps a setting in the journal; whether it was another one before."""
        known = self._study.user_attrs
        if key not in known or known[key] != value:
            self._study.set_user_attr(key, value)
            return key in known
        return False

    def ask(self, number: int) -> list[str]:
        """The overrides of a trial: a new one, or that of an earlier start, which had the same."""
        with _quiet():
            sampler = build_sampler(self._settings.sampler, self._settings.seed)
            reseed(sampler, self._settings.sampler.get("seed", self._settings.seed), number)
            self._study.sampler = sampler
            is_new = number == len(self.trials)
            trial = self._study.ask() if is_new else Trial(self._study, self._trial_id(number))
            return [dimension.suggest(trial) for dimension in self._space]

    def tell(self, number: int, state: TrialState, value: float | None = None) -> None:
        """Says what became of a trial."""
        with _quiet():
            self._study.tell(number, value, state)

    def repeat(self, number: int, earlier: FrozenTrial) -> None:
        """Gives a trial the end of an earlier one of the same values."""
        for step, value in earlier.intermediate_values.items():
            self._storage.set_trial_intermediate_value(self._trial_id(number), step, value)
        self.tell(number, earlier.state, earlier.value if earlier.state == TrialState.COMPLETE else None)

    def name(self, number: int, name: str) -> None:
        """Keeps the name of a trial's job."""
        self._storage.set_trial_user_attr(self._trial_id(number), _NAME, name)

    def name_of(self, trial: FrozenTrial) -> str:
        """The name of a trial's job; that of the trial it repeats, or nothing."""
        return str(trial.user_attrs.get(_NAME, ""))

    def _trial_id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _note_exhausted(self) -> None:
        self._study.set_user_attr(_EXHAUSTED, True)


def open_journal(folder: Path) -> JournalStorage:
    """The journal of a folder, which is made; half a line that a killed process has left is cut off.

    Raises:
        UserError: if it is damaged.
    """
    path = folder / JOURNAL_FILE
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: is damaged ({error}); move it away to search anew") from error


def load_study(storage: JournalStorage, pruner: BasePruner) -> optuna.Study:
    """The study of a journal, for its trials' own processes."""
    with _quiet():
        return optuna.load_study(study_name=STUDY_NAME, storage=storage, pruner=pruner)


def build_sampler(node: Mapping[str, Any], seed: int | None) -> BaseSampler:
    """The sampler that a setting names, with the seed of the search if it takes one and is not given another.

    Raises:
        UserError: if it is none.
    """
    given = {"seed": seed} if "seed" not in node and _takes_seed(node) else {}
    return _build("hydra.sweeper.sampler", node, BaseSampler, given)


def rehearse(settings: SearchSettings, space: Sequence[Dimension]) -> None:
    """Has the sampler choose values of some trials that are kept nowhere.

    Raises:
        UserError: if sampler or pruner cannot be made, or cannot choose from this space.
    """
    sampler = build_sampler(settings.sampler, settings.seed)
    pruner = build_pruner(settings.pruner)
    with _quiet():
        study = optuna.create_study(direction=settings.direction, sampler=sampler, pruner=pruner)
        study.stop = lambda: None  # type: ignore[method-assign]
        try:
            for _ in range(_REHEARSED):
                trial = study.ask()
                for dimension in space:
                    dimension.suggest(trial)
                study.tell(trial, 0.0)
        except Exception as error:  # of a package that is missing, of values that it does not know
            key, value = "hydra.sweeper.sampler", settings.sampler.get("_target_")
            raise UserError(f"cannot choose values: {flatten(error)}", key=key, value=value) from error


def build_pruner(node: Mapping[str, Any] | None) -> BasePruner:
    """The pruner that a setting names; one that ends nothing for None.

    Raises:
        UserError: if it is none.
    """
    return NopPruner() if node is None else _build("hydra.sweeper.pruner", node, BasePruner, {})


def _build(key: str, node: Mapping[str, Any], kind: type[Any], given: Mapping[str, Any]) -> Any:
    try:
        with _quiet():
            made = instantiate(dict(node), **given)
    except Exception as error:  # what a constructor raises
        raise UserError(
            f"cannot be made: {flatten(error.__cause__ or error)}", key=key, value=node.get("_target_")
        ) from error
    if not isinstance(made, kind):
        raise UserError(f"must be a subclass of {kind.__module__}.{kind.__name__}", key=key, value=node.get("_target_"))
    return made


def _takes_seed(node: Mapping[str, Any]) -> bool:
    from hydra.utils import get_class

    try:
        return "seed" in inspect.signature(get_class(str(node.get("_target_")))).parameters
    except Exception:  # said when it is made
        return False


def reseed(sampler: BaseSampler, seed: int | None, number: int) -> None:
    """Makes the random numbers of a sampler depend on the seed and the trial's number alone.

    Optuna's own way, `reseed_rng`, draws a new seed from the system.
    """
    if seed is None:
        return
    left: list[object] = [sampler]
    seen: set[int] = set()
    while left:
        owner = left.pop()
        for name, value in sorted(vars(owner).items()):
            random = getattr(value, "rng", value)
            if isinstance(random, np.random.RandomState) and id(random) not in seen:
                random.seed(np.random.SeedSequence([seed, number, len(seen)]).generate_state(4))
                seen.add(id(random))
            elif isinstance(value, BaseSampler) or name == "_child_generation_strategy":
                left.append(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's line on each trial, and its remarks on what is experimental."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        logger.setLevel(before)
