"""``values.html``: an analysis of values as one file that opens anywhere, with no network. Its parts are those of the run report."""

from __future__ import annotations

import html
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrl_reason import __version__
from openrl_reason.evaluation.folders import without_nan
from openrl_reason.evaluation.value_study import ValueStudy, accuracy_rows, position_rows, positions_of, ranking_rows
from openrl_reason.observe.report import asset, block, block_json, plotly_javascript, policy

# Uses of core.js: h, fill, unpackJSON, startTheme, toggleTheme, color, cssColor, faded; of charts.js: lazyCard, baseLayout, PLOT_CONFIG.
_SCRIPT = """
function table(found) {
  return h('div', { class: 'scroll' }, h('h3', {}, found.title), h('table', { class: 'plain compare' },
    h('thead', {}, h('tr', {}, found.columns.map((name) => h('th', {}, name)))),
    h('tbody', {}, found.rows.map((row) => h('tr', {}, row.map((text) => h('td', {}, text)))))));
}
function chart(figure) {
  const box = h('div', { class: 'plot', style: { height: figure.height + 'px' } });
  lazyCard(box, async (Plotly, place) => {
    const traces = figure.traces.map(({ series, band, ...trace }) => {
      const hue = series === null ? cssColor('muted') : color(series);
      const look = band ? { fillcolor: faded(color(series), 0.15), line: { width: 0 } }
        : { line: { color: hue, width: 1.6, ...trace.line }, marker: { color: hue, ...trace.marker } };
      return { ...trace, ...look };
    });
    const axis = (own, side) => ({ ...own, zeroline: false, showgrid: true, gridcolor: cssColor('grid'), title: { ...own.title, standoff: side } });
    const layout = baseLayout({ ...figure.layout, hovermode: 'closest', xaxis: axis(figure.layout.xaxis, 6), yaxis: axis(figure.layout.yaxis, 4) });
    await Plotly.react(place, traces, layout, PLOT_CONFIG);
  });
  return h('figure', { class: 'card chart' }, h('figcaption', {}, h('h4', {}, figure.title), h('p', { class: 'muted' }, figure.note)),
    h('div', { class: 'legend' }, figure.traces.filter((trace) => trace.showlegend).map((trace) => h('span', {},
      h('span', { class: 'swatch', style: { background: trace.series === null ? cssColor('muted') : color(trace.series) } }), trace.name))), box);
}
async function main() {
  startTheme();
  const data = await unpackJSON('page');
  const draw = () => fill(document.getElementById('main'), h('h1', {}, data.title),
    h('p', { class: 'chips' }, data.facts.map((fact) => h('span', { class: 'chip-fact' }, fact))),
    data.tables.map(table), data.groups.map((group) => [h('h2', {}, group.title), h('div', { class: 'grid' }, group.figures.map(chart))]));
  draw();
  themeListeners.push(() => { for (const card of cards.splice(0)) observer.unobserve(card.box); draw(); });
  fill(document.getElementById('top'), h('div', { class: 'bar' }, h('nav', {}), h('button', { onclick: toggleTheme }, 'Light or dark')));
  fill(document.getElementById('foot'), h('p', { class: 'muted' }, data.written));
  root.dataset.ready = String(Math.round(performance.now()));
}
main().catch((error) => reportError(String((error && error.stack) || error)));
"""


