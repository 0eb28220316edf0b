// Distributions over the trajectories of the page: all of them as dots, and early against late as histograms.

const SHARES = [['0.1', 'first and last 10 %'], ['0.2', 'first and last 20 %'], ['0.33', 'first and last third'], ['0.5', 'first and last half']];

function distributionSection(data) {
  const runs = data.meta.runs;
  const withRollouts = runs.map((run, r) => r).filter((r) => runs[r].trajectories.shown > 0);
  if (!withRollouts.length) return null;
  const choice = { run: withRollouts[0], source: 'train', share: 0.2, y: 'length' };
  const sources = [...new Set(withRollouts.flatMap((r) => runs[r].trajectories.source_names))].sort((a, b) => (a === 'train' ? -1 : b === 'train' ? 1 : a < b ? -1 : 1));
  choice.source = sources[0];
  const own = [];
  const changed = () => own.forEach((card) => { if (card.seen) drawCard(card, true); else card.drawn = false; });
  const controls = h('div', { class: 'controls' },
    withRollouts.length > 1 && picker('run', withRollouts.map((r) => [String(r), runs[r].name]), String(choice.run), (value) => { choice.run = Number(value); changed(); }),
    sources.length > 1 && picker('source', sources.map((name) => [name, name]), choice.source, (value) => { choice.source = value; changed(); }),
    picker('compare', SHARES, String(choice.share), (value) => { choice.share = Number(value); changed(); }));

  const make = (title, note, wide, draw) => {
    const box = h('div', { class: 'plot' });
    const legend = h('div', { class: 'legend' });
    const figure = h('figure', { class: 'card chart' + (wide ? ' wide' : '') }, h('figcaption', {}, h('h4', {}, title), h('p', { class: 'muted' }, note)), legend, box);
    own.push(lazyCard(box, (Plotly, plot) => draw(Plotly, plot, legend, rowsOf(runs[choice.run].trajectories, choice.source))));
    return figure;
  };
  const figures = [
    make('Every response', 'A dot is one response: its step and its length, coloured by reward. Click it to read it.', true, (Plotly, plot, legend, rows) => drawDots(Plotly, plot, legend, rows, choice, runs)),
    make('Reward', 'Share of responses, early against late.', false, (Plotly, plot, legend, rows) => drawHistogram(Plotly, plot, legend, rows, choice, (row) => row.reward)),
    make('Response length', 'Tokens, early against late.', false, (Plotly, plot, legend, rows) => drawHistogram(Plotly, plot, legend, rows, choice, (row) => row.length)),
    make('Mean reward of a group', 'Samples of one prompt in one step. The ends teach nothing, the middle does.', false, (Plotly, plot, legend, rows) => drawHistogram(Plotly, plot, legend, groupMeans(rows), choice, (row) => row.reward)),
  ];
  return h('section', { id: 'distributions' }, h('h2', {}, 'Distributions'), h('p', { class: 'muted' }, sampleNote(runs, withRollouts)), controls, h('div', { class: 'grid' }, figures));
}

function sampleNote(runs, which) {
  return which.map((r) => {
    const part = runs[r].trajectories;
    const name = runs.length > 1 ? runs[r].name + ': ' : '';
    const damaged = part.damaged ? ' ' + plural(part.damaged, 'line') + ' could not be read.' : '';
    if (part.shown >= part.total) return name + (part.total === 1 ? 'The one trajectory' : 'All ' + count(part.total) + ' trajectories') + ' of rollouts.jsonl.' + damaged;
    return name + count(part.shown) + ' of the ' + count(part.total) + ' trajectories of rollouts.jsonl, spread evenly, samples of one prompt together.' + damaged;
  }).join(' ');
}

function rowsOf(part, source) {
  const wanted = part.source_names.indexOf(source);
  const rows = [];
  for (let i = 0; i < part.shown; i++) {
    if (part.source[i] === wanted) rows.push({ i, step: part.step[i], reward: part.reward[i], length: part.length[i], group: part.group[i] });
  }
  return rows;
}
function groupMeans(rows) {
  const groups = new Map();
  for (const row of rows) {
    if (row.reward === null) continue;
    const group = groups.get(row.group) || { step: row.step, sum: 0, n: 0 };
    group.sum += row.reward;
    group.n += 1;
    groups.set(row.group, group);
  }
  return [...groups.values()].filter((group) => group.n > 1).map((group) => ({ step: group.step, reward: group.sum / group.n }));
}

function rewardScale(values) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(...known), high = Math.max(...known);
  return known.length ? [Math.min(low, 0), Math.max(high, low + 1e-9, 0.001)] : [0, 1];
}

