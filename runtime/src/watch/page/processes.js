// The processes of a session that runs in several: who hosts what, where its page is, when it was heard of. Imports `format`.

import { at, duration, make } from './format.js';

const SILENT_US_MAX = 3e6;

let heard = new Map();

const devices = ([first, count]) => (count === 1 ? `${first}` : `${first} to ${first + count - 1}`);

// Where `gpt --listen` lets a process listen, told from where this one does.
function place(plan, peer) {
  const port = Number(location.port || 80) + peer.process - plan.process;
  if (!peer.is_on_this_node) return `${peer.host}, port ${port}`;
  const link = make('a', '', `port ${port}`);
  link.href = `http://${location.hostname}:${port}/`;
  return link;
}

export function showPlan(plan) {
  at('processes-section').hidden = plan.peers.length === 0;
  const own = { process: plan.process, devices: plan.devices };
  const all = [own, ...plan.peers].sort((a, b) => a.process - b.process);
  heard = new Map();
  at('processes').tBodies[0].replaceChildren(...all.map((one) => {
    const [row, page, last] = [make('tr'), make('td'), make('td')];
    page.append(one === own ? 'this one' : place(plan, one));
    last.textContent = one === own ? '' : '-';
    if (one !== own) heard.set(one.process, last);
    const on = one === own ? '' : `${one.is_on_this_node ? 'the same machine' : one.host}, process ${one.pid}`;
    row.append(make('td', '', `${one.process}`), make('td', '', devices(one.devices)), make('td', '', on), page, last);
    return row;
  }));
}

export function showEvent(event) {
  for (const [process, us] of event.peers) {
    const cell = heard.get(process);
    if (!cell) continue;
    cell.textContent = us == null ? 'has ended' : `${duration(us / 1e6)} ago`;
    cell.className = us == null || us > SILENT_US_MAX ? 'bad' : '';
  }
}
