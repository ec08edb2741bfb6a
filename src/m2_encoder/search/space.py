"""What a search chooses from, read from overrides: `choice(...)`, `a,b`, `range(...)`, `interval(...)`, with tags."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    QuotedString,
    RangeSweep,
)

from m2_encoder.config.overrides import line_problem, parse_override
from m2_encoder.config.problems import refuse_all
from m2_encoder.config.sweeps import is_sweep_line
from m2_encoder.errors import Problem

if TYPE_CHECKING:
    import optuna

_FORMS: Final = "write choice(a,b), a,b, range(1,9), interval(0,1), int(interval(1,9)) or tag(log,interval(1e-4,1e-2))"


class Dimension(NamedTuple):
    """One key that a search varies."""

    key: str  # as an override writes it, such as `+data.x`
    choices: tuple[Any, ...] = ()  # the values of a choice
    texts: tuple[str, ...] = ()  # those values as overrides write them
    low: float = 0  # of a range or an interval
    high: float = 0  # that may be chosen, too
    step: float | None = None  # None for an interval of real numbers
    log: bool = False
    whole: bool = False  # numbers, all of these are int then

    def suggest(self, trial: optuna.trial.Trial) -> str:
        """Has a trial choose a value; the override that says it."""
        if self.choices:
            value: Any = trial.suggest_categorical(self.key, self.choices)
        elif self.whole:
            value = trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        else:
            value = trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        return self.write(value)

    def write(self, value: Any) -> str:
        """The override for a value.

        >>> Dimension("lr", low=0.1, high=0.5, step=0.1).write(0.30000000000000004)
        'lr=0.3'
        """
        if self.choices:
            return f"{self.key}={self.texts[self.choices.index(value)]}"
        if self.step is not None and not self.whole:
            steps = round((value - self.low) / self.step)
            value = Decimal(str(self.low)) + steps * Decimal(str(self.step))
        return f"{self.key}={value}"

    def examples(self) -> list[str]:
        """Overrides that stand for all of its values: each choice, or both ends."""
        return list(dict.fromkeys(map(self.write, self.choices or (self.low, self.high))))

    def __str__(self) -> str:
        if self.choices:
            return ",".join(self.texts)
        step = "" if self.step is None else f" by {self.step}"
        return f"{self.low}..{self.high}{step}{' (log)' if self.log else ''}"


def read_space(lines: Sequence[str]) -> list[Dimension]:
    """The keys that overrides vary.

    Raises:
        UserError: for what cannot be searched, or if nothing varies.
    """
    found: dict[str, Dimension] = {}
    problems: list[Problem] = []
    for line in lines:
        override = parse_override(line) if is_sweep_line(line) else None
        if override is None:
            continue
        reason = _find_fault(override)
        if override.get_key_element() in found:
            reason = reason or ("is there twice", "give it once")
        if reason is not None:
            problems.append(line_problem(line, *reason))
        else:
            dimension = _read(override)
            found[dimension.key] = dimension
    if not found and not problems:
        rule = "varies nothing, so there is nothing to search"
        problems = [Problem("hydra/sweeper", "search", rule, "add KEY=interval(LOW,HIGH) or KEY=choice(A,B)")]
    refuse_all(problems)
    return list(found.values())


def _find_fault(override: Override) -> tuple[str, str] | None:
    """The rule that a swept value breaks, and what to write."""
    sweep = override.value()
    if override.key_or_group == "run.name":
        return "the names of trials are made of what they vary", "give one run.name"
    if override.key_or_group.split(".")[0] == "hydra":
        return "is not a setting of a job", "give one value"
    if not isinstance(sweep, ChoiceSweep | RangeSweep | IntervalSweep):
        return "cannot be searched", _FORMS
    if sweep.tags - {"log"}:
        return f"the tag {min(sweep.tags - {'log'})} means nothing here", "the only tag is log"
    if isinstance(sweep, ChoiceSweep):
        values = _read_choices(sweep)
        if sweep.tags:
            return "a choice has no logarithm", "tag a range or an interval"
        return ("holds a value twice", "name each once") if len(set(values)) < len(values) else None
    dimension = _read(override)
    if not math.isfinite(dimension.low) or not math.isfinite(dimension.high) or dimension.low > dimension.high:
        return "holds no number", "its first number must be below the second, and both finite"
    if dimension.log and dimension.low <= 0:
        return "has a logarithm of 0 or less", "begin above 0"
    if dimension.log and dimension.step not in (None, 1):
        return "a logarithmic range cannot have a step", "use tag(log,interval(LOW,HIGH))"
    return None


def _read(override: Override) -> Dimension:
    key, sweep = override.get_key_element(), override.value()
    if isinstance(sweep, ChoiceSweep):
        return Dimension(key, tuple(_read_choices(sweep)), tuple(map(str, override.sweep_string_iterator())))
    assert isinstance(sweep, RangeSweep | IntervalSweep)
    log = "log" in sweep.tags
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        whole = all(isinstance(each, int) for each in (sweep.start, sweep.end))
        return Dimension(key, low=sweep.start, high=sweep.end, step=1 if whole else None, log=log, whole=whole)
    assert sweep.start is not None
    assert sweep.stop is not None
    return _read_range(Dimension(key, low=sweep.start, high=sweep.stop, step=sweep.step, log=log))


def _read_range(given: Dimension) -> Dimension:
    """A range that ends at its last value, as Hydra leaves out the end that is written."""
    low, stop, step = (Decimal(str(each)) for each in (given.low, given.high, given.step))
    if not all(each.is_finite() for each in (low, stop, step)) or step == 0:
        return given._replace(low=math.inf)
    steps = math.ceil((stop - low) / step) - 1
    if steps < 0:
        return given._replace(low=math.inf)
    ends = sorted((low, low + steps * step))
    if all(isinstance(each, int) for each in (given.low, given.high, given.step)):
        return given._replace(low=int(ends[0]), high=int(ends[1]), step=int(abs(step)), whole=True)
    return given._replace(low=float(ends[0]), high=float(ends[1]), step=float(abs(step)))


def _read_choices(sweep: ChoiceSweep) -> list[Any]:
    """Values that Optuna can keep: a list or a mapping as its text."""

    def plain(item: Any) -> Any:
        if isinstance(item, QuotedString):
            return item.text
        return str(Override._get_value_element_as_str(item)) if isinstance(item, list | dict) else item

    return [plain(item) for item in sweep.list]
