// One rollout: prompt, steps coloured by probability, first error, selection score, repaired suffix beside the failed one.
const TAU = RUN.tau ?? 0.5;
const STATUS = {
  accepted: ['✚', 'repaired, accepted'], rejected: ['⊘', 'repaired, rejected'], error: ['!', 'teacher error'],
  failed: ['✕', 'failed'], passed: ['✓', 'passed'], unverified: ['?', 'not verified'],
};
const SEGMENTS = ['not trained', 'policy gradient', 'likelihood'];

// Orange below one half, blue above, nothing at one half: two colours everybody can tell apart.
function diverging(value, centre, span) {
  if (value === null || value === undefined) return 'transparent';
  const amount = Math.min(1, Math.abs(value - centre) / span);
  const colour = value >= centre ? 'var(--right)' : 'var(--wrong)';
  return `color-mix(in srgb, ${colour} calc(${amount.toFixed(3)} * var(--strength)), transparent)`;
}

const COLOURS = {
  prm: { ends: ['0', '0.5', '1'], gradient: [0, 0.5, 1].map((p) => diverging(p, 0.5, 0.5)), token: () => 'transparent' },
  logprob: { ends: ['−3 nats', '', '0'], gradient: [-3, 0].map((v) => diverging(v, 0, 3)),
    token: (info) => diverging(info.logprob, 0, 3) },
  advantage: { ends: ['−1', '0', '+1'], gradient: [-1, 0, 1].map((v) => diverging(v, 0, 1)),
    token: (info) => (info.segment === 1 ? diverging(info.advantage, 0, 1) : 'transparent') },
  loss_weight: { ends: ['0', '', 'largest'], gradient: [0, 1].map((v) => diverging(v, 0, 1)),
    token: (info, most) => (info.segment ? diverging(info.weight, 0, most || 1) : 'transparent') },
};

function colourMode() {
  return document.getElementById('colour').value;
}

function drawLegend() {
  const { ends, gradient } = COLOURS[colourMode()];
  const bar = el('i');
  bar.style.background = `linear-gradient(90deg, ${gradient.join(', ')})`;
  document.getElementById('legend').replaceChildren(el('span', '', ends[0]), bar, el('span', '', ends.at(-1)),
    el('span', '', colourMode() === 'prm' ? `a step stands at ${TAU} or more` : ''));
}

function expand(runs) {
  return runs.flatMap(([value, count]) => Array(count).fill(value));
}

// What the learner did with each token: `at(i)` for token i of the trained sequence.
function trainedStreams(rollout) {
  if (!rollout.trained) return { at: () => ({}), most: 0 };
  const [segment, advantage, weight] = ['segment', 'advantage', 'loss_weight'].map((key) => expand(rollout.trained[key]));
  return {
    at: (i) => (i < segment.length ? { segment: segment[i], advantage: advantage[i], weight: weight[i] } : {}),
    most: weight.reduce((a, b) => Math.max(a, b), 0),
  };
}

function tokenSpans(tokens, infos) {
  return tokens.map((text, i) => {
    const span = el('span', 'tok' + (/^\s*\n\s*$/.test(text) ? ' newline' : '') + (/^<\|.*\|>$|^<\/s>$/.test(text) ? ' special' : ''), text);
    span.info = { text, ...infos[i] };
    return span;
  });
}

function tokenTip(event) {
  const info = event.target.info;
  if (!info) return hideTip();
  const rows = [el('div', 'head', JSON.stringify(info.text))];
  const add = (label, value) => rows.push(tipRow(label, value));
  if (info.logprob !== undefined && info.logprob !== null) {
    add('log-probability', info.logprob.toFixed(4));
    add('probability', format(Math.exp(info.logprob), 'share'));
  }
  if (info.step !== undefined) add(`step ${info.step + 1}`, info.prob === null ? 'not scored' : `p = ${info.prob.toFixed(3)}`);
  add('segment', info.segment === undefined ? info.why ?? SEGMENTS[0] : SEGMENTS[info.segment]);
  if (info.segment === 1) add('advantage', signed(info.advantage));
  if (info.segment) add(info.segment === 2 ? 'NLL weight' : 'loss weight', format(info.weight, ''));
  const box = event.target.getClientRects()[0];
  showTip(rows, box.right, box.bottom + 6);
}

function signed(value) {
  return (value > 0 ? '+' : '') + format(value, '');
}

