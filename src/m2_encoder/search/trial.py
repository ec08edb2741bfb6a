"""A trial of a search as its own process sees it: it reports what it measures, and hears when to end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_VARIABLE: Final = "M2_ENCODER_TRIAL"


class OwnTrial:
    """The trial that this process runs."""

    def __init__(self, folder: Path, number: int) -> None:
        from m2_encoder.search.study import PRUNER, STUDY_NAME, build_pruner, open_journal

        self._storage = open_journal(folder)
        self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        self._trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._pruner = build_pruner(self._storage.get_study_user_attrs(self._study_id).get(PRUNER))

    @property
    def last_step(self) -> int:
        """The last step of which a value was reported, by an earlier start, too; -1 without one."""
        step = self._storage.get_trial(self._trial_id).last_step
        return -1 if step is None else step

    def report(self, step: int, value: float) -> None:
        """Keeps the value of a step; a step that is done again has it already."""
        if step not in self._storage.get_trial(self._trial_id).intermediate_values:
            self._storage.set_trial_intermediate_value(self._trial_id, step, value)

    def is_hopeless(self) -> bool:
        """Whether the search wants the trial to end; it is noted then."""
        from m2_encoder.search.study import PRUNED_AT, load_study

        study = load_study(self._storage, self._pruner)
        if not self._pruner.prune(study, self._storage.get_trial(self._trial_id)):
            return False
        self._storage.set_trial_user_attr(self._trial_id, PRUNED_AT, self.last_step)
        return True


def find_own_trial() -> OwnTrial | None:
    """The trial of this process, or None: it belongs to no search, or to one that ends no trial early."""
    given = os.environ.get(_VARIABLE)
    if not given:
        return None
    content: dict[str, Any] = json.loads(given)
    return OwnTrial(Path(content["folder"]), content["number"])


@contextmanager
def announce_trial(folder: Path, number: int | None) -> Iterator[None]:
    """Processes that are started inside belong to a trial; to none that reports for None."""
    if number is None:
        yield
        return
    os.environ[_VARIABLE] = json.dumps({"folder": str(folder.absolute()), "number": number})
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
