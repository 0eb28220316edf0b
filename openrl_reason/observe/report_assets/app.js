// The page: header, figures, alarms, sections in order, and the mark that says when it stood.

const SHOW = { share: percent, duration, number: (value) => format(value, 3) };
// A metric's course in a few strokes.
function sparkline(curve) {
  if (!curve) return null;
  const x = curve.mx || curve.x, y = curve.my || curve.y, n = y.length;
  const step = Math.max(1, Math.floor(n / 120)), points = [];
  for (let i = 0; i < n; i += step) {
    let sum = 0, k = 0;
    for (let j = i; j < Math.min(n, i + step); j++) if (y[j] !== null) { sum += y[j]; k++; }
    if (k) points.push([x[i], sum / k]);
  }
  if (points.length < 3) return null;
  const low = Math.min(...points.map((point) => point[1])), high = Math.max(...points.map((point) => point[1]));
  if (low === high) return null;
  const first = points[0][0], last = points[points.length - 1][0];
  const path = points.map(([at, value], i) => (i ? 'L' : 'M') + ((at - first) / (last - first) * 100).toFixed(2) + ',' + (30 - (value - low) / (high - low) * 28).toFixed(2)).join('');
  return h('svg:svg', { class: 'spark', viewBox: '0 0 100 32', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, h('svg:path', { d: path, 'vector-effect': 'non-scaling-stroke' }));
}

function tile(figure, curve) {
  const show = SHOW[figure.kind];
  const bounds = (pair) => pair && pair[0] !== null && h('span', { class: 'bounds' }, show(Math.max(pair[0], figure.kind === 'share' ? 0 : -Infinity)) + ' to ' + show(Math.min(pair[1], figure.kind === 'share' ? 1 : Infinity)) + ' (95 %)');
  const both = figure.first !== undefined && figure.first !== null;
  const delta = both ? figure.last - figure.first : 0;
  return h('div', { class: 'tile' }, h('div', { class: 'muted' }, visible(figure.label)),
    h('div', { class: 'figure' }, both && h('span', { class: 'from' }, show(figure.first), ' → '), show(figure.last)),
    figure.bounds && h('div', { class: 'muted' }, bounds(figure.bounds[1])),
    both && figure.kind === 'share' && h('div', { class: 'delta' }, (delta >= 0 ? '▲ ' : '▼ ') + format(Math.abs(delta) * 100, 3) + ' points'),
    h('div', { class: 'muted note' }, figure.note || ''),
    sparkline(curve));
}

function factChips(run) {
  return [h('p', { class: 'chips' }, run.facts.map(([name, value]) => h('span', { class: 'chip-fact' }, h('span', { class: 'muted' }, name + ' '), visible(value)))),
    run.num_damaged > 0 && h('p', { class: 'muted' }, plural(run.num_damaged, 'line') + ' of metrics.jsonl could not be read and ' + (run.num_damaged === 1 ? 'was' : 'were') + ' left out.')];
}
function overview(data) {
  const runs = data.meta.runs;
  if (runs.length === 1) return h('section', { id: 'overview' }, h('h1', {}, visible(data.meta.title)), factChips(runs[0]), h('div', { class: 'tiles' }, runs[0].figures.map((figure) => tile(figure, data.curves[0][figure.metric]))));
  const labels = [...new Set(runs.flatMap((run) => run.figures.map((figure) => figure.label)))];
  const cell = (run, label) => {
    const figure = run.figures.find((candidate) => candidate.label === label);
    if (!figure) return h('td', {}, '–');
    const show = SHOW[figure.kind];
    return h('td', { title: figure.note }, figure.first !== undefined && figure.first !== null && h('span', { class: 'muted' }, show(figure.first) + ' → '), h('b', {}, show(figure.last)), figure.bounds && h('span', { class: 'muted' }, ' (' + show(figure.bounds[1][0]) + ' to ' + show(figure.bounds[1][1]) + ')'));
  };
  return h('section', { id: 'overview' }, h('h1', {}, visible(data.meta.title)), runs.map((run, r) => h('div', { class: 'run-line' }, h('h3', {}, h('i', { class: 'swatch run-' + r }), visible(run.name)), factChips(run))),
    h('div', { class: 'scroll' }, h('table', { class: 'plain compare' }, h('tr', {}, h('th', {}, 'from the start to the end'), runs.map((run, r) => h('th', {}, h('i', { class: 'swatch run-' + r }), visible(run.name)))), labels.map((label) => h('tr', {}, h('td', {}, visible(label)), runs.map((run) => cell(run, label)))))),
    h('p', { class: 'muted' }, 'Evaluations: first and last, with the 95 % interval of the last. Others: means over the first and last steps.'));
}

const SHOWN_ALARMS = 4;
const ICONS = { critical: '!', warning: '!', notice: 'i' };
function alarmSection(data) {
  const runs = data.meta.runs;
  // Several runs with the same trouble share an entry.
  const found = new Map();
  for (const run of runs) {
    for (const alarm of run.alarms) {
      const key = alarm.key + ' ' + alarm.metric;
      if (!found.has(key)) found.set(key, []);
      found.get(key).push({ run, alarm });
    }
  }
  const all = [...found.values()];
  const grave = ['critical', 'warning', 'notice'];
  all.sort((a, b) => grave.indexOf(a[0].alarm.severity) - grave.indexOf(b[0].alarm.severity) || a[0].alarm.first_step - b[0].alarm.first_step);
  const steps = (alarm) => (alarm.first_step === alarm.last_step ? 'step ' + format(alarm.first_step) : 'steps ' + format(alarm.first_step) + ' to ' + format(alarm.last_step)) + (alarm.num_steps > 1 ? ', ' + plural(alarm.num_steps, 'record') : '');
  const worst = (alarm) => (alarm.value === null ? 'had no value' : ['reached ', h('b', {}, format(alarm.value))]);
  const item = (entries) => {
    const { alarm } = entries[0];
    const link = h('a', { href: '#', onclick: (event) => { event.preventDefault(); goToMetric(alarm.metric); } }, h('code', {}, alarm.metric));
    return h('li', { class: 'alarm ' + alarm.severity }, h('span', { class: 'icon', 'aria-hidden': 'true' }, ICONS[alarm.severity]),
      h('div', {}, h('div', {}, h('b', {}, alarm.title), ' ', h('span', { class: 'tag ' + alarm.severity }, alarm.severity), runs.length === 1 && [' ', h('span', { class: 'muted' }, steps(alarm))]),
        runs.length === 1 ? h('div', {}, link, ' ', worst(alarm), h('span', { class: 'muted' }, ' (alarm: ' + alarm.threshold + ')'))
          : [h('div', {}, link, h('span', { class: 'muted' }, ' (alarm: ' + alarm.threshold + ')')), entries.map((entry) => h('div', {}, h('i', { class: 'swatch run-' + runs.indexOf(entry.run) }), visible(entry.run.name) + ' ', worst(entry.alarm), h('span', { class: 'muted' }, ', ' + steps(entry.alarm))))],
        h('div', { class: 'advice' }, alarm.advice)));
  };
  const checks = h('details', {}, h('summary', {}, 'What was checked (' + data.meta.checks.length + ' rules)'), h('table', { class: 'plain' }, h('tr', {}, ['alarm', 'metric', 'threshold'].map((name) => h('th', {}, name))), data.meta.checks.map((check) => h('tr', {}, h('td', {}, check.title), h('td', {}, h('code', {}, check.metric)), h('td', {}, check.threshold)))));
  return h('section', { id: 'alarms' }, h('h2', {}, all.length ? plural(all.length, 'alarm') : 'No alarms'), all.length ? [h('ul', { class: 'alarms' }, all.slice(0, SHOWN_ALARMS).map(item)), all.length > SHOWN_ALARMS && h('details', {}, h('summary', {}, plural(all.length - SHOWN_ALARMS, 'more alarm')), h('ul', { class: 'alarms' }, all.slice(SHOWN_ALARMS).map(item)))] : h('p', { class: 'calm' }, '✓ Nothing in the metrics asks for attention.'), checks);
}
function goToMetric(metric) {
  const figure = [...document.querySelectorAll('figure[data-metrics]')].find((candidate) => candidate.dataset.metrics.split(' ').includes(metric));
  if (!figure) return;
  const closed = figure.closest('details');
  if (closed) closed.open = true;
  figure.scrollIntoView({ block: 'center' });
  figure.classList.remove('flash');
  requestAnimationFrame(() => figure.classList.add('flash'));
}

function chartSections(data) {
  return data.meta.groups.map((group) => {
    const still = [];
    const moving = group.charts.filter((chart) => { const values = constants(chart, data); if (values) still.push(...values); return !values; });
    const grid = [h('div', { class: 'grid' }, moving.map((chart) => metricCard(chart, data))), constantLine(still)];
    const body = group.collapsed ? h('details', {}, h('summary', {}, plural(group.charts.length, 'more metric')), grid) : grid;
    const timing = group.id === 'time' ? h('div', { class: 'grid' }, data.meta.runs.filter((run) => run.timing.x).map((run) => timingCard(run, data.meta.runs.length === 1))) : null;
    return h('section', { id: group.id, class: 'charts' }, h('h2', {}, group.title), timing, body);
  });
}

function configSection(data) {
  const runs = data.meta.runs;
  if (!runs.some((run) => run.config.length)) return null;
  const tables = runs.map((run) => new Map(run.config));
  const names = [...new Set(runs.flatMap((run) => run.config.map(([name]) => name)))];
  const differ = (name) => new Set(tables.map((table) => table.get(name))).size > 1;
  const rows = names.map((name) => h('tr', { class: runs.length > 1 && differ(name) ? 'differs' : '' }, h('td', {}, h('code', {}, visible(name))), tables.map((table) => h('td', {}, visible(table.has(name) ? table.get(name) : '–')))));
  const head = h('tr', {}, h('th', {}, 'setting'), runs.map((run) => h('th', {}, runs.length > 1 ? visible(run.name) : 'value')));
  const differing = runs.length > 1 && names.filter(differ).length;
  return h('section', { id: 'config' }, h('h2', {}, 'Settings'), h('details', {}, h('summary', {}, plural(names.length, 'setting') + (runs.length > 1 ? ', ' + differing + ' of them differ' : '')), h('div', { class: 'scroll' }, h('table', { class: 'plain config' }, head, rows))));
}

function topBar(data, sections) {
  const runs = data.meta.runs;
  const most = Math.max(1, ...runs.flatMap((run, r) => Object.values(data.curves[r]).map((curve) => curve.x[curve.x.length - 1] || 0)));
  state.maxStep = most;
  const windows = [0, ...[0.005, 0.01, 0.02, 0.04, 0.08, 0.15].map((share) => Math.max(1, Math.round(most * share)))];
  const slider = h('input', { type: 'range', min: '0', max: String(windows.length - 1), step: '1', id: 'smoothing', 'aria-label': 'smoothing' });
  const label = h('output', { for: 'smoothing' });
  const apply = (redraw) => {
    state.smoothing = windows[Number(slider.value)];
    label.textContent = state.smoothing ? '~' + plural(state.smoothing, 'step') : 'off';
    if (redraw) redrawAll();
  };
  slider.value = most >= 30 ? '3' : '0';
  apply(false);
  slider.addEventListener('input', () => apply(true));
  const legend = runs.length > 1 && h('div', { class: 'run-legend' }, runs.map((run, r) => h('label', {}, h('input', { type: 'checkbox', checked: true, onchange: (event) => { if (event.target.checked) state.hidden.delete(r); else state.hidden.add(r); redrawAll(); } }), h('i', { class: 'swatch run-' + r }), visible(run.name))));
  const reset = h('button', { type: 'button', id: 'zoom-reset', hidden: true, onclick: resetRange }, 'all steps');
  return [h('div', { class: 'bar' }, h('nav', {}, sections.map((section) => h('a', { href: '#' + section.id, onclick: (event) => { event.preventDefault(); section.scrollIntoView(); } }, section.querySelector('h2') ? section.querySelector('h2').textContent : 'Overview'))),
    h('div', { class: 'tools' }, reset, h('label', { class: 'smooth' }, 'smoothing', slider, label), h('button', { type: 'button', onclick: toggleTheme, title: 'light or dark', 'aria-label': 'switch between light and dark' }, '◐'))), legend];
}

function paintRuns(runs) {
  runs.forEach((run, r) => document.querySelectorAll('.run-' + r).forEach((swatch) => { swatch.style.background = color(r); }));
}

// On paper everything is drawn, dark on white and as wide as paper is.
function printing() {
  let before = null;
  window.addEventListener('beforeprint', () => {
    before = root.dataset.theme;
    root.dataset.theme = 'light';
    state.printing = true;
    document.body.classList.add('printing');
    paintRuns(reader.data ? reader.data.meta.runs : []);
    drawEverything(true);
  });
  window.addEventListener('afterprint', () => {
    state.printing = false;
    document.body.classList.remove('printing');
    applyTheme(before);
  });
}

async function start() {
  startTheme();
  const data = { meta: await unpackJSON('meta'), curves: await unpackJSON('curves') };
  const main = document.getElementById('main');
  const sections = [overview(data), alarmSection(data), ...chartSections(data), distributionSection(data), trajectorySection(data), configSection(data)].filter(Boolean);
  append(document.getElementById('top'), topBar(data, sections));
  append(main, sections);
  const bar = document.getElementById('top');
  new ResizeObserver(() => { root.style.scrollPaddingTop = (bar.offsetHeight + 8) + 'px'; }).observe(bar);
  append(document.getElementById('foot'), ['openrl_reason ' + data.meta.version + ', written ' + data.meta.written + '. Drag in a chart to zoom into steps; all charts follow; double-click to go back.']);
  themeListeners.push(() => { paintRuns(data.meta.runs); redrawAll(); });
  paintRuns(data.meta.runs);
  if (reader.form) {
    const wanted = /^(\d+):(\d+)$/.exec(address.get('t') || '');
    if (wanted && data.meta.runs[wanted[1]] && Number(wanted[2]) < data.meta.runs[wanted[1]].trajectories.shown) await openTrajectory(Number(wanted[1]), Number(wanted[2]), true);
    else await refilter();
  }
  await loadPlotly();
  if (address.has('draw')) await drawEverything();
  if (address.get('at')) { const target = document.getElementById(address.get('at')); if (target) target.scrollIntoView(); }
  printing();
  // The page stands when the charts in view are drawn and painted.
  const frame = () => new Promise((done) => { requestAnimationFrame(done); setTimeout(done, 250); }); // a page in the background gets no frames
  await frame();
  for (const card of cards) if (card.seen) await drawCard(card);
  await frame();
  await frame();
  root.dataset.ready = String(Math.round(performance.now()));
  root.dataset.resources = String(performance.getEntriesByType('resource').length);
}
start();
