// Actors as boxes, with one column per device, and registers as edges between the boxes. Opening an edge shows the
// slots and pieces of its register.

import { draw, forget } from './charts.js';
import { at, bytes, make, setText } from './format.js';

const SVG = 'http://www.w3.org/2000/svg';
const [BOX_WIDTH, BOX_HEIGHT, COLUMN, LINE] = [190, 26, 300, 56];
// A picture with more edges would be unreadable. The picture of a larger plan shows only the largest and the blocked
// edges.
const EDGES_MAX = 400;

let model = null;
let edges = new Map();
let nodes = new Map();
let opened = null;
let shown = '';

function svg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// One edge per register and reading actor.
function allEdges(plan) {
  return plan.registers.flatMap((register, index) => {
    const readers = [...new Set(register.readers.map((reader) => reader.actor))];
    return readers.filter((actor) => actor !== register.producer).map((actor) => {
      const pieces = Math.max(...register.readers.filter((r) => r.actor === actor).map((r) => r.pieces_per_step));
      return { id: `${index}.${actor}`, index, from: register.producer, to: actor, bytes: pieces * register.slot_bytes };
    });
  });
}

export function showPlan(newModel) {
  model = newModel;
  shown = '';
  close();
  layout(new Set());
}

function layout(blocked) {
  const all = allEdges(model.plan).sort((a, b) => b.bytes - a.bytes);
  const kept = all.filter((edge, rank) => rank < EDGES_MAX || blocked.has(edge.id));
  const key = kept.map((edge) => edge.id).join();
  if (key === shown) return;
  shown = key;
  setText('graph-note', kept.length < all.length ? `The graph shows ${kept.length} of ${all.length} edges: the largest and the blocked ones.` : '');
  const used = new Set(kept.flatMap((edge) => [edge.from, edge.to]));
  const columns = new Map();
  const places = new Map();
  model.plan.actors.forEach((actor, index) => {
    if (kept.length < all.length && !used.has(index)) return;
    const line = columns.get(actor.device) ?? 0;
    columns.set(actor.device, line + 1);
    places.set(index, { device: actor.device, line });
  });
  const order = [...columns.keys()].sort((a, b) => a - b);
  for (const place of places.values()) [place.x, place.y] = [40 + order.indexOf(place.device) * COLUMN, 24 + place.line * LINE];
  const size = { width: 40 + order.length * COLUMN, height: 30 + Math.max(1, ...columns.values()) * LINE };
  const picture = svg('svg', { ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: 'group', 'aria-label': 'actors and registers' });
  const maxBytes = Math.max(1, ...kept.map((edge) => edge.bytes));
  edges = new Map(kept.map((edge) => [edge.id, drawEdge(edge, places, maxBytes)]));
  nodes = new Map([...places].map(([index, place]) => [index, drawNode(model.plan.actors[index], place)]));
  picture.append(...edges.values(), ...nodes.values());
  at('graph').replaceChildren(picture);
}

function drawNode(actor, { x, y }) {
  const node = svg('g', { class: 'node' });
  const box = svg('rect', { x, y, width: BOX_WIDTH, height: BOX_HEIGHT, rx: 4 });
  const label = svg('text', { x: x + 6, y: y + 17 });
  label.textContent = actor.name.length > 29 ? `${actor.name.slice(0, 28)}…` : actor.name;
  const title = svg('title', {});
  title.textContent = actor.name;
  node.append(box, label, title);
  return node;
}

// An edge runs from the producer's right side to the reader's left side. An edge within a column or to the left bends
// around the boxes.
function drawEdge(edge, places, maxBytes) {
  const [from, to] = [places.get(edge.from), places.get(edge.to)];
  const [y1, y2] = [from.y + BOX_HEIGHT / 2, to.y + BOX_HEIGHT / 2];
  const spread = (edge.index % 5) * 4;
  let path;
  if (from.x === to.x) {
    const side = from.x + BOX_WIDTH;
    path = `M${side} ${y1} C${side + 30 + spread} ${y1} ${side + 30 + spread} ${y2} ${side} ${y2}`;
  } else {
    const forward = from.x < to.x;
    const [x1, x2] = forward ? [from.x + BOX_WIDTH, to.x] : [from.x, to.x + BOX_WIDTH];
    const bend = (forward ? 1 : -1) * (40 + spread);
    path = `M${x1} ${y1} C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
  }
  const { name } = model.plan.registers[edge.index];
  const text = `${name}, ${bytes(edge.bytes)} per step, read by ${model.plan.actors[edge.to].name}`;
  const group = svg('g', { class: 'edge', tabindex: 0, role: 'button', 'aria-label': text, 'data-register': edge.index });
  const width = edge.bytes === 0 ? 1 : 1 + 7 * Math.sqrt(edge.bytes / maxBytes);
  const title = svg('title', {});
  title.textContent = text;
  group.append(svg('path', { d: path, 'stroke-width': width.toFixed(1) }), svg('path', { d: path, class: 'hit' }), title);
  group.addEventListener('click', () => open(edge.index));
  group.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    open(edge.index);
  });
  return group;
}

export function showEvent() {
  const { event } = model;
  const blocked = new Map(event.blocked.map(([register, reader, kind, us]) => [`${register}.${reader}`, { kind, us }]));
  layout(new Set(blocked.keys()));
  for (const [id, edge] of edges) edge.classList.toggle('blocked', blocked.has(id));
  for (const [index, node] of nodes) node.classList.toggle('busy', model.shares(index)[0] > 0.5);
  if (opened != null) fill();
}

function open(register) {
  opened = register;
  forget('register-slots');
  at('register').showModal();
  fill();
}

function close() {
  opened = null;
  at('register').close();
}

function fill() {
  const register = model.plan.registers[opened];
  const [held, published, ...released] = model.registers.get(opened) ?? [];
  setText('register-name', register.name);
  const facts = [
    ['written by', model.plan.actors[register.producer].name],
    ['slots', held === undefined ? `${register.slots}, in another process` : `${held} held of ${register.slots}`],
    ['slot size', bytes(register.slot_bytes)],
    ['pieces published', `${published ?? '-'}`],
    ...register.readers.map((reader, i) => [
      `released by ${model.plan.actors[reader.actor].name}`, `${released[i] ?? '-'} pieces, over ${reader.transport}`,
    ]),
    ...model.event.blocked.filter((edge) => edge[0] === opened).map(([, actor, kind, us]) => [
      'blocked', kind === 0
        ? `${model.plan.actors[actor].name} has waited ${(us / 1e6).toFixed(1)} s for a piece`
        : `its producer has waited ${(us / 1e6).toFixed(1)} s for ${model.plan.actors[actor].name} to release a slot`,
    ]),
  ];
  at('register-facts').replaceChildren(...facts.flatMap(([name, text]) => [make('dt', '', name), make('dd', '', text)]));
  const id = opened;
  draw('register-slots', 'slots held', model.slots.map((sample) => sample.at), model.slots.map((sample) => sample.held.get(id) ?? 0), 'communication', 'seconds');
}

export function listen() {
  at('register-close').addEventListener('click', close);
  at('register').addEventListener('close', () => (opened = null));
}
