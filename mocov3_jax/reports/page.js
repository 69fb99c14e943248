// Draws the charts of the report, and moves through them by keyboard.
'use strict';

const charts = JSON.parse(document.getElementById('charts').textContent);
const plots = [...document.querySelectorAll('.plot')];
const boxes = [...document.querySelectorAll('input[data-run]')];
const oneRun = document.getElementById('one-run');
const unit = document.getElementById('unit');
const live = document.getElementById('live');
const hidden = new Set();  // Numbers of the runs that are not shown.
const steps = new Map();  // Steps of each curve, while epochs are drawn.

// plotly.js is 4.8 MB; compressed, the page has room for the runs.
async function loadPlotly() {
  const text = document.getElementById('plotly').textContent;
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const unzipped = new Blob([bytes]).stream().pipeThrough(
    new DecompressionStream('gzip'));
  const script = document.createElement('script');
  script.textContent = await new Response(unzipped).text();
  document.head.append(script);
}

// --- What is shown ---------------------------------------------------------

// Whether a curve is to be seen: if one of its runs is, and, in a chart of one
// run at a time, that run is the chosen one.
function isShown(trace, layout) {
  const runs = trace.meta.runs.filter(run => !hidden.has(run));
  if (layout.meta.one && oneRun) return runs.includes(Number(oneRun.value));
  return runs.length > 0;
}

function showRuns() {
  hidden.clear();
  for (const box of boxes) {
    const run = Number(box.dataset.run);
    if (!box.checked) hidden.add(run);
    for (const label of document.querySelectorAll(`label[for="${box.id}"]`)) {
      label.classList.toggle('off', !box.checked);
    }
  }
  if (oneRun) {
    for (const option of oneRun.options) {
      option.disabled = hidden.has(Number(option.value));
    }
    // The chosen run was hidden: another takes its place.
    if (oneRun.selectedOptions[0]?.disabled) {
      const first = [...oneRun.options].find(option => !option.disabled);
      if (first) oneRun.value = first.value;
    }
  }
  plots.forEach(showCurves);
}

function showCurves(plot) {
  if (!plot.data) return;
  plot.cursor = null;
  Plotly.restyle(plot, {
    visible: plot.data.map(trace => isShown(trace, plot.layout)),
  });
}

function showUnit() {
  const epochs = unit.value === 'epoch';
  for (const plot of plots) {
    if (!plot.data || !plot.layout.meta.steps) continue;
    plot.layout.meta.x = unit.value;
    const x = plot.data.map(trace => {
      if (!steps.has(trace.uid)) steps.set(trace.uid, trace.x);
      const own = steps.get(trace.uid);
      return epochs ? own.map(step => step / trace.meta.epoch) : own;
    });
    Plotly.update(plot, {x, hovertemplate: plot.data.map(
      trace => hoverText(trace, plot.layout))}, {
      'xaxis.title.text': unit.value, 'xaxis.autorange': true,
    });
  }
}

function showTheme(dark) {
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  const button = document.getElementById('theme');
  button.setAttribute('aria-pressed', String(dark));
  button.textContent = dark ? 'Light' : 'Dark';
  button.setAttribute('aria-label', 'Dark theme');
  for (const plot of plots) {
    if (plot.data) Plotly.relayout(plot, colors());
  }
}

function colors() {
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  const found = {
    'font.color': color('--text'), 'hoverlabel.bgcolor': color('--head'),
    'hoverlabel.bordercolor': color('--soft'),
    'hoverlabel.font.color': color('--text'),
    'modebar.color': color('--soft'), 'modebar.activecolor': color('--accent'),
    'modebar.bgcolor': 'rgba(0,0,0,0)',
  };
  for (const axis of ['xaxis', 'yaxis']) {
    found[`${axis}.gridcolor`] = color('--grid');
    found[`${axis}.linecolor`] = color('--line');
  }
  return found;
}

// --- Words -----------------------------------------------------------------

// plotly reads tags and %{...} in names of runs; they are to be shown as is.
function literal(text) {
  const codes = {'&': '&amp;', '<': '&lt;', '>': '&gt;', '%': '&#37;'};
  return text.replace(/[&<>%]/g, character => codes[character]);
}

function hoverText(trace, layout) {
  const {x, y, percent} = layout.meta;
  const name = `<b>${literal(trace.name)}</b>`;
  if (trace.mode === 'markers') return `${name}<br>%{text}<extra></extra>`;
  const at = x === 'step' ? '%{x:,}' : '%{x:.4~g}';
  const value = percent ? '%{y:.1%}' : '%{y:.4~g}';
  return `${name}<br>${x} ${at}<br>${literal(y)} ${value}<extra></extra>`;
}

function spoken(trace, point, layout) {
  const {x, y, percent} = layout.meta;
  if (trace.mode === 'markers') return `${trace.name}: ${trace.text[point]}`;
  const at = Number(trace.x[point].toPrecision(6));
  const value = trace.y[point];
  const said = percent
    ? `${(100 * value).toFixed(1)} %` : String(Number(value.toPrecision(4)));
  return `${trace.name}: ${x} ${at}, ${y} ${said}`;
}

// --- Keyboard --------------------------------------------------------------

function say(plot) {
  const {curve, point} = plot.cursor;
  Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: point}]);
  live.textContent = spoken(plot.data[curve], point, plot.layout);
}

