// The page: header, figures, alarms, sections in order, and the mark that says when it stood.

function tile(figure) {
  const show = { share: percent, duration, number: (value) => format(value, 3) }[figure.kind];
  const bounds = (pair) => pair && pair[0] !== null && h('span', { class: 'bounds' }, show(Math.max(pair[0], figure.kind === 'share' ? 0 : -Infinity)) + ' to ' + show(Math.min(pair[1], figure.kind === 'share' ? 1 : Infinity)));
  const both = figure.first !== undefined && figure.first !== null;
  const delta = both ? figure.last - figure.first : 0;
  return h('div', { class: 'tile' }, h('div', { class: 'muted' }, visible(figure.label)),
    h('div', { class: 'figure' }, both && h('span', { class: 'from' }, show(figure.first), ' → '), show(figure.last)),
    figure.bounds && h('div', { class: 'muted' }, '95 % interval ', bounds(figure.bounds[1])),
    both && figure.kind === 'share' && h('div', { class: 'delta' }, (delta >= 0 ? '▲ ' : '▼ ') + format(Math.abs(delta) * 100, 3) + ' points'),
    h('div', { class: 'muted note' }, figure.note || ''));
}

function overview(data) {
  const runs = data.meta.runs;
  return h('section', { id: 'overview' }, runs.map((run, r) => h('div', { class: 'run' },
    runs.length > 1 && h('h3', {}, h('i', { class: 'swatch run-' + r }), visible(run.name)),
    h('p', { class: 'chips' }, run.facts.map(([name, value]) => h('span', { class: 'chip-fact' }, h('span', { class: 'muted' }, name + ' '), visible(value)))),
    run.num_damaged > 0 && h('p', { class: 'muted' }, plural(run.num_damaged, 'line') + ' of metrics.jsonl could not be read and ' + (run.num_damaged === 1 ? 'was' : 'were') + ' left out.'),
    h('div', { class: 'tiles' }, run.figures.map(tile)))));
}

const ICONS = { critical: '!', warning: '!', notice: 'i' };
function alarmSection(data) {
  const runs = data.meta.runs;
  const all = runs.flatMap((run) => run.alarms.map((alarm) => ({ run, alarm })));
  const steps = (alarm) => (alarm.first_step === alarm.last_step ? 'step ' + format(alarm.first_step) : 'steps ' + format(alarm.first_step) + ' to ' + format(alarm.last_step));
  const item = ({ run, alarm }) => h('li', { class: 'alarm ' + alarm.severity }, h('span', { class: 'icon', 'aria-hidden': 'true' }, ICONS[alarm.severity]),
    h('div', {}, h('div', {}, h('b', {}, alarm.title), ' ', h('span', { class: 'tag ' + alarm.severity }, alarm.severity), runs.length > 1 && h('span', { class: 'tag' }, visible(run.name)), ' ', h('span', { class: 'muted' }, steps(alarm) + (alarm.num_steps > 1 ? ', ' + plural(alarm.num_steps, 'record') : ''))),
      h('div', {}, h('a', { href: '#', onclick: (event) => { event.preventDefault(); goToMetric(alarm.metric); } }, h('code', {}, alarm.metric)), ' ', alarm.value === null ? 'had no value' : ['reached ', h('b', {}, format(alarm.value))], h('span', { class: 'muted' }, ' (alarm: ' + alarm.threshold + ')')),
      h('div', { class: 'advice' }, alarm.advice)));
  const checks = h('details', {}, h('summary', {}, 'What was checked (' + data.meta.checks.length + ' rules)'), h('table', { class: 'plain' }, h('tr', {}, ['alarm', 'metric', 'threshold'].map((name) => h('th', {}, name))), data.meta.checks.map((check) => h('tr', {}, h('td', {}, check.title), h('td', {}, h('code', {}, check.metric)), h('td', {}, check.threshold)))));
  return h('section', { id: 'alarms' }, h('h2', {}, all.length ? plural(all.length, 'alarm') : 'No alarms'), all.length ? h('ul', { class: 'alarms' }, all.map(item)) : h('p', { class: 'calm' }, '✓ Nothing in the metrics asks for attention.'), checks);
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
    label.textContent = state.smoothing ? 'over ~' + plural(state.smoothing, 'step') : 'off';
    if (redraw) redrawAll();
  };
  slider.value = most >= 30 ? '3' : '0';
  apply(false);
  slider.addEventListener('input', () => apply(true));
  const legend = runs.length > 1 && h('div', { class: 'run-legend' }, runs.map((run, r) => h('label', {}, h('input', { type: 'checkbox', checked: true, onchange: (event) => { if (event.target.checked) state.hidden.delete(r); else state.hidden.add(r); redrawAll(); } }), h('i', { class: 'swatch run-' + r }), visible(run.name))));
  const reset = h('button', { type: 'button', id: 'zoom-reset', hidden: true, onclick: resetRange }, 'all steps');
  return [h('div', { class: 'bar' }, h('nav', {}, sections.map((section) => h('a', { href: '#' + section.id, onclick: (event) => { event.preventDefault(); section.scrollIntoView(); } }, section.dataset.short || (section.querySelector('h2') ? section.querySelector('h2').textContent : 'Overview')))),
    h('div', { class: 'tools' }, reset, h('label', { class: 'smooth' }, 'smoothing', slider, label), h('button', { type: 'button', onclick: toggleTheme, title: 'light or dark', 'aria-label': 'switch between light and dark' }, '◐'))), legend];
}

function paintRuns(runs) {
  runs.forEach((run, r) => document.querySelectorAll('.run-' + r).forEach((swatch) => { swatch.style.background = color(r); }));
}

async function start() {
  startTheme();
  const data = { meta: await unpackJSON('meta'), curves: await unpackJSON('curves') };
  const main = document.getElementById('main');
  const sections = [overview(data), alarmSection(data), ...chartSections(data), distributionSection(data), trajectorySection(data), configSection(data)].filter(Boolean);
  append(document.getElementById('top'), topBar(data, sections));
  append(main, [h('h1', {}, visible(data.meta.title)), sections]);
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
  window.addEventListener('beforeprint', () => { drawEverything(); });
  // Two frames: the first charts in view have been drawn and painted.
  requestAnimationFrame(() => requestAnimationFrame(() => {
    root.dataset.ready = String(Math.round(performance.now()));
    root.dataset.resources = String(performance.getEntriesByType('resource').length);
  }));
}
start();
