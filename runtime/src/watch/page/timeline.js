// One step of the pipeline on a canvas: one row per actor, with the simulator's prediction above the measurement. Only
// visible rows are drawn.

import { at, colour, duration, key, make, setText, share } from './format.js';

const ROW = 26;
const HEIGHT_MAX = 478;
const CATEGORIES = ['forward', 'backward', 'update', 'communication', 'host'];
const CAUSES = ['a piece of', 'a slot of', 'the host', 'itself'];

let model = null;
// The selected step. If it is null, the page shows the newest step.
let selected = null;
let actors = [];

export function showPlan(shown) {
  model = shown;
  selected = null;
  actors = model.plan.actors.map((actor, index) => ({ ...actor, index })).filter((actor) => actor.is_here);
  // The actors in the order of their devices, with each device's compute actor first.
  actors.sort((a, b) => a.device - b.device || b.is_compute - a.is_compute || a.index - b.index);
  at('legend').replaceChildren(...CATEGORIES.map((name) => key(name, name)));
  at('rows').replaceChildren(...actors.map((actor, row) => {
    const [item, button] = [make('li'), make('button')];
    button.type = 'button';
    button.append(make('span', '', actor.name));
    button.addEventListener('focus', () => describe(row));
    button.addEventListener('click', () => describe(row));
    item.append(button);
    return item;
  }));
  setText('row-detail', '');
}

function stepShown() {
  const complete = model.completeSteps();
  return selected != null && complete.includes(selected) ? selected : complete[complete.length - 1];
}

export function move(key) {
  if (!model) return false;
  const complete = model.completeSteps();
  const now = complete.indexOf(stepShown());
  if (now < 0) return false;
  const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: complete.length - 1 }[key];
  if (to === undefined) return false;
  const index = Math.min(Math.max(to, 0), complete.length - 1);
  selected = index === complete.length - 1 ? null : complete[index];
  show();
  return true;
}

// Describes the firings of the row's actor in the shown step.
function describe(row) {
  const { index, name, actions } = actors[row];
  const fired = (model.steps.get(stepShown()) ?? []).filter((firing) => firing.actor === index);
  const parts = actions.map((action, i) => {
    const own = fired.filter((firing) => firing.action === i);
    return `${action.name}: ${own.length} in ${duration(own.reduce((sum, firing) => sum + firing.took, 0) / 1e6)}`;
  });
  const last = fired[fired.length - 1];
  const register = last && last.cause < 2 ? ` ${model.plan.registers[last.register].name}` : '';
  setText('row-detail', `${name}: ${parts.join(', ')}${last ? `; the last firing waited for ${CAUSES[last.cause]}${register}` : ''}`);
}

export function show() {
  if (!model?.event) return;
  const step = stepShown();
  setText('timeline-step', step === undefined ? 'none complete yet' : `${model.stepOf(step)}${selected == null ? '' : ' (End: newest)'}`);
  setText('bubble', share(model.event.bubble));
  setText('bubble-predicted', share(model.prediction?.bubble));
  [at('bubble').dataset.share, at('bubble-predicted').dataset.share] = [model.event.bubble, model.prediction?.bubble];
  paint(step);
}

// Measured and predicted bars: row, category, from and to in microseconds since the step's first firing.
function bars(step) {
  const rows = new Map(actors.map((actor, row) => [actor.index, row]));
  const bar = (actor, action, from, took) => ({
    row: rows.get(actor), category: model.plan.actors[actor].actions[action].category, from, to: from + took,
  });
  const measured = (model.steps.get(step) ?? []).map((firing) => bar(firing.actor, firing.action, firing.from, firing.took));
  const flat = model.prediction?.firings ?? [];
  const predicted = [];
  for (let i = 0; i < flat.length; i += 5) predicted.push(bar(flat[i], flat[i + 1], flat[i + 3], flat[i + 4]));
  for (const all of [measured, predicted]) {
    const first = all.reduce((min, item) => Math.min(min, item.from), Infinity);
    for (const item of all) [item.from, item.to] = [item.from - first, item.to - first];
  }
  return { measured, predicted };
}

function paint(step) {
  const [box, canvas] = [at('timeline'), at('gantt')];
  const [width, height] = [box.clientWidth, Math.min(HEIGHT_MAX, actors.length * ROW)];
  if (width === 0) return;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  }
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const { measured, predicted } = bars(step);
  const longest = Math.max(1, ...[measured, predicted].map((all) => all.reduce((max, item) => Math.max(max, item.to), 0)));
  const left = width < 600 ? 100 : 180;
  const x = (us) => left + (us / longest) * (width - left - 8);
  const colours = Object.fromEntries(CATEGORIES.map((name) => [name, colour(name)]));
  context.fillStyle = colour('line');
  const first = Math.floor(box.scrollTop / ROW);
  for (let row = first; row <= first + height / ROW + 1; row += 1) context.fillRect(0, row * ROW - box.scrollTop, width, 1);
  const paintAll = (all, top, tall, alpha) => {
    context.globalAlpha = alpha;
    for (const { row, category, from, to } of all) {
      const y = row * ROW - box.scrollTop;
      if (y < -ROW || y > height) continue;
      context.fillStyle = colours[category];
      // A gap of half a pixel separates firings.
      context.fillRect(x(from), y + top, Math.max(0.75, x(to) - x(from) - 0.5), tall);
    }
    context.globalAlpha = 1;
  };
  paintAll(predicted, 4, 7, 0.5);
  paintAll(measured, 12, 11, 1);
  canvas.dataset.longestUs = longest;
}

export function listen() {
  const box = at('timeline');
  box.addEventListener('scroll', show);
  addEventListener('resize', show);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', show);
  box.addEventListener('keydown', (event) => {
    const rows = [...at('rows').querySelectorAll('button')];
    const row = rows.indexOf(document.activeElement);
    const next = { ArrowDown: row + 1, ArrowUp: row - 1 }[event.key];
    if (next !== undefined && rows[next]) rows[next].focus();
    else if (!move(event.key)) return;
    if (row >= 0 && next === undefined) describe(row);
    event.preventDefault();
  });
}