function stepBlock(rollout, index, infos) {
  const [start, end] = rollout.steps[index];
  const prob = rollout.step_probs?.[index] ?? null;
  const gutter = rollout.step_probs
    ? el('div', 'gutter', `${index + 1} · `, el('b', '', prob === null ? '–' : prob.toFixed(2))) : el('div', 'gutter', `${index + 1}`);
  gutter.title = prob === null ? 'not scored by the reward model' : `step ${index + 1}: probability ${prob} of being right`;
  const block = el('div', 'step', gutter, el('div', 'tokens', ...tokenSpans(rollout.tokens.slice(start, end), infos.slice(start, end))));
  block.dataset.step = index;
  block.prob = prob;
  if (index === rollout.first_error) {
    block.classList.add('first-error');
    block.prepend(el('div', 'flag', '✕ first error'));
  }
  return block;
}

// Tokens [from, to) of the response: its steps as blocks, and what belongs to no step (a trailing end token) after them.
function responsePart(rollout, from, to, infos) {
  if (!rollout.steps) return [el('div', 'tokens', ...tokenSpans(rollout.tokens.slice(from, to), infos.slice(from, to)))];
  const blocks = [];
  let at = from;
  rollout.steps.forEach(([start, end], index) => {
    if (start < from || end > to) return;
    blocks.push(stepBlock(rollout, index, infos));
    at = end;
  });
  if (at < to) {
    const rest = el('div', 'tokens', ...tokenSpans(rollout.tokens.slice(at, to), infos.slice(at, to)));
    blocks.push(el('div', 'step', el('div', 'gutter', ''), rest));
  }
  return blocks;
}

function responseInfos(rollout, streams) {
  const replaced = rollout.repair?.status === 'accepted' ? rollout.repair.kept_tokens : Infinity;
  const other = rollout.trained?.tokens && replaced === Infinity;
  const infos = rollout.tokens.map((_, i) => ({
    logprob: rollout.logprobs[i],
    ...(i < replaced && !other ? streams.at(i) : { why: i < replaced ? 'not trained' : 'not trained: replaced by the repair' }),
  }));
  rollout.steps?.forEach(([start, end], step) => {
    for (let i = start; i < end; i++) Object.assign(infos[i], { step, prob: rollout.step_probs?.[step] ?? null });
  });
  return infos;
}

function part(className, title, note, nodes) {
  return el('div', className, el('div', 'part-head', el('h3', '', title), el('span', 'hint', note)), ...nodes);
}

// What tokens [from, to) were trained with, in words; a stream that varies shows its range.
function treatment(streams, from, to) {
  const infos = [];
  for (let i = from; i < to; i++) if (streams.at(i).segment) infos.push(streams.at(i));
  if (!infos.length) return SEGMENTS[0];
  const range = (values, show) => {
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    return low === high ? show(low) : `${show(low)} to ${show(high)}`;
  };
  if (infos[0].segment === 1) return `policy gradient, advantage ${range(infos.map((info) => info.advantage), signed)}`;
  return `likelihood, NLL weight ${range(infos.map((info) => info.weight), (value) => format(value, ''))}`;
}

function repairedParts(rollout, infos, streams) {
  const { kept_tokens: kept, kept_steps: steps, status, reason, reward } = rollout.repair;
  const accepted = status === 'accepted';
  const tokens = accepted && rollout.trained?.tokens ? rollout.trained.tokens.slice(kept) : rollout.repair.suffix_tokens;
  const suffix = tokens.map((_, i) => (accepted ? streams.at(kept + i) : { why: 'not trained: the repair was not accepted' }));
  const verdict = reward === null ? STATUS[status][1] : `${STATUS[status][1]} (reward ${reward})`;
  const heading = accepted ? `${verdict} · ${treatment(streams, kept, kept + tokens.length)}` : `${verdict}: ${reason}`;
  const refused = rollout.repair.suffix ? el('div', 'tokens', rollout.repair.suffix) : el('p', 'hint', 'The teacher gave no suffix.');
  const failedNote = accepted ? 'the student’s, replaced' : 'the student’s, stays';
  const result = [];
  if (kept) {
    const note = `${steps} ${steps === 1 ? 'step' : 'steps'}, ${kept} tokens · ${treatment(streams, 0, kept)}`;
    result.push(part('prefix', 'Kept prefix', note, responsePart(rollout, 0, kept, infos)));
  }
  result.push(el('div', 'sides',
    part('side failed-suffix', kept ? 'Failed suffix' : 'Failed response', failedNote,
      responsePart(rollout, kept, rollout.tokens.length, infos)),
    part(`side repaired${accepted ? '' : ' dropped'}`, kept ? 'Repaired suffix' : 'Teacher’s response', heading,
      [tokens.length ? el('div', 'tokens', ...tokenSpans(tokens, suffix)) : refused])));
  return result;
}

