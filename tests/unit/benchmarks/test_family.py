from __future__ import annotations

import subprocess
import sys
import time

from benchmarks._family import FamilyMeter

_BUSY = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"


def test_children_count_running_or_ended() -> None:
    with FamilyMeter(interval_s=0.05) as meter:
        before = meter.read()
        subprocess.run([sys.executable, "-c", _BUSY], check=True)
        after = meter.read()
        time.sleep(0.2)
    assert after.cpu_s - before.cpu_s >= 0.39
    assert after.seconds - before.seconds >= 0.39
    assert meter.peak > 10**7
    assert meter.stopped_s == 0


def test_suspended_time_is_left_out() -> None:
    with FamilyMeter(interval_s=3600) as meter:  # nobody ticks, as in a process that is suspended
        meter._last -= 100
        meter._started -= 100
        reading = meter.read()
        meter._end.set()
    assert 100 <= meter.stopped_s < 105
    assert reading.seconds < 5
