// One bar per actor, which shows how the actor spent the last ten seconds.

import { at, key, make } from './format.js';

const PARTS = ['forward', 'communication', 'input', 'credit', 'host', 'own'];
const NAMES = ['computing', 'in collectives', 'waiting for input', 'waiting for a slot', 'waiting for the host', 'between firings'];

let rows = [];

export function showPlan(plan) {
  at('breakdown-legend').replaceChildren(...PARTS.map((part, i) => key(part, NAMES[i])));
  rows = plan.actors.flatMap((actor, index) => {
    if (!actor.is_here) return [];
    const row = make('tr');
    const [cell, bar, waits] = [make('td'), make('div', 'bar'), make('td', 'waits')];
    const parts = PARTS.map((part) => {
      const element = make('i');
      element.style.background = `var(--${part})`;
      return element;
    });
    bar.append(...parts);
    cell.append(bar);
    row.append(make('td', '', actor.name), cell, waits);
    return [{ index, row, bar, parts, waits }];
  });
  at('breakdown').tBodies[0].replaceChildren(...rows.map(({ row }) => row));
}

export function showEvent(model) {
  const waits = new Map(model.event.waits);
  for (const { index, bar, parts, waits: cell } of rows) {
    const shares = model.shares(index);
    parts.forEach((part, i) => (part.style.width = `${(shares[i] * 100).toFixed(1)}%`));
    bar.title = shares.map((part, i) => `${NAMES[i]} ${(part * 100).toFixed(1)} %`).join(', ');
    const text = waits.has(index) ? `waits for ${waits.get(index)}` : '';
    if (cell.textContent !== text) cell.textContent = text;
  }
}
