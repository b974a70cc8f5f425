// Incidents in order of time, and memory of devices.

import { at, bytes, duration, make, share } from './format.js';

export function showIncidents(event) {
  const items = event.incidents.map(([us, kind, text]) => {
    const item = make('li');
    item.append(make('b', 'bad', kind), ` after ${duration(us / 1e6)}: ${text}`);
    return item;
  });
  at('incidents').replaceChildren(...items);
  at('no-incidents').hidden = items.length > 0;
}

export function showMemory(event) {
  const rows = event.memory.map(([device, planned, peak]) => {
    const row = make('tr');
    row.append(make('td', '', `${device}`), make('td', '', bytes(peak)), make('td', '', bytes(planned)));
    const cell = make('td');
    const bar = make('div', 'bar');
    const used = make('i');
    used.style.width = share(planned > 0 ? Math.min(1, peak / planned) : 0).replace(' ', '');
    used.style.background = 'var(--forward)';
    bar.append(used);
    cell.append(bar);
    row.append(cell);
    return row;
  });
  at('memory').tBodies[0].replaceChildren(...rows);
}