function drawDots(Plotly, plot, legend, rows, choice, runs) {
  const [low, high] = rewardScale(rows.map((row) => row.reward));
  const scale = [[0, cssColor('bad')], [0.5, cssColor('middle')], [1, cssColor('good')]];
  legend.replaceChildren(h('span', {}, 'reward ' + format(low, 3), h('i', { class: 'ramp', style: { background: 'linear-gradient(90deg,' + scale.map((stop) => stop[1]).join(',') + ')' } }), format(high, 3)));
  const known = rows.filter((row) => row.length !== null);
  const trace = {
    type: 'scatter', mode: 'markers', x: known.map((row) => row.step), y: known.map((row) => row.length), customdata: known.map((row) => [row.i, row.reward === null ? 'none' : format(row.reward)]),
    marker: { size: known.length > 1500 ? 4 : 6, opacity: 0.75, color: known.map((row) => row.reward ?? low), cmin: low, cmax: high, colorscale: scale, line: { width: 0 } },
    hovertemplate: 'step %{x} · %{y} tokens · reward %{customdata[1]}<extra></extra>',
  };
  plot.style.height = '260px';
  return Plotly.react(plot, known.length ? [trace] : [], baseLayout({ hovermode: 'closest', xaxis: { tickformat: 'd' }, yaxis: { rangemode: 'tozero' }, annotations: known.length ? [] : [nothing()] }), PLOT_CONFIG).then(() => {
    if (plot.dataset.wired) return;
    plot.dataset.wired = '1';
    plot.on('plotly_click', (event) => openTrajectory(choice.run, event.points[0].customdata[0], true));
  });
}
function nothing() { return { text: 'nothing to show', showarrow: false, xref: 'paper', yref: 'paper', x: 0.5, y: 0.5 }; }

function drawHistogram(Plotly, plot, legend, rows, choice, valueOf) {
  const steps = rows.map((row) => row.step);
  let first = Infinity, last = -Infinity;
  for (const step of steps) { first = Math.min(first, step); last = Math.max(last, step); }
  const span = (last - first) * choice.share;
  const values = (test) => rows.filter(test).map(valueOf).filter((value) => value !== null && value !== undefined);
  const early = values((row) => row.step <= first + span), late = values((row) => row.step >= last - span && row.step > first + span * (choice.share === 0.5 ? 1 : 0));
  const all = early.concat(late);
  let low = Infinity, high = -Infinity;
  for (const value of all) { low = Math.min(low, value); high = Math.max(high, value); }
  const distinct = new Set(all).size;
  const hues = [cssColor('early'), cssColor('late')];
  const labels = ['steps ' + first + '–' + Math.round(first + span), 'steps ' + Math.round(last - span) + '–' + last];
  fill(legend, all.length > 0 && labels.map((label, i) => h('span', {}, h('i', { class: 'swatch', style: { background: faded(hues[i], 0.6), outline: '1px solid ' + hues[i] } }), (i ? 'late, ' : 'early, ') + label + ' (' + count([early, late][i].length) + ')')));
  plot.style.height = '210px';
  if (all.length && distinct <= 10) return drawFew(Plotly, plot, [early, late], hues, labels);
  const bins = Math.min(30, Math.max(distinct, 1));
  const size = distinct > 1 ? (high - low) / Math.max(1, bins - 1) : 1;
  const xbins = { start: low - size / 2, end: high + size / 2 * 1.001, size };
  const traces = [early, late].map((x, i) => ({ type: 'histogram', x, xbins, histnorm: 'probability', name: labels[i], marker: { color: faded(hues[i], 0.6), line: { color: hues[i], width: 1 } }, hovertemplate: '%{y:.1%}' }));
  return Plotly.react(plot, all.length ? traces : [], baseLayout({ barmode: 'overlay', bargap: 0.06, yaxis: { tickformat: '~%' }, annotations: all.length ? [] : [nothing()] }), PLOT_CONFIG);
}

// A handful of values (rewards are often 0 or 1): a pair of bars each.
function drawFew(Plotly, plot, samples, hues, labels) {
  const values = [...new Set(samples.flat())].sort((a, b) => a - b);
  const traces = samples.map((sample, i) => ({
    type: 'bar', x: values.map((value) => format(value)), y: values.map((value) => (sample.length ? sample.filter((other) => other === value).length / sample.length : 0)), name: labels[i],
    marker: { color: faded(hues[i], 0.6), line: { color: hues[i], width: 1 } }, hovertemplate: '%{y:.1%}',
  }));
  return Plotly.react(plot, traces, baseLayout({ barmode: 'group', bargap: 0.35, xaxis: { type: 'category' }, yaxis: { tickformat: '~%' } }), PLOT_CONFIG);
}

function picker(label, options, value, changed) {
  const select = h('select', { onchange: () => changed(select.value) }, options.map(([key, name]) => h('option', { value: key }, name)));
  select.value = value;
  return h('label', {}, label, select);
}
