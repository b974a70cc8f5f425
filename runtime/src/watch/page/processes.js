// The processes of a session: their devices, their pages, and the time of their last heartbeats.

import { at, duration, make } from './format.js';

const SILENT_US_MAX = 3e6;

let heartbeatCells = new Map();

const devices = ([first, count]) => (count === 1 ? `${first}` : `${first} to ${first + count - 1}`);

// The session knows the hosts of the processes to which it connects.
const machineOf = (peer) => (peer.is_on_this_node ? 'the same machine' : peer.host ?? 'another machine');

// The page of another process. If the job runs `gpt --listen`, this page's port determines the port of the other page.
function pageOf(plan, peer) {
  const port = Number(location.port || 80) + peer.process - plan.process;
  if (!peer.is_on_this_node) return `${machineOf(peer)}, port ${port}`;
  const link = make('a', '', `port ${port}`);
  link.href = `http://${location.hostname}:${port}/`;
  return link;
}

export function showPlan(plan) {
  at('processes-section').hidden = plan.peers.length === 0;
  const own = { process: plan.process, devices: plan.devices };
  const all = [own, ...plan.peers].sort((a, b) => a.process - b.process);
  heartbeatCells = new Map();
  at('processes').tBodies[0].replaceChildren(...all.map((process) => {
    const [row, page, last] = [make('tr'), make('td'), make('td')];
    page.append(process === own ? 'this page' : pageOf(plan, process));
    last.textContent = process === own ? '' : '-';
    if (process !== own) heartbeatCells.set(process.process, last);
    const pid = process.pid == null ? '' : `, process ${process.pid}`;
    const on = process === own ? '' : `${machineOf(process)}${pid}`;
    row.append(make('td', '', `${process.process}`), make('td', '', devices(process.devices)), make('td', '', on), page, last);
    return row;
  }));
}

export function showEvent(event) {
  for (const [process, us] of event.peers) {
    const cell = heartbeatCells.get(process);
    if (!cell) continue;
    cell.textContent = us == null ? 'ended' : `${duration(us / 1e6)} ago`;
    cell.className = us == null || us > SILENT_US_MAX ? 'bad' : '';
  }
}
