"""What analyses leave in their output folders: whether they may, tables as CSV, and numbers that CSV and JSON can hold."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openrl_reason.config import require
from openrl_reason.evaluation.config import check_output_file


def check_output_folder(output: str, *, overwrite: bool) -> None:
    """Refuses an output that exists, unless it is an earlier analysis and may be replaced. Empty: there will be none."""
    if not output:
        return
    folder = Path(output)
    if not folder.exists():
        check_output_file(folder)
    require(not folder.exists() or overwrite, "output", output, "it exists: choose another folder, or pass --overwrite true")
    ours = folder.is_dir() and ((folder / "summary.json").is_file() or not any(folder.iterdir()))
    require(ours or not folder.exists(), "output", output, "that is no earlier analysis, and is not overwritten: choose another folder")


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with a line of names."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def number_text(value: float) -> str:
    """Seven digits: a float32 to the last bit that matters; empty for NaN."""
    return f"{value:.7g}" if math.isfinite(value) else ""


def without_nan(value: Any) -> Any:
    """The same for JSON, which has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
