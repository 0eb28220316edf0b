// Trajectories to read: a filtered, sorted list, and one response with its tokens coloured. Chunks are unpacked when they are needed.

const CHANNELS = { advantage: 'advantage', value: 'value', logprob_ratio: 'log-prob ratio (trainer − engine)', logprob: 'log-prob (engine)' };
const PAGE = 60;
const LONG = 1500; // tokens of a response that are shown at first
const reader = { run: 0, at: -1, order: [], shown: 0, colour: recall('colour') || 'advantage', own: false, chunks: new Map(), haystack: new Map(), filterTicket: 0, showTicket: 0 };

async function chunkOf(run, index) {
  const part = reader.data.meta.runs[run].trajectories;
  const number = Math.floor(index / part.chunk);
  const key = run + '-' + number;
  if (!reader.chunks.has(key)) {
    reader.chunks.set(key, Promise.all([unpackJSON('texts-' + key), unpack('numbers-' + key)]).then(([chunk, numbers]) => attachNumbers(chunk, numbers)));
    if (reader.chunks.size > 12) reader.chunks.delete(reader.chunks.keys().next().value); // a page left open should not grow
  }
  return reader.chunks.get(key);
}

function attachNumbers(chunk, buffer) {
  const bytes = new Uint8Array(buffer);
  const columns = {};
  for (const [name, table] of Object.entries(chunk.numbers)) columns[name] = fromPlanes(bytes, table);
  const used = {};
  for (const entry of chunk.entries) {
    entry.data = {};
    const n = entry.tokens ? entry.tokens.length : 0;
    for (const [name, value] of Object.entries(entry.constant || {})) entry.data[name] = new Float32Array(n).fill(value === null ? NaN : value);
    for (const name of entry.channels || []) {
      const from = used[name] || 0;
      entry.data[name] = columns[name].subarray(from, from + n);
      used[name] = from + n;
    }
    if (entry.tokens && entry.response === undefined) entry.response = entry.tokens.join('');
  }
  return chunk.entries;
}
function fromPlanes(bytes, { width, offset, count: n }) {
  const plain = new Uint8Array(n * width);
  for (let b = 0; b < width; b++) for (let i = 0; i < n; i++) plain[i * width + b] = bytes[offset + b * n + i];
  if (width === 4) return new Float32Array(plain.buffer);
  const out = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    const bits = plain[2 * i] | (plain[2 * i + 1] << 8);
    const exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    out[i] = bits & 0x8000 ? -size : size;
  }
  return out;
}

// ---- the section -------------------------------------------------------------------------------------------------------------

function trajectorySection(data) {
  reader.data = data;
  const runs = data.meta.runs;
  const which = runs.map((run, r) => r).filter((r) => runs[r].trajectories.shown > 0);
  if (!which.length) return null;
  reader.run = which[0];
  reader.list = h('div', { class: 'list', role: 'listbox', 'aria-label': 'trajectories', tabindex: '0' });
  reader.detail = h('article', { class: 'detail card', id: 'detail', 'aria-live': 'polite' });
  reader.countLine = h('p', { class: 'muted count', role: 'status' });
  reader.list.addEventListener('scroll', () => { if (reader.list.scrollTop + reader.list.clientHeight > reader.list.scrollHeight - 400) moreRows(); });
  reader.form = filterForm(runs, which);
  document.addEventListener('keydown', onKey);
  return h('section', { id: 'trajectories' }, h('h2', {}, 'Trajectories'),
    h('p', { class: 'muted' }, sampleNote(runs, which), ' ', h('span', { class: 'keys' }, 'Keys: ', kbd('j'), ' ', kbd('k'), ' next and previous, ', kbd('['), ' ', kbd(']'), ' siblings, ', kbd('c'), ' colours, ', kbd('/'), ' search.')),
    h('details', { open: window.innerWidth > 860, class: 'filter-box' }, h('summary', {}, 'Filter and sort'), reader.form.element), h('div', { class: 'reader' }, h('div', { class: 'side' }, reader.countLine, reader.list), reader.detail));
}
function kbd(key) { return h('kbd', {}, key); }

