// What plotly.js does not do itself: runs that are hidden in all charts, epochs
// for steps, a dark theme, a common zoom, and charts by keyboard and by ear.
'use strict';

const element = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const charts = JSON.parse(element('charts').textContent);
const plots = all('.plot');
const boxes = all('input[data-run]');  // In the order of the runs.
const oneRun = element('one-run');
const unit = element('unit');
const live = element('live');

// plotly.js is 4.8 MB; compressed, the page has room for the runs.
async function loadPlotly() {
  const bytes = Uint8Array.from(
    atob(element('plotly').textContent), c => c.charCodeAt(0));
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
  const runs = trace.meta.runs.filter(run => boxes[run].checked);
  if (layout.meta.one) return runs.includes(Number(oneRun.value));
  return runs.length > 0;
}

function showCurves() {
  for (const plot of plots) {
    plot.cursor = null;
    Plotly.restyle(plot, {
      visible: plot.data.map(trace => isShown(trace, plot.layout)),
    });
  }
}

function showRuns() {
  for (const box of boxes) {
    for (const label of box.labels) label.classList.toggle('off', !box.checked);
  }
  if (oneRun) {
    const options = [...oneRun.options];
    for (const option of options) {
      option.disabled = !boxes[option.value].checked;
    }
    // The chosen run was hidden: another takes its place.
    const next = options.find(option => !option.disabled);
    if (oneRun.selectedOptions[0]?.disabled && next) oneRun.value = next.value;
  }
  showCurves();
}

function showUnit() {
  const epochs = unit.value === 'epoch';
  for (const plot of plots) {
    if (!plot.layout.meta.steps) continue;
    plot.layout.meta.x = unit.value;
    const x = plot.data.map(({meta}) => epochs
      ? meta.steps.map(step => step / meta.epoch) : meta.steps);
    Plotly.update(plot, {x}, {
      'xaxis.title.text': unit.value, 'xaxis.autorange': true,
    });
  }
}

function showTheme(dark) {
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  const button = element('theme');
  button.setAttribute('aria-pressed', String(dark));
  button.textContent = dark ? 'Light' : 'Dark';
  button.setAttribute('aria-label', 'Dark theme');
  for (const plot of plots) {
    if (plot.data) Plotly.relayout(plot, colors());
  }
}

// plotly has colours in its layout, not from the page's style sheet.
function colors() {
  const style = getComputedStyle(document.documentElement);
  const names = {
    'font.color': '--text', 'hoverlabel.font.color': '--text',
    'hoverlabel.bgcolor': '--head', 'hoverlabel.bordercolor': '--soft',
    'modebar.color': '--soft', 'modebar.activecolor': '--accent',
    'xaxis.gridcolor': '--grid', 'yaxis.gridcolor': '--grid',
    'xaxis.linecolor': '--line', 'yaxis.linecolor': '--line',
  };
  return Object.fromEntries(Object.entries(names).map(
    ([key, name]) => [key, style.getPropertyValue(name).trim()]));
}

// --- Keyboard --------------------------------------------------------------

function say(plot) {
  const {curve, point} = plot.cursor;
  Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: point}]);
  const {name, mode, text, x, y} = plot.data[curve];
  const {meta} = plot.layout;
  const value = meta.percent ? `${(100 * y[point]).toFixed(1)} %`
    : Number(y[point].toPrecision(4));
  const said = mode === 'markers' ? text[point]
    : `${meta.x} ${Number(x[point].toPrecision(6))}, ${meta.y} ${value}`;
  live.textContent = `${name}: ${said}`;
}

// Zooms the horizontal axis, about the point that was reached.
function zoom(plot, factor) {
  const {range: [from, to], type} = plot.layout.xaxis;
  let middle = (from + to) / 2;
  if (plot.cursor) {
    const x = plot.data[plot.cursor.curve].x[plot.cursor.point];
    middle = type === 'log' ? Math.log10(x) : x;
  }
  const half = factor * (to - from) / 2;
  Plotly.relayout(plot, {'xaxis.range': [middle - half, middle + half]});
}