def write_page(study: ValueStudy, summary: Mapping[str, Any], path: Path) -> None:
    """Writes the page."""
    plotly, data = plotly_javascript(), page_data(study, summary)
    script = "(function () {\n'use strict';\n" + "\n".join([asset("core.js"), asset("charts.js"), _SCRIPT]) + "})();\n"
    blocks = {"plotly": block(plotly.encode("utf-8")), "page": block_json(without_nan(data))}
    text = string.Template(asset("report.html")).substitute(
        title=html.escape(data["title"]), csp=policy(script, plotly), style=asset("report.css"), script=script,
        data="\n".join(f'<script type="application/octet-stream" id="data-{name}">{content}</script>' for name, content in blocks.items()),
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def page_data(study: ValueStudy, summary: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows."""
    config, counts, truth = summary["config"], summary["counts"], summary["truth"]
    facts = [
        f"model {config['model']}", f"task {config['task']['name']} ({config['split']})",
        f"{truth['num_states']} states of {truth['num_problems']} problems",
        f"truth: {config['truth_rollouts']} rollouts", f"mean value {truth['mean']:.3f}", f"temperature {config['sampling']['temperature']:g}",
        f"{counts['rollouts']} rollouts, {counts['without_reward']} without a reward, {counts['truncated']} cut off",
    ]  # fmt: skip
    tables = []
    if summary["estimators"]:
        tables += [_table("Accuracy", accuracy_rows(summary, config["delta"])), _table("Mean absolute error by position", position_rows(summary))]
    if summary["ranking"]:
        tables.append(_table(f"Ranking of next steps ({counts['ranking_states_skipped']} states skipped)", ranking_rows(summary)))
    groups = []
    if summary["estimators"]:
        errors = [_errors(summary, "by_position", "relative position of the state"), _errors(summary, "by_step", "steps before the state")]
        groups = [
            {"title": "Predictions against truths", "figures": [_scatter(study, summary, n, name) for n, name in enumerate(study.predictions)]},
            {"title": "Errors along the response, and calibration", "figures": [*errors, _calibration(summary)]},
        ]
    written = f"openrl_reason {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
    return {"title": "Accuracy of values", "facts": facts, "tables": tables, "groups": groups, "written": written}


_HEADS = {"set": "estimator", "group": "position"}


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    named = [_HEADS.get(name, name) for name in columns]
    return {"title": title, "columns": named, "rows": [[row.get(name, "") for name in columns] for row in rows]}


def _figure(title: str, note: str, traces: list[dict[str, Any]], x: str, y: str, *, height: int = 300, **axes: Any) -> dict[str, Any]:
    layout = {"xaxis": {"title": {"text": x}, **axes.get("xaxis", {})}, "yaxis": {"title": {"text": y}, **axes.get("yaxis", {})},
              "margin": {"l": 52, "r": 12, "t": 8, "b": 42}}  # fmt: skip
    return {"title": title, "note": note, "traces": traces, "layout": layout, "height": height}


def _line(x: Sequence[float], y: Sequence[float], series: int | None, name: str, **more: Any) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y), "series": series, "name": name, "showlegend": True} | more


def _scatter(study: ValueStudy, summary: Mapping[str, Any], number: int, name: str) -> dict[str, Any]:
    truth, predictions = study.truth.values, study.predictions[name]
    used = np.flatnonzero(np.isfinite(truth) & np.isfinite(predictions))
    about = [f"{study.states[i].prefix.key}<br>step {study.states[i].step} of {study.states[i].num_steps}" for i in used]
    x, y = truth[used].round(5).tolist(), predictions[used].round(5).tolist()
    low, high = min([0.0, *x, *y]), max([1.0, *x, *y])
    points = {"type": "scattergl" if len(x) > 20_000 else "scatter", "mode": "markers", "x": x, "y": y, "text": about, "series": number, "name": name,
              "marker": {"size": 6, "opacity": 0.5}, "hovertemplate": "truth %{x:.3f}, prediction %{y:.3f}<br>%{text}<extra></extra>"}  # fmt: skip
    diagonal = _line([low, high], [low, high], None, "", mode="lines", showlegend=False, hoverinfo="skip")
    overall = summary["estimators"][name]["overall"]
    note = f"{len(x)} states; MAE {overall['mae']['value']:.3f}, correlation {overall['correlation']['value']:.2f}"
    span = {"range": [low - 0.04 * (high - low), high + 0.04 * (high - low)]}
    return _figure(name, note, [diagonal, points], "true value", "prediction", height=360, xaxis=span, yaxis=span)


def _errors(summary: Mapping[str, Any], key: str, label: str) -> dict[str, Any]:
    centres, traces = positions_of(summary, key), []
    for number, (name, found) in enumerate(summary["estimators"].items()):
        rows = [(x, row["mae"]) for x, row in zip(centres, found[key], strict=True) if row["num_states"]]
        known = [(x, mae) for x, mae in rows if mae["method"] != "none"]
        there_and_back = [x for x, _ in known] + [x for x, _ in reversed(known)]
        bounds = [mae["high"] for _, mae in known] + [mae["low"] for _, mae in reversed(known)]
        traces.append(_line(there_and_back, bounds, number, name, mode="lines", fill="toself", band=True, showlegend=False, hoverinfo="skip"))
        traces.append(_line([x for x, _ in rows], [mae["value"] for _, mae in rows], number, name))
    noise = [row["noise_mae"] for row in summary[f"truth_{key}"]]
    traces.append(_line(centres, noise, None, "truth's own noise", mode="lines", line={"dash": "dash"}))
    along = {"range": [0, 1]} if key == "by_position" else {"dtick": 1} if len(centres) < 20 else {}
    axes = {"xaxis": along, "yaxis": {"rangemode": "tozero"}}
    return _figure(f"Mean absolute error by {label}", "Bands: intervals over problems.", traces, label, "error", **axes)


def _calibration(summary: Mapping[str, Any]) -> dict[str, Any]:
    traces = [_line([0, 1], [0, 1], None, "", mode="lines", showlegend=False, hoverinfo="skip")]
    for number, (name, found) in enumerate(summary["estimators"].items()):
        rows = [row for row in found["calibration"]["bins"] if row["num_states"]]
        sizes = [4 + min(16.0, row["num_states"] ** 0.5) for row in rows]
        traces.append(
            _line([row["prediction"] for row in rows], [row["truth"] for row in rows], number, name, marker={"size": sizes},
                  text=[f"{row['num_states']} states" for row in rows], hovertemplate="prediction %{x:.3f}, truth %{y:.3f}<br>%{text}")
        )  # fmt: skip
    return _figure("Calibration", "Mean true value of the states with about one prediction.", traces, "mean prediction", "mean true value")
