"""``openrl-reason report RUN [RUN ...]``: runs as one HTML file that opens anywhere, with no network.

Everything is inside the file: styles, scripts, Plotly, and the data as gzip in base64, so that no text of a model is ever parsed as HTML. A
Content-Security-Policy allows the page's own scripts (by their hashes) and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.resources
import json
import os
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrl_reason import __version__
from openrl_reason.config import parse_config, require, split_words
from openrl_reason.environment import require as require_package
from openrl_reason.observe import report_alarms
from openrl_reason.observe.redact import redact, redact_values
from openrl_reason.observe.report_data import Run, curves, facts, flatten, key_figures, metric_names, read_runs, timing_table
from openrl_reason.observe.report_layout import layout
from openrl_reason.observe.report_rollouts import Packed, fit

SCRIPTS = ("core.js", "charts.js", "distributions.js", "trajectories.js", "app.js")
MAX_RUNS = 8


@dataclass(frozen=True)
class ReportConfig:
    """Runs as one self-contained HTML page."""

    runs: tuple[str, ...] = ()
    """Run folders (the words of the command line that are no flags)."""
    output: str = ""
    """The HTML file (empty: report.html in the first run's folder)."""
    title: str = ""
    """Title of the page (empty: the runs' names)."""
    max_trajectories: int = 5000
    """Trajectories in the page, over all runs: an evenly spread sample where rollouts.jsonl holds more. 0: none."""
    max_megabytes: float = 24.0
    """Largest size of the page; trajectories are left out, evenly, to stay below."""

    def __post_init__(self) -> None:
        require(self.max_trajectories >= 0, "max_trajectories", self.max_trajectories, "use 0 for none, or a number")
        require(self.max_megabytes >= 5, "max_megabytes", self.max_megabytes, "the page itself takes 2 to 4: use 5 or more")
        require(len(self.runs) <= MAX_RUNS, "runs", f"{len(self.runs)} folders", f"at most {MAX_RUNS} can be told apart in one chart")


def parse_report_words(argv: Sequence[str], prog: str) -> ReportConfig:
    """The words of the command line: run folders anywhere, and flags with their values."""
    folders, flags = split_words(ReportConfig, argv)
    return parse_config(ReportConfig, [*(["--runs", json.dumps(folders)] if folders else []), *flags], prog=prog)


def report(config: ReportConfig) -> Path:
    """Writes the page and returns its path."""
    runs = read_runs(config.runs)
    path = Path(config.output).expanduser() if config.output else runs[0].folder / "report.html"
    require(not path.is_dir(), "output", str(path), "that is a folder: give a file name")
    started = time.perf_counter()
    page = build_page(runs, title=config.title, max_trajectories=config.max_trajectories, max_bytes=int(config.max_megabytes * 1e6))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        require(False, "output", str(path), error.strerror or str(error))
    print(f"report: {path}  ({path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s)")
    return path


def build_page(runs: Sequence[Run], *, title: str = "", max_trajectories: int = 5000, max_bytes: int = 24_000_000) -> str:
    """The HTML of the page."""
    title = title or " · ".join(run.name for run in runs)
    blocks = {"curves": block_json([curves(run) for run in runs])}
    plotly = plotly_javascript()
    blocks["plotly"] = block(plotly.encode("utf-8"))
    room = max_bytes - sum(map(len, blocks.values())) - 300_000  # the page's own text, and the indexes
    samples = [fit(run.rollouts_path, max_trajectories // len(runs), room // len(runs)) for run in runs]
    blocks["meta"] = block_json(page_data(runs, samples, title))
    for number, sample in enumerate(samples):
        for chunk, (texts, numbers) in enumerate(zip(sample.texts, sample.numbers, strict=True)):
            blocks[f"texts-{number}-{chunk}"], blocks[f"numbers-{number}-{chunk}"] = encode(texts), encode(numbers)
    script = "\n".join(asset(name) for name in SCRIPTS)
    script = f"(function () {{\n'use strict';\n{script}\n}})();\n"
    data = "\n".join(f'<script type="application/octet-stream" id="data-{name}">{text}</script>' for name, text in blocks.items())
    template = string.Template(asset("report.html"))
    return template.substitute(title=html.escape(_encodable(title)), csp=policy(script, plotly), style=asset("report.css"), script=script, data=data)


def page_data(runs: Sequence[Run], samples: Sequence[Packed], title: str) -> dict[str, Any]:
    """What the page shows at once: header, alarms, the charts' arrangement, and the trajectories' indexes."""
    names = dict.fromkeys(name for run in runs for name in metric_names([*run.evals, *run.train]))
    return {
        "title": title,
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "groups": layout(list(names)),
        "checks": report_alarms.checks(),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "facts": [(what, redact_values(value)) for what, value in facts(run)],
                "figures": key_figures(run),
                "alarms": [alarm.as_dict() for alarm in report_alarms.alarms([*run.train, *run.evals])],
                "timing": timing_table(run),
                "config": flatten(redact(run.config)),
                "num_damaged": run.num_damaged,
                "trajectories": sample.index,
            }
            for run, sample in zip(runs, samples, strict=True)
        ],
    }


# ---- the file ------------------------------------------------------------------------------------------------------------------


def asset(name: str) -> str:
    """A file of ``report_assets``."""
    return importlib.resources.files("openrl_reason.observe").joinpath("report_assets", name).read_text(encoding="utf-8")


def plotly_javascript() -> str:
    """Plotly's script as the installed package bundles it."""
    return require_package("plotly.offline", "to draw the report's charts").get_plotlyjs()


def block(data: bytes) -> str:
    """Bytes as the page holds them: gzip in base64, which no HTML parser can take for markup."""
    return encode(gzip.compress(data, compresslevel=6, mtime=0))


def block_json(value: Any) -> str:
    """JSON as the page holds it. ASCII: U+2028 and lone surrogates travel as escapes. NaN would not be JSON."""
    return block(json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii"))


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def policy(*scripts: str) -> str:
    """The Content-Security-Policy: these scripts, inline styles, images and downloads made on the page, nothing from anywhere."""
    hashes = " ".join(f"'sha256-{encode(hashlib.sha256(script.encode('utf-8')).digest())}'" for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
