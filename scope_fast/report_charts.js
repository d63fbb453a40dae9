// Curves: inline SVG, one crosshair for all of them, values on hover.
const RUN = JSON.parse(document.getElementById('run-data').textContent);
const SVG = 'http://www.w3.org/2000/svg';
const HEIGHT = 172, MARGIN = { left: 46, right: 10, top: 8, bottom: 22 };
const charts = [];

// Text always goes in as text nodes: what a model wrote is never markup.
function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ''));
  return node;
}

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function format(value, unit) {
  if (value === null || value === undefined) return '–';
  if (typeof value === 'string') return value; // "nan", "inf": not JSON's numbers
  if (unit === 'share') return (100 * value).toFixed(Math.abs(value) < 0.1 && value !== 0 ? 2 : 1) + '%';
  const size = Math.abs(value);
  const suffix = unit === 's' ? ' s' : '';
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(1) + suffix;
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString('en') + suffix;
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3) + suffix;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) result.push(+(i * step).toPrecision(12));
  return result;
}

// A tick's value with as many decimals as tell it from its neighbour.
function tickLabel(value, marks, unit) {
  const factor = unit === 'share' ? 100 : 1, gap = factor * ((marks[1] ?? marks[0] + 1) - marks[0]);
  const decimals = Math.max(0, -Math.floor(Math.log10(gap) + 1e-9));
  const text = decimals > 4 ? value.toExponential(0) : (factor * value).toLocaleString('en', {
    minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return text + (unit === 'share' ? '%' : unit === 's' ? ' s' : '');
}

function colourOf(name, i) {
  const known = { 'scope/accepted': 'var(--teacher)', 'scope/rejected': 'var(--wrong)', 'teacher/errors': 'var(--c4)' };
  return known[name] ?? `var(--c${(i % 7) + 1})`;
}

// Exponential moving average over the values that exist, corrected for its start at zero.
function smoothed(values) {
  const keep = 1 - 2 / (Math.min(50, Math.max(3, values.length / 12)) + 1);
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

function yScale(panel, rows) {
  const all = rows.flat().filter((v) => v !== null && (panel.scale !== 'log' || v > 0));
  let low = all.reduce((a, b) => Math.min(a, b), Infinity);
  let high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!all.length) [low, high] = panel.scale === 'log' ? [1e-6, 1] : [0, 1];
  if (panel.scale === 'log') {
    const [from, to] = [Math.floor(Math.log10(low)), Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1)];
    const marks = [];
    for (let e = from; e <= to; e += Math.ceil((to - from) / 4)) marks.push(10 ** e);
    return { at: (v) => (Math.log10(Math.max(v, 10 ** from)) - from) / (to - from), marks, label: (v) => v.toExponential(0) };
  }
  if (low > 0 && (low < 0.6 * high || panel.kind !== 'line')) low = 0;
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  if (low !== 0) low -= pad;
  high += pad;
  const marks = ticks(low, high, 5), unit = RUN.series[panel.names[0]].unit;
  return { at: (v) => (v - low) / (high - low), marks, label: (v) => tickLabel(v, marks, unit) };
}

function xScale(width) {
  const [first, last] = [RUN.steps[0] ?? 0, RUN.steps.at(-1) ?? 1];
  const half = first === last ? 0.5 : 0;
  const inner = width - MARGIN.left - MARGIN.right;
  return {
    at: (step) => MARGIN.left + ((step - first + half) / (last - first + 2 * half)) * inner,
    step: (x) => first - half + ((x - MARGIN.left) / inner) * (last - first + 2 * half),
    marks: ticks(first, last, Math.max(2, Math.floor(inner / 70))).filter(Number.isInteger),
  };
}

function line(values, x, y) {
  let path = '';
  values.forEach((value, i) => {
    if (value !== null) path += `${path ? 'L' : 'M'}${x.at(RUN.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
  });
  return path;
}

// A band between two rows of values, in stairs as wide as a step, so that a single step shows too.
function band(low, high, x, y) {
  const edges = RUN.steps.map((step, i) => {
    const before = RUN.steps[i - 1] ?? step - 1, after = RUN.steps[i + 1] ?? step + 1;
    return [x.at(Math.max((step + before) / 2, RUN.steps[0])), x.at(Math.min((step + after) / 2, RUN.steps.at(-1)))];
  });
  if (RUN.steps.length === 1) edges[0] = [x.at(RUN.steps[0]) - 20, x.at(RUN.steps[0]) + 20];
  const top = edges.map(([a, b], i) => `${a.toFixed(1)} ${y(high[i]).toFixed(1)} ${b.toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const bottom = edges.map(([a, b], i) => `${b.toFixed(1)} ${y(low[i]).toFixed(1)} ${a.toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return `M${top.join('L')}L${bottom.reverse().join('L')}Z`;
}

function rowsOf(panel) {
  const rows = panel.names.map((name) => RUN.series[name].values);
  if (panel.kind !== 'stack') return rows;
  const sums = RUN.steps.map(() => 0);
  return rows.map((row) => row.map((value, i) => (sums[i] += value ?? 0)));
}

function drawSeries(chart, rows, x, y) {
  const smooth = document.getElementById('smooth').checked;
  const { panel, root } = chart;
  rows.forEach((row, i) => {
    const name = panel.names[i], colour = colourOf(name, i);
    if (panel.kind === 'stack') {
      const base = i ? rows[i - 1] : row.map(() => 0);
      root.append(svg('path', { d: band(base, row, x, y), fill: colour, 'fill-opacity': 0.85, 'data-series': name }));
      return;
    }
    const seen = row.filter((v) => v !== null).length, sparse = seen * 2 < row.length;
    const blur = smooth && !sparse && seen > 4;
    const stroke = { fill: 'none', stroke: colour, 'stroke-linejoin': 'round', 'data-series': name };
    if (blur) root.append(svg('path', { ...stroke, d: line(row, x, y), 'stroke-width': 1, opacity: 0.3 }));
    root.append(svg('path', { ...stroke, d: line(blur ? smoothed(row) : row, x, y), 'stroke-width': 1.8,
      'stroke-dasharray': sparse ? '5 4' : 'none' }));
    if (sparse || seen < 3) row.forEach((v, j) => {
      if (v !== null) root.append(svg('circle', { cx: x.at(RUN.steps[j]), cy: y(v), r: 3.5, fill: colour }));
    });
  });
}

function draw(chart) {
  const width = chart.root.clientWidth || 345;
  const rows = rowsOf(chart.panel), scale = yScale(chart.panel, rows), x = xScale(width);
  const y = (v) => HEIGHT - MARGIN.bottom - scale.at(v) * (HEIGHT - MARGIN.bottom - MARGIN.top);
  chart.root.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
  chart.root.replaceChildren();
  for (const mark of scale.marks) {
    chart.root.append(svg('line', { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(mark), y2: y(mark), class: 'grid' }));
    chart.root.append(svg('text', { x: MARGIN.left - 6, y: y(mark) + 4, 'text-anchor': 'end' }, scale.label(mark)));
  }
  for (const mark of x.marks) {
    const anchor = x.at(mark) > width - 24 ? 'end' : 'middle';
    chart.root.append(svg('text', { x: x.at(mark), y: HEIGHT - 5, 'text-anchor': anchor }, mark.toLocaleString('en')));
  }
  drawSeries(chart, rows, x, y);
  chart.cross = svg('line', { y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, class: 'cross', visibility: 'hidden' });
  chart.root.append(chart.cross);
  chart.x = x;
}

function shortName(name, panel) {
  if (name === 'eval/pass_rate') return 'held out';
  const tail = name.split('/')[1], same = panel.names.filter((other) => other.split('/')[1] === tail);
  return panel.names.length === 1 || same.length > 1 ? name : tail.replace(/_s$/, '').replaceAll('_', ' ');
}

function point(chart, event) {
  const wanted = chart.x.step(event.clientX - chart.root.getBoundingClientRect().left);
  let best = 0;
  RUN.steps.forEach((step, i) => { if (Math.abs(step - wanted) < Math.abs(RUN.steps[best] - wanted)) best = i; });
  const at = chart.x.at(RUN.steps[best]);
  for (const other of charts) {
    if (!other.cross) continue;
    const cx = other.x.at(RUN.steps[best]);
    for (const [name, value] of [['x1', cx], ['x2', cx], ['visibility', 'visible']]) other.cross.setAttribute(name, value);
  }
  const rows = chart.panel.names.map((name, i) => tipRow(shortName(name, chart.panel),
    format(RUN.series[name].values[best], RUN.series[name].unit), colourOf(name, i)));
  const box = chart.root.getBoundingClientRect();
  showTip([el('div', 'head', `step ${RUN.steps[best].toLocaleString('en')}`), ...rows], box.left + at, box.top + 24);
  return RUN.steps[best];
}

function unpoint() {
  for (const chart of charts) chart.cross?.setAttribute('visibility', 'hidden');
  hideTip();
}

function addChart(panel, host, onStep) {
  const key = el('div', 'key');
  panel.names.forEach((name, i) => {
    const { values, unit, description } = RUN.series[name];
    const swatch = el('i', 'swatch');
    swatch.style.background = colourOf(name, i);
    const last = values.findLast((v) => v !== null);
    const entry = el('span', '', swatch, `${shortName(name, panel)} ${format(last, unit)}`);
    entry.title = `${name}: ${description}`;
    key.append(entry);
  });
  const root = svg('svg', { role: 'img', 'aria-label': `${panel.title}: ${panel.names.join(', ')} by step` });
  const described = RUN.series[panel.names[0]].description;
  const title = el('h3', '', panel.title);
  title.title = described;
  host.append(el('figure', 'chart', title, key, root));
  const chart = { panel, root };
  charts.push(chart);
  root.addEventListener('pointermove', (event) => point(chart, event));
  root.addEventListener('pointerdown', (event) => point(chart, event));
  root.addEventListener('pointerleave', unpoint);
  root.addEventListener('click', (event) => onStep(point(chart, event)));
}

function drawAll() {
  for (const chart of charts) if (chart.root.clientWidth || !chart.cross) draw(chart);
}

function tipRow(label, value, colour) {
  const name = el('span', '', label);
  if (colour) {
    const swatch = el('i', 'swatch');
    swatch.style.background = colour;
    name.prepend(swatch);
  }
  return el('div', 'row', name, el('b', '', value));
}

function showTip(nodes, x, y) {
  const tip = document.getElementById('tip');
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, x + 14 + width > innerWidth ? x - width - 14 : x + 14)}px`;
  tip.style.top = `${Math.max(6, Math.min(y, innerHeight - height - 8))}px`;
}

function hideTip() {
  document.getElementById('tip').hidden = true;
}
