// Curves: cards that draw themselves when they come into view, smoothed in the browser, with one shared range of steps.

let plotlyReady = null;
// The script is admitted by its hash, so what was packed is what runs.
function loadPlotly() {
  plotlyReady = plotlyReady || unpackText('plotly').then((text) => {
    const script = document.createElement('script');
    script.textContent = text;
    document.head.append(script);
    script.textContent = '';
    if (!window.Plotly) throw new Error('Plotly did not start');
    return window.Plotly;
  });
  return plotlyReady;
}

const PLOT_CONFIG = { displayModeBar: false, responsive: true, displaylogo: false, doubleClick: 'reset', showTips: false };
const DASHES = ['solid', 'dash', 'dot', 'dashdot', 'longdash'];
const cards = [];
const state = { smoothing: 0, range: null, hidden: new Set(), maxStep: 1, width: undefined, printing: false };

function baseLayout(extra) {
  const text = cssColor('muted');
  const grid = cssColor('grid');
  const axis = { gridcolor: grid, zerolinecolor: cssColor('line'), linecolor: cssColor('line'), tickfont: { size: 11, color: text }, fixedrange: false };
  const { xaxis, yaxis, ...rest } = extra || {};
  return {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { family: 'system-ui, sans-serif', size: 12, color: text },
    margin: { l: 44, r: 12, t: 8, b: 24 }, showlegend: false, hovermode: 'x unified', dragmode: 'zoom',
    hoverlabel: { bgcolor: cssColor('card'), bordercolor: cssColor('line'), font: { color: cssColor('text'), size: 12 }, namelength: 40 },
    width: state.width, xaxis: { ...axis, showgrid: false, zeroline: false, ...xaxis }, yaxis: { ...axis, fixedrange: true, automargin: true, exponentformat: 'e', ...yaxis }, ...rest,
  };
}

// A card whose `draw(Plotly, box)` runs when it is first seen, and again when the theme or a control changes it.
function lazyCard(box, draw) {
  const card = { box, draw, drawn: false, seen: false };
  cards.push(card);
  observer.observe(box);
  return card;
}
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const card = cards.find((candidate) => candidate.box === entry.target);
    if (!card) continue;
    card.seen = entry.isIntersecting;
    if (entry.isIntersecting) drawCard(card);
  }
}, { rootMargin: '250px' });

async function drawCard(card, force) {
  if ((card.drawn && !force) || card.drawing) return;
  card.drawing = true;
  const Plotly = await loadPlotly();
  state.width = state.printing ? card.box.clientWidth : undefined; // paper has no resize event
  await card.draw(Plotly, card.box);
  card.drawn = true;
  card.drawing = false;
  card.box.dataset.drawn = '1';
}
// What is in view changes now, the rest when it is next seen.
function redrawAll() {
  for (const card of cards) {
    if (card.seen && card.drawn) drawCard(card, true);
    else card.drawn = false;
  }
}
async function drawEverything(force) { for (const card of cards) await drawCard(card, force); }

// ---- smoothing ---------------------------------------------------------------------------------------------------------------

// Exponential mean over about `window` steps, started without bias; gaps stay gaps. A thinned curve is smoothed over its buckets' means.
function smooth(x, y, window) {
  const out = new Array(y.length).fill(null);
  let sum = 0, weight = 0, last = null;
  for (let i = 0; i < y.length; i++) {
    if (y[i] === null) continue;
    const decay = last === null ? 0 : Math.exp(-(x[i] - last) / window);
    sum = sum * decay + y[i];
    weight = weight * decay + 1;
    last = x[i];
    out[i] = sum / weight;
  }
  return out;
}

function tracesOf(curve, name, hue, dash, share, smoothing, quiet) {
  const shown = share ? '.3~%' : '.4~g';
  const few = curve.x.length <= 40;
  const traces = [];
  if (curve.low) {
    const edge = { x: curve.x, mode: 'lines', line: { width: 0 }, hoverinfo: 'skip', connectgaps: true };
    traces.push({ ...edge, y: curve.low }, { ...edge, y: curve.high, fill: 'tonexty', fillcolor: faded(hue, 0.16) });
  }
  const smoothed = smoothing > 0 && !curve.eval && curve.x.length > 8;
  const line = { x: curve.x, y: curve.y, name, mode: few && !quiet ? 'lines+markers' : 'lines', connectgaps: few, marker: { size: few ? 5 : 3 }, line: { color: hue, width: smoothed ? 1 : 1.6, dash } };
  if (!smoothed) {
    traces.push({ ...line, hovertemplate: '%{y:' + shown + '}' });
    return traces;
  }
  traces.push({ ...line, mode: 'lines', line: { color: faded(hue, 0.28), width: 1 }, hoverinfo: 'skip' });
  const x = curve.mx || curve.x, y = curve.my || curve.y;
  traces.push({
    x, y: smooth(x, y, smoothing), customdata: y, name, mode: 'lines', line: { color: hue, width: 2.2, dash },
    hovertemplate: '%{y:' + shown + '} <span style="opacity:.7">(' + (curve.my ? 'mean here' : 'raw') + ' %{customdata:' + shown + '})</span>',
  });
  return traces;
}

