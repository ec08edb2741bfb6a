"""What hangs or dies is named in time, wherever the main thread is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from m2_encoder.errors import UserError
from tests.unit.data.loading.test_loader import number_loader


def test_a_worker_that_is_killed_during_a_step_is_told_when_a_batch_is_due() -> None:
    others = multiprocessing.active_children()  # pools that earlier tests have left
    batches = iter(number_loader(num_workers=2, num_steps=1000))
    next(batches)
    workers = sorted(set(multiprocessing.active_children()) - set(others), key=lambda worker: worker.name)
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:  # the step; torch's own handler would raise in it
        pass
    with pytest.raises(UserError, match=r"a worker of the data loader died.*worker 0: .*try fewer data.num_workers"):
        list(batches)