function onKey(event) {
  const plot = event.currentTarget;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const shown = plot.data.flatMap((trace, i) => trace.visible ? [i] : []);
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
    // The first key goes to the first point.
    plot.cursor = plot.cursor ? moved(plot, key, shown)
      : {curve: shown[0], point: 0};
    say(plot);
  } else {
    return;
  }
  event.preventDefault();
}

function moved(plot, key, shown) {
  const {curve, point} = plot.cursor;
  const {x} = plot.data[curve];
  const down = {ArrowDown: 1, ArrowUp: -1}[key];
  if (!down) {
    const last = x.length - 1;
    const to = {
      ArrowLeft: Math.max(0, point - 1), ArrowRight: Math.min(last, point + 1),
      Home: 0, End: last,
    };
    return {curve, point: to[key]};
  }
  const place = shown.indexOf(curve) + down;
  const next = shown[(place + shown.length) % shown.length];
  // To the point nearest in x, so that curves can be compared.
  const far = plot.data[next].x.map(value => Math.abs(value - x[point]));
  const nearest = far.reduce((a, b, i) => (b < far[a] ? i : a), 0);
  return {curve: next, point: nearest};
}

// --- Drawing ---------------------------------------------------------------

let following = false;

// A zoom along the steps is one in all charts: a spike of the gradient stands
// above the dip that it caused.
async function follow(plot, change) {
  const zoomed = Object.keys(change).some(
    key => /^xaxis\.(auto)?range/.test(key));
  if (following || !zoomed || !plot.layout.meta.steps) return;
  const {autorange, range} = plot.layout.xaxis;
  const others = plots.filter(
    other => other !== plot && other.layout?.meta.steps);
  following = true;
  await Promise.all(others.map(other => Plotly.relayout(other, autorange
    ? {'xaxis.autorange': true} : {'xaxis.range': [...range]})));
  following = false;
}

async function draw(plot) {
  const {data, layout} = charts[plot.dataset.chart];
  for (const trace of data) {
    trace.visible = isShown(trace, layout);
    trace.meta.steps = trace.x;
  }
  const {fontFamily: family} = getComputedStyle(document.body);
  // A finger that drags scrolls the page; a mouse zooms.
  const touch = matchMedia('(pointer: coarse)').matches;
  Object.assign(layout, {
    font: {size: 13, family}, hoverlabel: {font: {size: 13, family}},
    dragmode: touch ? false : 'zoom',
  });
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
    const count = plot.data.filter(trace => trace.visible).length;
    live.textContent = `${count} ${count === 1 ? 'curve' : 'curves'}`;
  });
  plot.on('plotly_relayout', change => follow(plot, change));
}

async function start() {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  showTheme(dark.matches);
  dark.addEventListener('change', event => showTheme(event.matches));
  element('theme').addEventListener('click', () =>
    showTheme(document.documentElement.dataset.theme !== 'dark'));
  if (!('DecompressionStream' in window)) {
    element('message').textContent = 'This browser cannot unpack the charts ' +
      '(DecompressionStream). Newer ones can; the tables are all here.';
    element('message').hidden = false;
    return;
  }
  await loadPlotly();
  for (const plot of plots) await draw(plot);
  boxes.forEach(box => box.addEventListener('change', showRuns));
  for (const button of all('button[data-all]')) {
    button.addEventListener('click', () => {
      boxes.forEach(box => { box.checked = button.dataset.all === '1'; });
      showRuns();
    });
  }
  oneRun?.addEventListener('change', showCurves);
  unit?.addEventListener('change', showUnit);
  // A browser may remember what was chosen at an earlier visit.
  showRuns();
  if (unit?.value === 'epoch') showUnit();
  document.documentElement.dataset.ready = String(plots.length);
}

start();