// ---- a chart of metrics ------------------------------------------------------------------------------------------------------

function metricCard(chart, data) {
  const runs = data.meta.runs;
  const box = h('div', { class: 'plot' });
  const present = [];
  runs.forEach((run, r) => chart.metrics.forEach((metric, m) => { if (data.curves[r][metric]) present.push({ r, m, metric, curve: data.curves[r][metric] }); }));
  let logarithmic = false;
  const logButton = h('button', { class: 'small', title: 'logarithmic axis', 'aria-pressed': 'false', onclick: () => { logarithmic = !logarithmic; logButton.setAttribute('aria-pressed', String(logarithmic)); drawCard(card, true); } }, 'log');
  const bigButton = h('button', { class: 'small', title: 'wider and taller', 'aria-pressed': 'false', onclick: () => {
    const big = figure.classList.toggle('big');
    bigButton.setAttribute('aria-pressed', String(big));
    drawCard(card, true);
  } }, '⤢');
  const legend = h('div', { class: 'legend' });
  const thinned = present.find((part) => part.curve.per);
  const figure = h('figure', { class: 'card chart', id: 'chart-' + cards.length },
    h('figcaption', {}, h('div', { class: 'chart-head' }, h('h4', {}, chart.title), h('span', { class: 'buttons' }, thinned && h('span', { class: 'tag', title: 'Of every ' + format(thinned.curve.per, 3) + ' steps the smallest and the largest value are drawn, so that spikes survive; smoothing runs over their means.' }, 'thinned'), logButton, bigButton)),
      h('p', { class: 'muted' }, chart.text || '', ' ', h('code', {}, chart.metrics.length > 3 ? chart.metrics.slice(0, 2).join(', ') + ', …' : chart.metrics.join(', ')))),
    legend, box);
  figure.dataset.metrics = chart.metrics.join(' ');
  const card = lazyCard(box, (Plotly, plot) => {
    const several = runs.length > 1;
    const hue = (part) => (several ? color(part.r) : color(part.m));
    const dash = (part) => (several ? DASHES[part.m % DASHES.length] : 'solid');
    legend.replaceChildren(...(chart.metrics.length > 1 ? chart.metrics.map((metric, m) => legendEntry(shortName(metric, chart), several ? cssColor('muted') : color(m), several ? DASHES[m % DASHES.length] : 'solid')) : []));
    const traces = [];
    for (const part of present) {
      if (state.hidden.has(part.r)) continue;
      const label = several ? runs[part.r].name + (chart.metrics.length > 1 ? ' · ' + shortName(part.metric, chart) : '') : shortName(part.metric, chart);
      traces.push(...tracesOf(part.curve, plain(label), hue(part), dash(part), chart.share, state.smoothing, several && part.m > 0));
    }
    let most = 0;
    for (const part of present) for (const value of part.curve.y) most = Math.max(most, Math.abs(value || 0));
    const layout = baseLayout({
      xaxis: { range: state.range || undefined, autorange: !state.range, tickformat: 'd' },
      yaxis: { type: logarithmic ? 'log' : 'linear', tickformat: chart.share && !logarithmic ? '~%' : undefined, rangemode: chart.share ? 'tozero' : 'normal', exponentformat: most >= 1e4 ? 'SI' : 'e' },
      shapes: alarmShapes(chart, runs),
    });
    plot.style.height = figure.classList.contains('big') ? '440px' : '210px';
    return Plotly.react(plot, traces, layout, PLOT_CONFIG).then(() => {
      if (plot.dataset.wired) return;
      plot.dataset.wired = '1';
      plot.on('plotly_relayout', (change) => shareRange(change, plot));
    });
  });
  return figure;
}
// A chart of nothing but constants is one line of text instead, unless an alarm points at it.
function constants(chart, data) {
  const values = [];
  for (const metric of chart.metrics) {
    const curves = data.curves.map((found) => found[metric]).filter(Boolean);
    if (data.meta.runs.some((run) => run.alarms.some((alarm) => alarm.metric === metric))) return null;
    const seen = new Set(curves.flatMap((curve) => curve.y.filter((value) => value !== null)));
    if (seen.size !== 1 || curves.every((curve) => curve.x.length < 3)) return null;
    values.push([metric, [...seen][0]]);
  }
  return values;
}
function constantLine(values) {
  return values.length > 0 && h('p', { class: 'muted constants' }, 'The same at every step: ', values.map(([metric, value], i) => [i ? ', ' : '', h('code', {}, metric), ' ' + format(value)]), '.');
}