function plainParts(rollout, infos, streams) {
  const other = rollout.trained?.tokens;
  const note = [`${rollout.tokens.length} tokens`, other ? 'not trained' : treatment(streams, 0, rollout.tokens.length)].join(' · ');
  const empty = [el('p', 'hint', 'Empty completion.')];
  const result = [part('whole', 'Response', note, rollout.tokens.length ? responsePart(rollout, 0, rollout.tokens.length, infos) : empty)];
  if (other) {
    const spans = tokenSpans(other, other.map((_, i) => streams.at(i)));
    result.push(part('side repaired', 'Trained instead', treatment(streams, 0, other.length), [el('div', 'tokens', ...spans)]));
  }
  return result;
}

function scoreLine({ score, alpha, beta, r_step, r_token }) {
  const term = (name, value, meaning) => {
    const node = el('div', 'term', el('span', 'label', name), el('b', '', value === null ? '–' : value.toFixed(3)));
    node.title = meaning;
    node.dataset.term = name;
    return node;
  };
  const operator = (sign) => el('span', 'operator', sign);
  return el('div', 'score-line', term('score', score, 'failed rollouts of a group are repaired in the order of this score'),
    operator('='), term('alpha', alpha, 'penalty of an unusual number of steps'),
    operator('×'), term('beta', beta, 'penalty of an unusual number of tokens'),
    operator('× ('), term('r_step', r_step, 'steps before the first error over all steps'),
    operator('+'), term('r_token', r_token, 'tokens before the first error over all tokens'), operator(')'));
}

function badges(rollout, status) {
  const badge = (text, extra = '', title = '') => Object.assign(el('span', `badge ${extra}`, text), { title: title ?? '' });
  const after = status === 'accepted' ? ` → ${rollout.repair.reward}` : '';
  const reward = rollout.reward === null ? 'no reward' : `reward ${rollout.reward}${after}`;
  return el('div', 'badges', badge(`${STATUS[status][0]} ${STATUS[status][1]}`, `state ${status}`),
    badge(`step ${rollout.step}`), badge(rollout.task), badge(`prompt ${rollout.group} · sample ${rollout.sample}`), badge(reward),
    rollout.verdict === 'ok' ? null : badge(`verifier: ${rollout.verdict}`, 'alert', rollout.verdict_reason),
    rollout.finish_reason === 'length' ? badge('truncated', 'alert') : null, badge(`weights ${rollout.weight_version}`));
}

function firstErrorNote(rollout) {
  if (rollout.first_error === null || !rollout.steps?.length) return null;
  if (rollout.first_error < rollout.steps.length) return null;
  return el('p', 'hint', 'No step is marked wrong, but the answer is.');
}

// siblings: [{label, status, current, open}], the other samples of the same prompt that the page holds.
function showDetail(rollout, status, siblings) {
  const streams = trainedStreams(rollout), infos = responseInfos(rollout, streams);
  const buttons = siblings.map(({ label, status: state, current, open }) => {
    const button = el('button', state, `${STATUS[state][0]} ${label}`);
    button.setAttribute('aria-pressed', current);
    button.addEventListener('click', open);
    return button;
  });
  const asked = el('div', 'asked', el('div', '', el('div', 'label', 'Prompt'), el('div', 'text', rollout.prompt)),
    el('div', '', el('div', 'label', 'Right answer'), el('div', 'text gold', rollout.answer)));
  const parts = rollout.repair ? repairedParts(rollout, infos, streams) : plainParts(rollout, infos, streams);
  const detail = document.getElementById('detail');
  detail.replaceChildren(...[badges(rollout, status),
    siblings.length > 1 ? el('div', 'siblings', 'Same prompt:', ...buttons) : null, asked,
    rollout.selection ? scoreLine(rollout.selection) : null, firstErrorNote(rollout), ...parts].filter(Boolean));
  detail.most = streams.most;
  detail.scrollTop = 0;
  paint();
}

function paint() {
  const mode = colourMode(), detail = document.getElementById('detail');
  for (const block of detail.querySelectorAll('.step')) {
    block.style.background = mode === 'prm' ? diverging(block.prob, 0.5, 0.5) : 'transparent';
  }
  for (const span of detail.querySelectorAll('.tok')) span.style.background = COLOURS[mode].token(span.info, detail.most);
  drawLegend();
}
