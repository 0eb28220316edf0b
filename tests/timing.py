"""Bounds on speed that hold on slow and busy machines, too: CPU time in plain passes over a million characters, taken in the same moment.

A plain pass takes about 0.1 CPU-seconds on a fast machine. The garbage collector rests meanwhile: how long it takes depends on what the whole test
process has imported, and not on the code that is timed.
"""

import gc
import re
import time
from collections.abc import Callable

TEXT = "\n" * 1_000_000
_quickest_pass = float("inf")


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        started = time.process_time()
        function()
        return time.process_time() - started
    finally:
        if was_enabled:
            gc.enable()


def plain_pass() -> float:
    """CPU-seconds for finding a million line feeds one by one."""
    global _quickest_pass
    seconds = cpu_seconds(lambda: [match.end() for match in re.finditer("\n", TEXT)])
    _quickest_pass = min(_quickest_pass, seconds)
    return seconds


def passes(function: Callable[[], object], bound: float, attempts: int = 10) -> float:
    """How many plain passes a call of ``function`` takes; one call where that is below ``bound``, as it is but for noise.

    One call is held against the quickest pass that this process has ever seen. A call that takes longer is repeated with a pass beside each, since
    others on the machine slow both down: the quickest call is then held against the quickest of those passes.
    """
    if _quickest_pass == float("inf"):
        plain_pass()
    quickest = cpu_seconds(function)
    if quickest < bound * _quickest_pass:
        return quickest / _quickest_pass
    beside = plain_pass()
    for _ in range(attempts):
        if quickest < bound * beside:
            break
        quickest, beside = min(quickest, cpu_seconds(function)), min(beside, plain_pass())
    return quickest / beside