// Plotly reads a little markup in names; a name of a run or metric must stay text.
function plain(text) { return text.replace(/&/g, '&amp;').replace(/</g, '&lt;'); }

function legendEntry(name, hue, dash) {
  const style = dash === 'solid' ? 'solid' : dash === 'dot' ? 'dotted' : 'dashed';
  return h('span', {}, h('i', { class: 'line', style: { borderTop: '3px ' + style + ' ' + hue } }), name);
}
function shortName(metric, chart) {
  if (chart.metrics.length === 1) return metric.split('/').pop();
  const parts = chart.metrics.map((name) => name.split('/'));
  let shared = 0;
  while (shared < parts[0].length - 1 && parts.every((part) => part[shared] === parts[0][shared])) shared++;
  return metric.split('/').slice(shared).join('/').replace(/_/g, ' ');
}
// Where an alarm held is shaded, as long as one run is drawn: of several, nobody could tell whose it was.
function alarmShapes(chart, runs) {
  const shapes = [];
  if (runs.length - state.hidden.size !== 1) return shapes;
  runs.forEach((run, r) => {
    if (state.hidden.has(r)) return;
    for (const alarm of run.alarms) {
      if (!chart.metrics.includes(alarm.metric)) continue;
      const half = Math.max(0.5, state.maxStep / 400);
      shapes.push({ type: 'rect', xref: 'x', yref: 'paper', x0: alarm.first_step - half, x1: alarm.last_step + half, y0: 0, y1: 1, layer: 'below', line: { width: 0 }, fillcolor: cssColor(alarm.severity), opacity: 0.1 });
    }
  });
  return shapes;
}

let sharing = false;
async function shareRange(change, source) {
  if (sharing) return;
  let range;
  if (change['xaxis.autorange']) range = null;
  else if (change['xaxis.range[0]'] !== undefined) range = [change['xaxis.range[0]'], change['xaxis.range[1]']];
  else return;
  sharing = true;
  state.range = range;
  document.getElementById('zoom-reset').hidden = !range;
  for (const card of cards) {
    if (card.box === source || !card.box.dataset.wired) continue;
    if (card.seen && card.drawn) await window.Plotly.relayout(card.box, range ? { 'xaxis.range': range } : { 'xaxis.autorange': true });
    else card.drawn = false;
  }
  sharing = false;
}
function resetRange() {
  state.range = null;
  document.getElementById('zoom-reset').hidden = true;
  redrawAll();
}

// ---- where the time goes -----------------------------------------------------------------------------------------------------

function timingCard(run, single) {
  const parts = Object.keys(run.timing.parts);
  const box = h('div', { class: 'plot' });
  const strip = h('div', { class: 'strip' });
  const legend = h('div', { class: 'legend' });
  const figure = h('figure', { class: 'card chart wide' }, h('figcaption', {},
    h('h4', {}, single ? 'Where a step\'s time goes' : run.name),
    h('p', { class: 'muted' }, 'Wall seconds of a step by part', run.timing.x.length < run.timing.last[run.timing.last.length - 1] ? ', means over neighbouring steps' : '', '; above, the shares of all steps but the first.')), strip, legend, box);
  lazyCard(box, (Plotly, plot) => {
    const hue = (index) => (parts[index] === 'rest' ? cssColor('rest') : color(index));
    strip.replaceChildren(...parts.map((part, i) => h('span', { style: { width: (run.timing.shares[part] * 100) + '%', background: hue(i) }, title: part + ' ' + percent(run.timing.shares[part]) })));
    legend.replaceChildren(...parts.map((part, i) => h('span', {}, h('i', { class: 'swatch', style: { background: hue(i) } }), part + ' ' + percent(run.timing.shares[part]))));
    const traces = parts.map((part, i) => ({ type: 'bar', x: run.timing.x, y: run.timing.parts[part], name: part, marker: { color: hue(i), line: { width: 0 } }, hovertemplate: '%{y:.3~g} s' }));
    plot.style.height = '220px';
    return Plotly.react(plot, traces, baseLayout({ barmode: 'stack', bargap: 0.08, xaxis: { tickformat: 'd' }, yaxis: { ticksuffix: ' s', exponentformat: 'none' } }), PLOT_CONFIG);
  });
  return figure;
}
