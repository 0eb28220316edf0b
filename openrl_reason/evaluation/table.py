"""Results as tables to read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

NARROW = 150


def cell(mean: Mapping[str, Any]) -> str:
    """An estimate in per cent with its interval: ``45.2 [42.5, 47.9]``; a star marks a bootstrap, Wilson's intervals have none."""
    if mean["value"] is None:
        return "-"
    if mean["low"] is None:
        return f"{100 * mean['value']:.1f}"
    return f"{100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]{'*' if mean['method'] == 'bootstrap' else ''}"


def set_rows(result: Mapping[str, Any], flat: Mapping[str, float], estimated: Sequence[str]) -> list[dict[str, str]]:
    """A row for the set and one for each further grader; columns are metrics, those with an interval (``estimated``) first."""
    rows = []
    for place, (grader, found) in enumerate(result["estimates"].items()):
        prefix = f"eval/{result['name']}" + (f"/{grader}" if place else "")
        row = {"set": result["name"], "graded by": grader, "items": str(result["num_items"]), "n": str(result["num_samples"])}
        row |= {name: cell(found[name]) if name in found else "" for name in estimated}
        row["no answer"] = f"{100 * flat[f'{prefix}/no_answer_rate']:.1f}"
        failed = flat[f"{prefix}/ungraded_rate"]
        bound = f" (>= {100 * flat[f'{prefix}/pass@1_failures_as_wrong']:.1f})" if failed else ""
        row["grader failed"] = f"{100 * failed:.1f}{bound}"
        if not place:
            row["cut off"] = f"{100 * flat[f'{prefix}/truncated_rate']:.1f}"
            row["tokens"] = f"{flat[f'{prefix}/response_length']:.0f} / {flat[f'{prefix}/response_length_median']:.0f}"
        rows.append(row)
    return rows


def print_table(rows: Sequence[Mapping[str, str]], title: str) -> None:
    """Prints dictionaries as a table; columns in the order in which they first appear."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in ("set", "graded by", "group") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in columns))
    console = Console(markup=False, highlight=False)
    if not sys.stdout.isatty():  # a log is as wide as it needs to be
        console = Console(width=max(NARROW, 22 * len(columns)), markup=False, highlight=False)
    console.print(table)


def print_results(results: Sequence[Mapping[str, Any]], flat: Mapping[str, float], confidence: float) -> None:
    """The sets' table, then each set's groups."""
    found = {name for result in results for estimates in result["estimates"].values() for name in estimates}
    estimated = sorted(found, key=lambda name: (not name.startswith("pass"), not name.startswith("maj"), len(name), name))
    rows = [row for result in results for row in set_rows(result, flat, estimated)]
    print_table(rows, f"per cent [{100 * confidence:g} % interval; Wilson, * bootstrap over items]; tokens: mean / median")
    for result in results:
        for key, groups in result["tables"].items():
            lines = [
                {"group": group["group"], "items": str(group["items"])}
                | {name: cell(mean) for name, mean in group.items() if isinstance(mean, Mapping)}
                for group in groups
            ]
            print_table(lines, f"{result['name']} by {key}")
