// The rollout browser: filters, a list that only draws what is in sight, deep links, keys.
const ROW = 54; // pixels, as in report.css
const [STEP, GROUP, SAMPLE, TASK, STATE, SCORE, GIST] = [0, 1, 2, 3, 4, 5, 6];
const LINES = document.getElementById('rollout-data').textContent.split('\n'); // parsed one by one, when looked at
const browser = { status: '', step: '', task: '', shown: [], current: -1 };
const list = document.getElementById('list');

function idOf(i) {
  const entry = RUN.index[i];
  return `${entry[STEP]}-${entry[GROUP]}-${entry[SAMPLE]}`;
}

function matches(entry, except) {
  return (except === 'status' || !browser.status || entry[STATE] === browser.status)
    && (!browser.step || String(entry[STEP]) === browser.step) && (!browser.task || entry[TASK] === browser.task);
}

function applyFilters() {
  browser.shown = RUN.index.flatMap((entry, i) => (matches(entry) ? [i] : []));
  if (!browser.shown.includes(browser.current)) browser.current = browser.shown[0] ?? -1;
  drawChips();
  document.getElementById('filter-step').value = browser.step;
  document.getElementById('filter-task').value = browser.task;
  const all = RUN.index.length;
  const cut = all < RUN.total ? ` of the ${RUN.total.toLocaleString('en')} in rollouts.jsonl` : '';
  const found = browser.shown.length < all ? `${browser.shown.length.toLocaleString('en')} of ` : '';
  document.getElementById('rollout-count').textContent = RUN.total
    ? `${found}${all.toLocaleString('en')} rollouts${cut}` : 'This run has no rollouts.jsonl.';
  document.getElementById('rows').style.height = `${browser.shown.length * ROW}px`;
  list.scrollTop = browser.shown.indexOf(browser.current) * ROW - list.clientHeight / 2;
  open(browser.current);
}

function drawChips() {
  const counts = {};
  for (const entry of RUN.index) if (matches(entry, 'status')) counts[entry[STATE]] = (counts[entry[STATE]] ?? 0) + 1;
  const present = Object.keys(STATUS).filter((name) => RUN.index.some((entry) => entry[STATE] === name));
  const chip = (name, text, count) => {
    const button = el('button', '', `${text} ${count.toLocaleString('en')}`);
    button.dataset.status = name;
    button.setAttribute('aria-pressed', browser.status === name);
    button.addEventListener('click', () => filter({ status: name }));
    return button;
  };
  const sum = Object.values(counts).reduce((a, b) => a + b, 0);
  document.getElementById('statuses').replaceChildren(chip('', 'all', sum),
    ...present.map((name) => chip(name, `${STATUS[name][0]} ${STATUS[name][1]}`, counts[name] ?? 0)));
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(browser.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  const rows = [];
  for (let at = first; at < last; at++) rows.push(row(browser.shown[at], at));
  document.getElementById('rows').replaceChildren(...rows);
}

function row(i, at) {
  const entry = RUN.index[i];
  const score = entry[SCORE] === null ? null : el('span', 'score', `S ${entry[SCORE].toFixed(2)}`);
  const node = el('div', 'item', el('span', `mark ${entry[STATE]}`, STATUS[entry[STATE]][0]),
    el('span', 'where', `step ${entry[STEP]} · ${entry[TASK]} · ${entry[GROUP]}/${entry[SAMPLE]}`), score, el('span', 'gist', entry[GIST]));
  node.style.top = `${at * ROW}px`;
  node.title = STATUS[entry[STATE]][1];
  node.dataset.id = idOf(i);
  node.setAttribute('role', 'option');
  node.setAttribute('aria-selected', i === browser.current);
  node.addEventListener('click', () => { open(i); writeHash(); });
  return node;
}

function open(i) {
  browser.current = i;
  if (i < 0) {
    document.getElementById('detail').replaceChildren(el('p', 'hint', 'No rollout matches.'));
    return drawRows();
  }
  const top = browser.shown.indexOf(i) * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawRows();
  const [step, group] = RUN.index[i];
  const siblings = RUN.index.flatMap((entry, j) => (entry[STEP] === step && entry[GROUP] === group
    ? [{ label: entry[SAMPLE], status: entry[STATE], current: i === j, open: () => { reveal(j); writeHash(); } }] : []));
  showDetail(JSON.parse(LINES[i]), RUN.index[i][STATE], siblings);
}

// Opens a rollout whatever the filters say, by dropping those that hide it.
function reveal(i) {
  if (!matches(RUN.index[i])) Object.assign(browser, { status: '', step: '', task: '' });
  browser.current = i;
  applyFilters();
}

function filter(change) {
  Object.assign(browser, change);
  applyFilters();
  writeHash();
}

function move(by) {
  const at = browser.shown.indexOf(browser.current) + by;
  if (at < 0 || at >= browser.shown.length) return;
  open(browser.shown[at]);
  writeHash();
}

function writeHash() {
  const hash = new URLSearchParams();
  for (const key of ['status', 'step', 'task']) if (browser[key]) hash.set(key, browser[key]);
  if (browser.current >= 0) hash.set('rollout', idOf(browser.current));
  history.replaceState(null, '', `#${hash}`);
}

// #status=accepted&step=3&rollout=3-0-2: true where the hash asked for something of the browser.
function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  if (!['status', 'step', 'task', 'rollout'].some((key) => hash.has(key))) return false;
  for (const key of ['status', 'step', 'task']) browser[key] = hash.get(key) ?? '';
  const wanted = RUN.index.findIndex((_, i) => idOf(i) === hash.get('rollout'));
  if (wanted >= 0) reveal(wanted);
  else applyFilters();
  return true;
}

function fillSelect(id, key, column, label) {
  const select = document.getElementById(id);
  select.append(new Option(label, ''));
  for (const value of new Set(RUN.index.map((entry) => entry[column]))) select.append(new Option(value, value));
  select.addEventListener('change', () => filter({ [key]: select.value }));
}

function startBrowser() {
  fillSelect('filter-step', 'step', STEP, 'all');
  fillSelect('filter-task', 'task', TASK, 'all');
  document.getElementById('colour').addEventListener('change', paint);
  list.addEventListener('scroll', drawRows);
  const detail = document.getElementById('detail');
  detail.addEventListener('pointerover', tokenTip);
  detail.addEventListener('pointerleave', hideTip);
  document.addEventListener('keydown', (event) => {
    if (event.metaKey || event.ctrlKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
    const by = { j: 1, k: -1, ...(document.activeElement === list ? { ArrowDown: 1, ArrowUp: -1 } : {}) }[event.key];
    if (!by) return;
    event.preventDefault();
    move(by);
  });
  window.addEventListener('hashchange', readHash);
  if (readHash()) return document.getElementById('rollouts').scrollIntoView();
  browser.current = RUN.index.findIndex((entry) => entry[STATE] === 'accepted'); // what SCOPE is about, first
  applyFilters();
}
