// The page: header, figures, funnel, curves, browser.
function drawOverview() {
  document.getElementById('run-name').append(RUN.name, el('span', '', ' · scope_fast'));
  document.getElementById('facts').append(...RUN.facts.map(([label, value]) => el('div', '', el('dt', '', label), el('dd', '', value))));
  document.getElementById('tiles').append(...RUN.tiles.map(({ label, value, note }) =>
    el('div', 'tile', el('div', 'label', label), el('div', 'value', value), el('div', 'note', note))));
  document.getElementById('config').textContent = RUN.config;
  const { failed, selected, repaired, accepted, rejected, errors } = RUN.totals;
  const most = Math.max(failed, selected, 1); // sft has every group's worst rollout repaired, failed or not
  const notes = { failed: 'rollouts without a reward above 0', selected: 'chosen for repair', repaired: `${errors} teacher errors`,
    accepted: `right after repair; ${rejected} rejected` };
  const bars = Object.entries({ failed, selected, repaired, accepted }).map(([name, count], i) => {
    const fill = el('div', 'fill');
    fill.style.width = `calc((100% - 265px) * ${count / most})`;
    fill.style.background = `var(--c${i + 1})`;
    fill.hidden = !count; // else its least width would show
    return el('div', 'bar', el('span', '', name), el('div', 'track', fill, el('b', '', count.toLocaleString('en')), notes[name]));
  });
  document.getElementById('funnel').append(...bars);
}

function drawCurves() {
  const onStep = (step) => {
    if (!RUN.index.some((entry) => entry[STEP] === step)) return;
    filter({ step: String(step) });
    document.getElementById('rollouts').scrollIntoView({ behavior: 'smooth' });
  };
  for (const panel of RUN.panels.main) addChart(panel, document.getElementById('charts'), onStep);
  const more = document.getElementById('more');
  more.hidden = !RUN.panels.more.length;
  more.querySelector('summary').textContent = `${RUN.panels.more.length} more metrics`;
  for (const panel of RUN.panels.more) addChart(panel, more.querySelector('.charts'), onStep);
  const smooth = document.getElementById('smooth');
  smooth.checked = RUN.steps.length > 30;
  smooth.addEventListener('change', drawAll);
  more.addEventListener('toggle', drawAll);
  let width = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) drawAll();
    width = document.body.clientWidth;
  }).observe(document.body);
  drawAll();
}

drawOverview();
drawCurves();
startBrowser();
