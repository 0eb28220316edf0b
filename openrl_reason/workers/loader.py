"""Work on the parts of a data set in Ray Data tasks, with the results in the parts' order."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from typing import Any

from openrl_reason.errors import WorkerError
from openrl_reason.workers.placement import PlacementConfig, ray_session


def map_parts(function: Callable[[int], dict[str, Any]], num_parts: int, *, placement: PlacementConfig | None = None) -> Generator[dict[str, Any]]:
    """``function(0)``, ``function(1)``, ...: JSON-able results in this order, whichever finishes first. Few results are in memory at a time.

    Uses the Ray that is connected, or starts one for the time of the iteration. Where a run's bundles hold all CPUs, whose actors do not work
    yet, tasks run beside them. A task whose worker dies is run again, so ``function`` must bear that; what it raises ends the iteration. Raises
    WorkerError when no task has finished for half an hour."""
    import ray
    from ray.data import DataContext, TaskPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(function(int(row["number"])))}

    with ray_session(placement or PlacementConfig()):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        free, all_cpus = int(ray.available_resources().get("CPU", 0)), int(ray.cluster_resources().get("CPU", 1))
        pool = TaskPoolStrategy(size=min(free or all_cpus, num_parts))
        context = DataContext.get_current().copy()
        context.enable_progress_bars = context.enable_operator_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        with DataContext.current(context):
            # Items, not a range: its blocks are there at once, where those of a range come from tasks that would wait for a CPU of their own.
            items = ray.data.from_items([{"number": number} for number in range(num_parts)], override_num_blocks=num_parts)
            results = items.map(call, compute=pool, num_cpus=1 if free else 0)
            try:
                for row in results.iter_rows():
                    yield json.loads(row["result"])
            except ExecutionTimeoutError as error:
                raise WorkerError(f"reading the data: no part was finished for {context.execution_no_progress_timeout_s:g} s: {error}") from error