function filterForm(runs, which) {
  const inputs = {};
  const changed = () => { clearTimeout(reader.timer); reader.timer = setTimeout(refilter, 120); };
  const field = (name, label, element) => { inputs[name] = element; element.addEventListener('input', changed); return h('label', {}, label, element); };
  const range = (name, label) => h('label', {}, label, h('span', { class: 'range' }, (inputs[name + 'Min'] = h('input', { type: 'number', step: 'any', placeholder: 'from', 'aria-label': label + ' from', oninput: changed })), (inputs[name + 'Max'] = h('input', { type: 'number', step: 'any', placeholder: 'to', 'aria-label': label + ' to', oninput: changed }))));
  const select = (options) => h('select', {}, options.map(([key, name]) => h('option', { value: key }, name)));
  const names = (key) => [['', 'any'], ...[...new Set(which.flatMap((r) => runs[r].trajectories[key + '_names']))].filter(Boolean).map((name) => [name, name])];
  const element = h('form', { class: 'controls filters', onsubmit: (event) => event.preventDefault() },
    which.length > 1 && field('run', 'run', select(which.map((r) => [String(r), runs[r].name]))),
    field('search', 'search', h('input', { type: 'search', placeholder: 'prompt or response', spellcheck: 'false' })),
    range('reward', 'reward'), range('length', 'tokens'), range('step', 'step'),
    names('source').length > 2 && field('source', 'source', select(names('source'))),
    names('status').length > 2 && field('status', 'status', select(names('status'))),
    names('stop_reason').length > 2 && field('stop', 'stopped by', select(names('stop_reason'))),
    field('sort', 'order', select([['step', 'step, prompts together'], ['-step', 'latest step first'], ['reward', 'lowest reward first'], ['-reward', 'highest reward first'], ['length', 'shortest first'], ['-length', 'longest first']])),
    h('button', { type: 'button', onclick: () => { element.reset(); refilter(); } }, 'clear'));
  return { element, inputs };
}

// Search texts of a run, unpacked once at the first search.
async function haystackOf(run) {
  if (!reader.haystack.has(run)) {
    const part = reader.data.meta.runs[run].trajectories;
    const texts = [];
    for (let number = 0; number * part.chunk < part.shown; number++) {
      const chunk = await unpackJSON('texts-' + run + '-' + number);
      for (const entry of chunk.entries) texts.push(((entry.prompt || '') + '\n' + (entry.response === undefined ? (entry.tokens || []).join('') : entry.response) + '\n' + (entry.task_id || '')).toLowerCase());
    }
    reader.haystack.set(run, texts);
  }
  return reader.haystack.get(run);
}

async function refilter(keep) {
  const ticket = ++reader.filterTicket;
  const value = (name) => (reader.form.inputs[name] ? reader.form.inputs[name].value : '');
  const bound = (name, fallback) => (value(name) === '' ? fallback : Number(value(name)));
  if (value('run') !== '' && reader.form.inputs.run) reader.run = Number(value('run'));
  const part = reader.data.meta.runs[reader.run].trajectories;
  const needle = value('search').toLowerCase();
  const texts = needle ? await haystackOf(reader.run) : null;
  if (ticket !== reader.filterTicket) return;
  const inside = (number, name) => (value(name + 'Min') === '' && value(name + 'Max') === '') || (number !== null && number >= bound(name + 'Min', -Infinity) && number <= bound(name + 'Max', Infinity));
  const order = [];
  for (let i = 0; i < part.shown; i++) {
    if (!inside(part.reward[i], 'reward') || !inside(part.length[i], 'length') || !inside(part.step[i], 'step')) continue;
    if (value('source') && part.source_names[part.source[i]] !== value('source')) continue;
    if (value('status') && part.status_names[part.status[i]] !== value('status')) continue;
    if (value('stop') && part.stop_reason_names[part.stop_reason[i]] !== value('stop')) continue;
    if (texts && !texts[i].includes(needle)) continue;
    order.push(i);
  }
  const sort = value('sort') || 'step';
  const key = { step: part.step, reward: part.reward, length: part.length }[sort.replace('-', '')];
  const sign = sort.startsWith('-') ? -1 : 1;
  const rank = (i) => (key[i] === null ? Infinity : sign * key[i]); // what has no value comes last
  order.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b)) || part.group[a] - part.group[b] || a - b);
  reader.order = order;
  reader.grouped = sort.endsWith('step');
  reader.shown = 0;
  reader.lastGroup = -1;
  reader.lastHeader = '';
  reader.list.replaceChildren();
  reader.countLine.textContent = order.length === part.shown ? plural(order.length, 'response') : count(order.length) + ' of ' + plural(part.shown, 'response');
  moreRows();
  if (!order.length) reader.list.append(h('p', { class: 'muted empty' }, 'Nothing fits these filters.'));
  if (keep === undefined || !order.includes(keep)) { if (order.length) showTrajectory(order[0], false); else reader.detail.replaceChildren(); }
}