// Zooms the horizontal axis, about the point that was reached.
function zoom(plot, factor) {
  const {range, type} = plot._fullLayout.xaxis;
  let middle = (range[0] + range[1]) / 2;
  if (plot.cursor) {
    const x = plot.data[plot.cursor.curve].x[plot.cursor.point];
    middle = type === 'log' ? Math.log10(x) : x;
  }
  const half = factor * (range[1] - range[0]) / 2;
  Plotly.relayout(plot, {'xaxis.range': [middle - half, middle + half]});
}

function onKey(event) {
  const plot = event.currentTarget;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const shown = plot.data.flatMap(
    (trace, i) => trace.visible === true && trace.x.length ? [i] : []);
  const zooms = {'+': 0.5, '=': 0.5, '-': 2};
  const key = event.key;
  if (key === 'Escape') {
    Plotly.Fx.unhover(plot);
    plot.cursor = null;
    live.textContent = '';
    plot.blur();
  } else if (key in zooms) {
    zoom(plot, zooms[key]);
  } else if (key === '0') {
    Plotly.relayout(plot, {'xaxis.autorange': true, 'yaxis.autorange': true});
  } else if (/^(Arrow|Home|End)/.test(key) && shown.length) {
    move(plot, key, shown);
    say(plot);
  } else {
    return;
  }
  event.preventDefault();
}

function move(plot, key, shown) {
  if (!plot.cursor) {
    plot.cursor = {curve: shown[0], point: 0};
    return;  // The first key goes to the first point.
  }
  const before = plot.data[plot.cursor.curve];
  const down = {ArrowDown: 1, ArrowUp: -1}[key];
  if (down) {
    const place = shown.indexOf(plot.cursor.curve) + down;
    const curve = shown[(place + shown.length) % shown.length];
    // To the point nearest in x, so that curves can be compared.
    const x = before.x[plot.cursor.point];
    const far = plot.data[curve].x.map(value => Math.abs(value - x));
    const nearest = far.reduce((a, b, i) => (b < far[a] ? i : a), 0);
    plot.cursor = {curve, point: nearest};
    return;
  }
  const last = before.x.length - 1;
  const to = {
    ArrowLeft: plot.cursor.point - 1, ArrowRight: plot.cursor.point + 1,
    Home: 0, End: last,
  }[key];
  plot.cursor.point = Math.max(0, Math.min(last, to));
}

// --- Drawing ---------------------------------------------------------------

let following = false;

// A zoom along the steps is one in all charts: a spike of the gradient stands
// above the dip that it caused.
function follow(plot, change) {
  if (following || !plot.layout.meta.steps) return;
  const [from, to] = change['xaxis.range'] ??
    [change['xaxis.range[0]'], change['xaxis.range[1]']];
  const all = change['xaxis.autorange'];
  if (from === undefined && !all) return;
  const asked = all ? {'xaxis.autorange': true} : {'xaxis.range': [from, to]};
  following = true;
  const others = plots.filter(
    other => other !== plot && other.data && other.layout.meta.steps);
  Promise.all(others.map(other => Plotly.relayout(other, asked))).finally(
    () => { following = false; });
}

async function draw(plot) {
  const {data, layout} = charts[plot.dataset.chart];
  data.forEach((trace, i) => {
    trace.uid = `${plot.id}-${i}`;
    trace.visible = isShown(trace, layout);
    trace.hovertemplate = hoverText(trace, layout);
  });
  const family = getComputedStyle(document.body).fontFamily;
  layout.font = {size: 13, family};
  layout.hoverlabel = {font: {size: 13, family}};
  // A finger that drags scrolls the page; a mouse zooms.
  const touch = matchMedia('(pointer: coarse)').matches;
  layout.dragmode = touch ? false : 'zoom';
  await Plotly.newPlot(plot, data, layout, {
    responsive: true, displaylogo: false,
    modeBarButtons: [[
      ...(touch ? [] : ['zoom2d', 'pan2d']), 'zoomIn2d', 'zoomOut2d',
      'resetScale2d', 'toImage',
    ]],
  });
  await Plotly.relayout(plot, colors());
  plot.addEventListener('keydown', onKey);
  plot.addEventListener('focus', () => {
    const count = plot.data.filter(trace => trace.visible === true).length;
    live.textContent = `${count} ${count === 1 ? 'curve' : 'curves'}`;
  });
  plot.on('plotly_relayout', change => follow(plot, change));
}

async function start() {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  showTheme(dark.matches);
  dark.addEventListener('change', event => showTheme(event.matches));
  document.getElementById('theme').addEventListener('click', () =>
    showTheme(document.documentElement.dataset.theme !== 'dark'));
  const message = document.getElementById('message');
  if (!('DecompressionStream' in window)) {
    message.textContent = 'This browser cannot unpack the charts ' +
      '(DecompressionStream). Newer ones can; the tables are all here.';
    message.hidden = false;
    return;
  }
  await loadPlotly();
  for (const plot of plots) await draw(plot);
  boxes.forEach(box => box.addEventListener('change', showRuns));
  for (const button of document.querySelectorAll('button[data-all]')) {
    button.addEventListener('click', () => {
      boxes.forEach(box => { box.checked = button.dataset.all === '1'; });
      showRuns();
    });
  }
  oneRun?.addEventListener('change', () => plots.forEach(showCurves));
  unit?.addEventListener('change', showUnit);
  // A browser may remember what was chosen at an earlier visit.
  showRuns();
  if (unit?.value === 'epoch') showUnit();
  document.documentElement.dataset.ready = String(plots.length);
}

start();
