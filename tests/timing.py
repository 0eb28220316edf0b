"""Bounds on speed that hold on slow machines, too: CPU-seconds against a plain pass over as much text, taken in the same process."""

import functools
import re
import time


def cpu_seconds(function, enough=0.0):
    """The best of up to three runs, since others use the machine; one that takes less than ``enough`` will do."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        function()
        best = min(best, time.process_time() - started)
        if best < enough:
            break
    return best


@functools.cache
def one_pass():
    """CPU-seconds for finding a million line feeds one by one: 0.1 on a fast machine, 0.2 on a slow one."""
    text = "\n" * 1_000_000
    return cpu_seconds(lambda: [match.end() for match in re.finditer("\n", text)])