function moreRows() {
  const part = reader.data.meta.runs[reader.run].trajectories;
  const end = Math.min(reader.shown + PAGE, reader.order.length);
  for (; reader.shown < end; reader.shown++) {
    const i = reader.order[reader.shown];
    if (reader.grouped) groupHeader(part, i);
    reader.list.append(row(part, i));
  }
}
// A line above the samples of one prompt; prompts with one sample each share the line of their step.
function groupHeader(part, i) {
  const rewards = [];
  for (let at = reader.shown; at < reader.order.length && part.group[reader.order[at]] === part.group[i]; at++) rewards.push(part.reward[reader.order[at]]);
  const alone = rewards.length === 1 && part.group[i] !== reader.lastGroup;
  const key = alone ? part.step[i] + ' ' + part.source[i] : String(part.group[i]);
  const repeated = key === reader.lastHeader || part.group[i] === reader.lastGroup;
  reader.lastGroup = part.group[i];
  if (repeated) return;
  reader.lastHeader = key;
  const known = rewards.filter((value) => value !== null);
  const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  reader.list.append(h('div', { class: 'group' }, h('b', {}, 'step ' + part.step[i]), part.source_names[part.source[i]] !== 'train' && h('span', { class: 'tag' }, visible(part.source_names[part.source[i]])),
    !alone && [h('span', { class: 'muted name' }, visible(part.task_ids[part.group[i]].slice(0, 16))), h('span', { class: 'muted right' }, rewards.length + ' × mean ' + format(mean, 3))]));
}
function row(part, i) { // a button: the list works with a keyboard alone
  const status = part.status_names[part.status[i]], stop = part.stop_reason_names[part.stop_reason[i]];
  return h('button', { type: 'button', class: 'row', role: 'option', 'data-i': i, 'aria-selected': String(i === reader.at), onclick: () => { showTrajectory(i); if (window.innerWidth <= 860) reader.detail.scrollIntoView(); } },
    rewardPill(part.reward[i]), h('span', { class: 'preview', dir: 'auto' }, visible(part.preview[i]) || '(nothing but space)'),
    h('span', { class: 'meta' }, !reader.grouped && 'step ' + part.step[i] + ' · ', part.length[i] === null ? '' : count(part.length[i]) + ' tok', stop === 'length' && ' · cut', status && status !== 'ok' && h('span', { class: 'tag warn' }, visible(status))));
}
function rewardPill(value) {
  if (value === null) return h('span', { class: 'pill none', title: 'no reward' }, '–');
  const [low, high] = reader.rewardRange || (reader.rewardRange = rewardScale(reader.data.meta.runs.flatMap((run) => run.trajectories.reward)));
  const place = high > low ? (value - low) / (high - low) : 0.5;
  return h('span', { class: 'pill', style: { background: mix(place) } }, format(value, 3));
}
// Colours by name, so that a change of theme needs no redrawing.
function mix(place) {
  const [from, to, share] = place < 0.5 ? ['bad', 'middle', place * 2] : ['middle', 'good', place * 2 - 1];
  return 'color-mix(in srgb, var(--pill-' + from + '), var(--pill-' + to + ') ' + Math.round(share * 100) + '%)';
}

// ---- one trajectory ----------------------------------------------------------------------------------------------------------

async function openTrajectory(run, index, scroll) {
  if (run !== reader.run && reader.form.inputs.run) reader.form.inputs.run.value = String(run);
  reader.run = run;
  if (!reader.order.includes(index) || reader.form.inputs.run) { reader.form.element.reset(); if (reader.form.inputs.run) reader.form.inputs.run.value = String(run); await refilter(index); }
  await showTrajectory(index);
  if (scroll) document.getElementById('trajectories').scrollIntoView();
}

