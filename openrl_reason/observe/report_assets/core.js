// What every part of the page uses: errors made visible, elements from text nodes only, data blocks, numbers, theme, address.

const pageStart = performance.now();
const root = document.documentElement;
root.dataset.errors = '0';

function reportError(what) {
  const box = document.getElementById('errors');
  root.dataset.errors = String(Number(root.dataset.errors) + 1);
  box.hidden = false;
  box.append(h('p', {}, 'This page ran into an error: ' + what));
}
window.addEventListener('error', (event) => reportError(event.message + ' at ' + event.lineno + ':' + event.colno));
window.addEventListener('unhandledrejection', (event) => reportError(String((event.reason && event.reason.stack) || event.reason)));
document.addEventListener('securitypolicyviolation', (event) => reportError('blocked by the page\'s policy: ' + event.violatedDirective + ' ' + event.blockedURI));

// h('div', {class: 'x', onclick: f}, 'text', child, ...): strings become text nodes; nothing is ever parsed as HTML.
function h(tag, attributes, ...children) {
  const element = tag.startsWith('svg:') ? document.createElementNS('http://www.w3.org/2000/svg', tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.assign(element.style, value);
    else if (name === 'value') element.value = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  append(element, children);
  return element;
}
function append(element, children) {
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) element.append(child);
}

function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

// Text of models made safe to look at: control characters get their pictures, and bidi controls a name instead of power over the line.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]/g, (c) => (c === '\u007f' ? '\u2421' : String.fromCharCode(0x2400 + c.charCodeAt(0))))
    .replace(/[\u0080-\u009f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff]/g, (c) => '\u27e8U+' + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9')
    .replace(/\r(?!\n)/g, '\u240d').replace(/\r\n/g, '\n');
}

// ---- data blocks: gzip in base64 ---------------------------------------------------------------------------------------------

function bytesOf(id) {
  const base64 = document.getElementById('data-' + id).textContent;
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}
async function unpack(id) {
  if (!window.DecompressionStream) throw new Error('this browser is too old to unpack the data (DecompressionStream is missing)');
  const stream = new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}
async function unpackText(id) { return new TextDecoder('utf-8').decode(await unpack(id)); }
async function unpackJSON(id) { return JSON.parse(await unpackText(id)); }

// ---- numbers -----------------------------------------------------------------------------------------------------------------

function format(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  if (!Number.isFinite(value)) return value > 0 ? '∞' : '−∞';
  if (value === 0) return '0';
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) text = value.toExponential(digits - 2).replace('e+', 'e');
  else if (size >= 1000) text = Math.round(value).toLocaleString('en-US').replace(/,/g, '\u202f');
  else text = String(Number(value.toPrecision(digits)));
  return text.replace('-', '−');
}
function percent(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  return (value * 100).toFixed(Math.abs(value) < 0.1 || Math.abs(value) > 0.995 ? 1 : 0).replace(/\.0$/, '').replace('-', '−') + '\u202f%';
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds < 120) return format(seconds, 3) + ' s';
  if (seconds < 7200) return format(seconds / 60, 3) + ' min';
  if (seconds < 172800) return format(seconds / 3600, 3) + ' h';
  return format(seconds / 86400, 3) + ' days';
}
function count(number) { return number.toLocaleString('en-US').replace(/,/g, '\u202f'); }
function plural(number, word) { return count(number) + ' ' + word + (number === 1 ? '' : 's'); }

// ---- the address after '#': theme=dark, t=run:trajectory, draw=all -----------------------------------------------------------

const address = new Map(location.hash.slice(1).split('&').filter(Boolean).map((part) => {
  const [name, value] = part.split('=');
  return [name, value === undefined ? '' : decodeURIComponent(value)];
}));
function setAddress(name, value) {
  if (value === null) address.delete(name);
  else address.set(name, value);
  const text = [...address].map(([key, entry]) => (entry === '' ? key : key + '=' + encodeURIComponent(entry))).join('&');
  try { history.replaceState(null, '', '#' + text); } catch (error) { /* some browsers refuse this for file: addresses; the page works without */ }
}
function remember(name, value) {
  try { localStorage.setItem('openrl-report-' + name, value); } catch (error) { /* no storage for file: addresses here */ }
}
function recall(name) {
  try { return localStorage.getItem('openrl-report-' + name); } catch (error) { return null; }
}

// ---- theme -------------------------------------------------------------------------------------------------------------------

const themeListeners = [];
const systemDark = window.matchMedia('(prefers-color-scheme: dark)');
function applyTheme(theme) {
  root.dataset.theme = theme;
  for (const listener of themeListeners) listener();
}
function startTheme() {
  applyTheme(address.get('theme') || recall('theme') || (systemDark.matches ? 'dark' : 'light'));
  systemDark.addEventListener('change', () => { if (!recall('theme')) applyTheme(systemDark.matches ? 'dark' : 'light'); });
}
function toggleTheme() {
  const theme = root.dataset.theme === 'dark' ? 'light' : 'dark';
  remember('theme', theme);
  applyTheme(theme);
}
function cssColor(name) { return getComputedStyle(root).getPropertyValue('--' + name).trim(); }

// Okabe and Ito's palette, darker on light and lighter on dark where contrast asks for it.
const PALETTES = {
  light: ['#0072b2', '#d55e00', '#00805f', '#b5569a', '#8a6d00', '#3a9bd9', '#5b5f66', '#7a3e00'],
  dark: ['#5ab4f0', '#ff9b52', '#3fd0a4', '#ee9fd0', '#f0dc5a', '#9ad7ff', '#b9bdc6', '#d9a066'],
};
function color(index) { const palette = PALETTES[root.dataset.theme] || PALETTES.light; return palette[index % palette.length]; }
function faded(hex, alpha) {
  const n = parseInt(hex.slice(1), 16);
  return 'rgba(' + (n >> 16) + ',' + ((n >> 8) & 255) + ',' + (n & 255) + ',' + alpha + ')';
}
