"""The rank of this process by environment variables of launchers, before any process group exists."""

from __future__ import annotations

import os
from typing import Final

_RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_rank() -> bool:
    """Whether this process is the only one, or the first of several."""
    return all(os.environ.get(variable, "0") in {"", "0"} for variable in _RANK_VARIABLES)


def is_only_rank() -> bool:
    """Whether no launcher has given this process a rank."""
    return not any(os.environ.get(variable) for variable in _RANK_VARIABLES)