async function showTrajectory(index, focus = true) {
  const run = reader.run, ticket = ++reader.showTicket;
  const part = reader.data.meta.runs[run].trajectories;
  reader.at = index;
  const entries = await chunkOf(run, index);
  if (ticket !== reader.showTicket) return;
  const place = reader.order.indexOf(index);
  while (place >= reader.shown && reader.shown < reader.order.length) moreRows();
  for (const element of reader.list.querySelectorAll('.row')) {
    const selected = Number(element.dataset.i) === index;
    element.setAttribute('aria-selected', String(selected));
    if (selected && focus) nearest(element);
  }
  if (focus) setAddress('t', run + ':' + index);
  renderDetail(part, index, entries[index % part.chunk]);
}
function nearest(element) {
  const list = reader.list, top = element.offsetTop - list.offsetTop;
  if (top < list.scrollTop + 30) list.scrollTop = top - 40;
  else if (top + element.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + element.offsetHeight - list.clientHeight + 10;
}

function renderDetail(part, i, entry) {
  const status = part.status_names[part.status[i]], stop = part.stop_reason_names[part.stop_reason[i]];
  const siblings = [];
  for (let j = 0; j < part.shown; j++) if (part.group[j] === part.group[i]) siblings.push(j);
  reader.siblings = siblings;
  const facts = [['step', String(part.step[i])], ['source', part.source_names[part.source[i]]], ['status', status], ['stopped by', stop], ['tokens', part.length[i] === null ? '' : count(part.length[i])], ['policy version', part.version[i] === null ? '' : String(part.version[i])]];
  const answers = [['gold', entry.gold], ['parsed', entry.parsed], ['detail', entry.detail]].filter(([, value]) => value);
  const terms = Object.entries(entry.terms || {});
  fill(reader.detail,
    h('div', { class: 'detail-head' }, rewardPill(part.reward[i]), h('span', { class: 'facts' }, facts.filter(([, value]) => value).map(([name, value]) => h('span', {}, h('span', { class: 'muted' }, name + ' '), visible(value)))),
      h('span', { class: 'buttons' }, h('button', { class: 'small', type: 'button', onclick: () => move(-1), title: 'previous (k)' }, '↑'), h('button', { class: 'small', type: 'button', onclick: () => move(1), title: 'next (j)' }, '↓'))),
    siblings.length > 1 && h('div', { class: 'siblings' }, h('span', { class: 'muted' }, 'same prompt '), siblings.map((j) => h('button', { type: 'button', class: 'chip', 'aria-current': String(j === i), onclick: () => showTrajectory(j) }, rewardPill(part.reward[j])))),
    block('Prompt', h('div', { class: 'text prompt', dir: 'auto' }, visible(entry.prompt || '')), (entry.prompt || '').length > 1200),
    h('div', { class: 'answers' }, answers.map(([name, value]) => h('div', {}, h('span', { class: 'muted' }, name), h('div', { class: 'text small-text', dir: 'auto' }, visible(value)))),
      terms.length > 0 && h('div', {}, h('span', { class: 'muted' }, 'reward terms'), h('table', {}, terms.map(([name, value]) => h('tr', {}, h('td', {}, visible(name)), h('td', { class: 'number' }, format(value))))))),
    responseBlock(entry),
    entry.cut && h('p', { class: 'muted' }, count(entry.cut) + ' characters were left out of this page.'),
    h('p', { class: 'muted ids' }, 'trajectory ', h('code', {}, visible(entry.trajectory_id || '–')), ' task ', h('code', {}, visible(entry.task_id || '–'))));
  root.dataset.detail = String(i);
}
function block(title, content, closed) { return h('details', { class: 'block', open: !closed }, h('summary', {}, title), content); }

function responseBlock(entry) {
  const channels = Object.keys(CHANNELS).filter((name) => entry.data[name]);
  if (!channels.includes(reader.colour) && reader.colour !== 'none') reader.effective = channels[0] || 'none';
  else reader.effective = reader.colour;
  const holder = h('div', {});
  const draw = () => fill(holder, renderResponse(entry, holder, false));
  const choose = channels.length > 0 && h('label', {}, 'colour by', h('select', { id: 'colour', onchange: (event) => { reader.colour = reader.effective = event.target.value; remember('colour', reader.colour); draw(); } },
    [...channels, 'none'].map((name) => h('option', { value: name, selected: name === reader.effective }, CHANNELS[name] || 'nothing'))));
  const own = channels.length > 0 && h('label', { class: 'check', title: 'full colour at the largest value of this response, instead of a scale for the whole run' }, h('input', { type: 'checkbox', checked: reader.own, onchange: (event) => { reader.own = event.target.checked; draw(); } }), 'scale to this response');
  draw();
  return h('div', { class: 'block open' }, h('div', { class: 'response-head' }, h('b', {}, 'Response'), choose, own), holder);
}

function renderResponse(entry, holder, everything) {
  const name = reader.effective, values = name === 'none' ? null : entry.data[name];
  if (!entry.tokens) {
    const text = entry.response || '', long = !everything && text.length > 6 * LONG;
    return [h('div', { class: 'text', dir: 'auto' }, visible(long ? text.slice(0, 5 * LONG) : text) || '(empty)'), long && moreButton(entry, holder, count(text.length - 5 * LONG) + ' more characters')];
  }
  let limit = reader.data.meta.runs[reader.run].trajectories.scales[name] || 0;
  if (reader.own && values) limit = values.reduce((most, value) => (Number.isFinite(value) ? Math.max(most, Math.abs(value)) : most), 0);
  const n = everything ? entry.tokens.length : Math.min(entry.tokens.length, LONG);
  const starts = (entry.starts || []).filter((start) => start > 0 && start < n);
  const edges = [0, ...starts, n];
  const stepped = (entry.starts || []).length > 1 || (entry.step_rewards || []).length > 1;
  const steps = edges.slice(0, -1).map((from, s) => {
    const spans = [];
    for (let t = from; t < edges[s + 1]; t++) spans.push(h('span', { class: entry.tokens[t].includes('\n') ? 't nl' : 't', 'data-t': t, style: values ? { background: diverging(values[t], limit) } : {} }, visible(entry.tokens[t])));
    if (!stepped) return spans;
    const reward = (entry.step_rewards || [])[s];
    return h('div', { class: 'step' }, h('div', { class: 'step-head' }, 'step ' + (s + 1), reward !== undefined && h('span', {}, ' reward ' + format(reward, 3))), h('div', { dir: 'auto' }, spans));
  });
  const box = h('div', { class: 'text tokens', dir: 'auto' }, steps);
  box.addEventListener('pointerover', (event) => showTip(event, entry));
  box.addEventListener('pointerdown', (event) => showTip(event, entry));
  box.addEventListener('pointerleave', hideTip);
  return [values && colourLegend(name, limit), values && profile(entry, name, starts, n, box), box, n < entry.tokens.length && moreButton(entry, holder, count(entry.tokens.length - n) + ' more tokens')];
}
function moreButton(entry, holder, text) { return h('button', { type: 'button', class: 'more', onclick: () => fill(holder, renderResponse(entry, holder, true)) }, 'show ' + text); }

// The channel along the response, as bars from zero; click to go to the token.
function profile(entry, name, starts, n, box) {
  const values = entry.data[name];
  if (entry.constant && entry.constant[name] !== undefined) return h('p', { class: 'muted same' }, 'the same at every token: ' + format(entry.constant[name], 3));
  let most = 0;
  for (let t = 0; t < n; t++) if (Number.isFinite(values[t])) most = Math.max(most, Math.abs(values[t]));
  if (!most || n < 8) return null;
  const signs = [1, -1].filter((sign) => values.some((value) => value * sign > 0));
  const paths = signs.map((sign) => {
    let path = '';
    for (let t = 0; t < n; t++) if (values[t] * sign > 0) path += 'M' + t + ',0h1V' + (-values[t] / most).toFixed(4) + 'h-1z';
    return h('svg:path', { d: path, style: { fill: 'var(--' + (sign > 0 ? 'positive' : 'negative') + ')' } });
  });
  const top = signs.includes(1) ? -1.05 : -0.05, bottom = signs.includes(-1) ? 1.05 : 0.05;
  const edges = starts.map((start) => h('svg:path', { d: 'M' + start + ',' + top + 'V' + bottom, class: 'edge', 'vector-effect': 'non-scaling-stroke' }));
  const tokenAt = (event) => { const at = svg.getBoundingClientRect(); return box.querySelector('[data-t="' + Math.max(0, Math.min(n - 1, Math.floor((event.clientX - at.left) / at.width * n))) + '"]'); };
  const svg = h('svg:svg', { class: 'profile', viewBox: '0 ' + top + ' ' + n + ' ' + (bottom - top), preserveAspectRatio: 'none', role: 'img', 'aria-label': CHANNELS[name] + ' along the response',
    onpointermove: (event) => { const span = tokenAt(event); box.querySelectorAll('.here').forEach((other) => other.classList.remove('here')); if (span) { span.classList.add('here'); tipAt(span, entry, svg); } },
    onpointerleave: () => { box.querySelectorAll('.here').forEach((other) => other.classList.remove('here')); hideTip(); },
    onclick: (event) => { const span = tokenAt(event); if (span) span.scrollIntoView({ block: 'center' }); } }, paths, edges);
  return svg;
}

// Blue is positive, red is negative, zero has no colour; the same on light and dark paper.
function diverging(value, limit) {
  if (!Number.isFinite(value) || !limit) return 'transparent';
  const strength = Math.min(1, Math.abs(value) / limit) ** 0.7; // small values should still be seen, on dark paper above all
  return 'color-mix(in srgb, var(--' + (value > 0 ? 'positive' : 'negative') + ') ' + (85 * strength).toFixed(1) + '%, transparent)';
}
function colourLegend(name, limit) {
  const stops = [-1, -0.75, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 0.75, 1].map((place) => diverging(place * limit, limit)).join(',');
  return h('div', { class: 'legend' }, h('span', {}, CHANNELS[name] + ': ', '−' + format(limit, 3), h('i', { class: 'ramp wide-ramp', style: { background: 'linear-gradient(90deg,' + stops + ')' } }), '+' + format(limit, 3), h('span', { class: 'muted' }, ' (0 is colourless; point at a token for its numbers)')));
}

function showTip(event, entry) {
  const span = event.target.closest('.t');
  if (span) tipAt(span, entry, span);
  else hideTip();
}
function tipAt(span, entry, anchor) {
  const tip = document.getElementById('tip');
  const t = Number(span.dataset.t);
  tip.replaceChildren(h('div', { class: 'tip-token' }, JSON.stringify(entry.tokens[t]).replace(/[\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'))), h('div', { class: 'muted' }, 'token ' + (t + 1) + ' of ' + entry.tokens.length),
    h('table', {}, Object.keys(CHANNELS).filter((name) => entry.data[name]).map((name) => h('tr', {}, h('td', {}, CHANNELS[name]), h('td', { class: 'number' }, format(entry.data[name][t], 3))))),
    entry.data.logprob && Number.isFinite(entry.data.logprob[t]) && h('div', { class: 'muted' }, 'probability ' + format(Math.exp(entry.data.logprob[t]), 3)));
  tip.hidden = false;
  const at = anchor.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(at.left, window.innerWidth - size.width - 8)) + 'px';
  tip.style.top = (at.bottom + size.height + 8 > window.innerHeight ? at.top - size.height - 6 : at.bottom + 6) + 'px';
}
function hideTip() { document.getElementById('tip').hidden = true; }

// ---- keys --------------------------------------------------------------------------------------------------------------------

function move(by) {
  const place = reader.order.indexOf(reader.at) + by;
  if (place >= 0 && place < reader.order.length) showTrajectory(reader.order[place]);
}
function moveSibling(by) {
  const place = (reader.siblings || []).indexOf(reader.at) + by;
  if (place >= 0 && place < (reader.siblings || []).length) showTrajectory(reader.siblings[place]);
}
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === 'Escape' && typing) event.target.blur();
  if (typing) return;
  const actions = { j: () => move(1), k: () => move(-1), ']': () => moveSibling(1), '[': () => moveSibling(-1), c: cycleColour, '/': () => { event.preventDefault(); reader.form.inputs.search.focus(); } };
  if (actions[event.key]) actions[event.key]();
}
function cycleColour() {
  const select = document.getElementById('colour');
  if (!select) return;
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event('change'));
}
