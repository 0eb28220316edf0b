"""What every benchmark writes down about the machine and the code, and the medians and tables they share."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "openrl_reason"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    ).stdout
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": f"{platform.machine()}, {models[0] if models else 'unknown CPU'}, {os.cpu_count()} cores",
        "commit": commit + (" with uncommitted changes" if dirty.strip() else ""),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved_cpu_seconds(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU-seconds of each candidate. They take turns, so that a busy minute of the machine falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write(name: str, config: dict, rows: list[dict]) -> None:
    """Prints the rows as a table and writes ``results/<name>.json``."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    shown = [[f"{row[c]:.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *shown]) for i in range(len(columns))]
    for line in [columns, *shown]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), "config": config, "results": rows}, indent=1) + "\n")
    print(f"\nwritten to {path}")
