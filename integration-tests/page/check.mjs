// Checks the live page in a real headless Chromium, while real trainings run.
//
//     node check.mjs PROGRAMS MODULES [PICTURES]
//
// PROGRAMS is the folder with `gpt`, `shardflow` and `watched`. MODULES is the folder where playwright-core is
// installed. If PICTURES is given, the script saves screenshots of the page in this folder. The environment variable
// CHROMIUM is the path of the browser. The exit code is 0, or 1 if there are errors; the script prints them.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [programs, modules, pictures] = process.argv.slice(2).map((name) => path.resolve(name));
const { chromium } = createRequire(pathToFileURL(`${modules}/`))('playwright-core');
// Deadline of each wait.
const DEADLINE_MS = 60_000;
const POLL_MS = 20;
const BYTES_PER_SECOND_MAX = 1_000_000;
const BUBBLE_DIFFERENCE_MAX = 0.05;
const SHARE_DIFFERENCE_MAX = 0.15;

const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

// Waits until `condition` returns a true value, and returns this value.
async function until(event, condition) {
  const deadline = performance.now() + DEADLINE_MS;
  let last = '';
  while (performance.now() < deadline) {
    try {
      const found = await condition();
      if (found) return found;
    } catch (error) {
      last = `: ${error.message}`;
    }
    await pause(POLL_MS);
  }
  throw new Error(`timeout of ${DEADLINE_MS / 1000} s while waiting for ${event}${last}`);
}

async function freePort() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

const running = new Set();

// Starts a program, and waits until it answers on `port`.
async function start(program, args, port, environment = {}) {
  const child = spawn(path.join(programs, program), args, { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, ...environment } });
  running.add(child);
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => (output = (output + data).slice(-4000)));
  child.on('exit', () => running.delete(child));
  await until(`an answer from ${program}`, async () => {
    if (child.exitCode !== null) throw new Error(`${program} ended: ${output}`);
    return (await fetch(`http://127.0.0.1:${port}/healthz`)).ok;
  });
  return { child };
}

async function end({ child }, signal = 'SIGKILL') {
  child.kill(signal);
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
}

const watched = (port, mesh, schedule, microBatches, ms) =>
  start('watched', [`127.0.0.1:${port}`, mesh, schedule, `${microBatches}`, `${ms}`], port);

const gptArgs = (port, ...args) => [`--listen=127.0.0.1:${port}`, '--sample=0', '--steps=1000000', ...args];
const SMALL = ['--mesh=stage=2', '--micro-batches=4', '--layers=2', '--width=32', '--heads=2', '--context=32', '--batch=8', '--clip=1'];

let browser;

// Opens the page on this port. `wrong` collects errors and warnings. With `mayBreak`, ignores broken connections.
async function openPage(port, options = {}, mayBreak = false) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  const origin = `http://127.0.0.1:${port}`;
  page.on('request', (request) => {
    if (new URL(request.url()).origin !== origin) wrong.push(`the page loads ${request.url()} from another origin`);
  });
  const isBroken = (text) => mayBreak && /net::ERR_|Failed to load resource/.test(text);
  page.on('pageerror', (error) => wrong.push(`${error}`));
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type()) && !isBroken(message.text())) wrong.push(message.text());
  });
  // A label that begins to the left of its canvas is clipped.
  await page.exposeFunction('reportClipped', (label) => wrong.push(`the label ${label} is clipped`));
  await page.addInitScript(() => {
    const proto = CanvasRenderingContext2D.prototype;
    const fillText = proto.fillText;
    proto.fillText = function draw(label, x, y, ...rest) {
      const width = this.measureText(label).width;
      const left = { right: width, end: width, center: width / 2 }[this.textAlign] ?? 0;
      const { a, b, c, e } = this.getTransform();
      if (a * (x - left) + c * y + e < 0 && b === 0) window.reportClipped(`${label}`);
      return fillText.call(this, label, x, y, ...rest);
    };
  });
  await page.goto(`${origin}/`);
  return { page, wrong, close: () => context.close() };
}

const text = (page, id) => page.locator(`#${id}`).textContent();

async function metrics(port) {
  const lines = (await (await fetch(`http://127.0.0.1:${port}/metrics`)).text()).split('\n');
  return new Map(lines.filter((line) => line && !line.startsWith('#')).map((line) => {
    const at = line.lastIndexOf(' ');
    return [line.slice(0, at), Number(line.slice(at + 1))];
  }));
}

// Checks that the page shows the values that `/metrics` and `/plan` have at the same step.
async function matchesMetrics() {
  const port = await freePort();
  const training = await start('gpt', gptArgs(port, ...SMALL), port, { SHARDFLOW_RESTART_CAUSES: '137,75' });
  const { page, wrong, close } = await openPage(port);
  const byStep = new Map();
  const shown = await until('a step in both the page and /metrics', async () => {
    const got = await metrics(port);
    byStep.set(got.get('shardflow_steps_total'), got);
    const values = await page.evaluate(() => ({
      ...Object.fromEntries(['step', 'loss', 'norm', 'tokens'].map((id) => [id, document.getElementById(id).textContent])),
      charts: ['loss', 'norm'].map((id) => document.getElementById(`chart-${id}`).getAttribute('aria-label')),
    }));
    values.got = byStep.get(Number(values.step.split(' ')[0]));
    return values.got && values.loss !== '-' && values;
  });
  const busyBefore = [performance.now(), shown.got];
  assert.equal(shown.loss, shown.got.get('shardflow_loss').toFixed(4));
  assert.equal(shown.norm, shown.got.get('shardflow_gradient_norm').toFixed(4));
  assert.equal(Number(shown.tokens), shown.got.get('shardflow_tokens_total'));
  assert.match(shown.step, /^\d+ of 1000000$/);
  assert.match(await text(page, 'what'), / on cpu, 4 micro-batches, 1f1b$/);
  assert.deepEqual(shown.charts.map((label) => Number(label.split('now ')[1]).toFixed(4)), [shown.loss, shown.norm], 'curves end at the current values');
  assert.equal(await text(page, 'health'), 'running');
  const memory = await page.locator('#memory tbody tr').allInnerTexts();
  const kib = (device, kind) => `${(shown.got.get(`shardflow_memory_bytes{device="${device}",kind="${kind}"}`) / 1024).toFixed(1)} KiB`;
  assert.deepEqual(memory.map((row) => row.split('\t').slice(0, 3)), [0, 1].map((device) => [`${device}`, kib(device, 'peak'), kib(device, 'planned')]));
  const plan = await (await fetch(`http://127.0.0.1:${port}/plan`)).json();
  assert.ok(plan.actors.length >= 4);
  const rows = await page.locator('#rows button').allTextContents();
  assert.deepEqual([...rows].sort(), plan.actors.map((actor) => actor.name).sort());
  assert.equal(await page.locator('#breakdown tbody tr').count(), plan.actors.length);
  assert.equal(await page.locator('#charts .uplot').count(), 4, 'four charts');
  assert.ok(!(await page.locator('#processes-section').isVisible()), 'a single process has no list of processes');
  await restarts(page, shown.got);
  await widths(page, plan);
  await until('a prediction', async () => (await text(page, 'bubble-predicted')) !== '-');
  await until('a complete step', async () => /^\d+/.test(await text(page, 'timeline-step')));
  await rareValues(page);
  assert.ok(/ min | h | s$/.test(await text(page, 'eta')), 'time left');
  await colours(page);
  await busy(page, port, busyBefore);
  await keyboard(page, port);
  await fits(port);
  await follows(page);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Checks what no short run produces: missing values, NaN, and passes that repeat a step or return to an earlier one.
async function rareValues(page) {
  const seen = await page.evaluate(async () => {
    const [{ number }, { Model }] = [await import('./page/format.js'), await import('./page/model.js')];
    const stepOf = (pass) => Model.prototype.stepOf.call({ event: { passes: [[0, 60], [2, 61], [5, 60]] } }, pass);
    return { numbers: [null, 'NaN', 1.25].map((value) => number(value, 1)), steps: [0, 1, 2, 3, 4, 5, 6].map(stepOf) };
  });
  assert.deepEqual(seen, { numbers: ['-', 'NaN', '1.3'], steps: [61, 62, 62, 63, 64, 61, 62] });
}

// Checks that the list of incidents shows the earlier attempts, with the oldest attempt first.
async function restarts(page, got) {
  const incidents = await page.locator('#incidents li').allTextContents();
  assert.match(incidents[0], /^restart after .*: attempt 0 of the job ended with code 137: SIGKILL$/);
  assert.match(incidents[1], /^restart after .*: attempt 1 of the job ended with code 75: retry$/);
  const counted = ['137', '75'].map((cause) => got.get(`shardflow_restarts_total{cause="${cause}"}`));
  assert.deepEqual(counted, [1, 1]);
}

// Checks that an edge with more bytes per step is wider.
async function widths(page, plan) {
  const edges = await page.evaluate(() => [...document.querySelectorAll('.edge')].map((edge) => [
    Number(edge.dataset.register), edge.getAttribute('aria-label'), Number(edge.querySelector('path').getAttribute('stroke-width')),
  ]));
  const sized = edges.map(([register, label, width]) => {
    const { slot_bytes: size, readers } = plan.registers[register];
    const reader = readers.filter((one) => label.endsWith(`read by ${plan.actors[one.actor].name}`));
    return [size * Math.max(...reader.map((one) => one.pieces_per_step)), width];
  });
  const between = plan.registers.map((register) => new Set(register.readers.map((reader) => reader.actor).filter((actor) => actor !== register.producer)).size);
  assert.equal(edges.length, between.reduce((sum, count) => sum + count, 0), 'an edge for each register and reader');
  sized.sort(([a], [b]) => a - b);
  for (const [i, [bytes, width]] of sized.entries()) assert.ok(i === 0 || width >= sized[i - 1][1], `an edge with ${bytes} bytes per step is only ${width} pixels wide`);
  assert.ok(sized[sized.length - 1][1] > 2 * sized[0][1], 'the widest edge is not much wider than the narrowest');
}

// Checks that a compute actor's row shows coloured bars for measured forward and backward, below paler predicted bars.
async function colours(page) {
  const seen = await page.evaluate(() => {
    const canvas = document.getElementById('gantt');
    const scale = canvas.width / parseFloat(canvas.style.width);
    const rows = [...document.querySelectorAll('#rows button')].map((row) => row.textContent);
    const top = rows.findIndex((name) => name.endsWith('compute')) * 26;
    // Copies the canvas, because the page's canvas is not created for frequent reads.
    const copy = Object.assign(document.createElement('canvas'), { width: canvas.width, height: canvas.height }).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const count = (from, tall) => {
      const { data } = copy.getImageData(0, (top + from) * scale, canvas.width, tall * scale);
      const found = { full: 0, pale: 0, forward: 0, backward: 0 };
      for (let i = 0; i < data.length; i += 4) {
        const [r, g, b, alpha] = data.slice(i, i + 4);
        found.full += alpha === 255;
        found.pale += alpha > 110 && alpha < 145;
        found.forward += r === 0x2f && g === 0x6f && b === 0xd0;
        found.backward += r === 0xd9 && g === 0x82 && b === 0x2b;
      }
      return found;
    };
    return { predicted: count(5, 5), measured: count(13, 9) };
  });
  assert.ok(seen.measured.forward > 20 && seen.measured.backward > 20, JSON.stringify(seen));
  assert.ok(seen.predicted.pale > 20 && seen.predicted.full === 0, JSON.stringify(seen));
}

// Checks that the bar of each actor shows the shares of busy time and of time in collectives that `/metrics` implies.
async function busy(page, port, [before, then]) {
  await until('4 s of measurements', () => performance.now() - before > 4000);
  const bars = await page.evaluate(() => [...document.querySelectorAll('#breakdown tbody tr')].map((row) => [
    row.cells[0].textContent, [...row.querySelectorAll('i')].map((part) => parseFloat(part.style.width) / 100),
  ]));
  const [now, seconds] = [await metrics(port), (performance.now() - before) / 1000];
  for (const [name, parts] of bars) {
    const share = (metric) => {
      const spent = (at) => [...at].filter(([key]) => key.startsWith(`${metric}{actor="${name}"`)).reduce((sum, [, value]) => sum + value, 0);
      return (spent(now) - spent(then)) / seconds;
    };
    const [firing, collective] = ['shardflow_actor_firing_seconds_sum', 'shardflow_collective_seconds_sum'].map(share);
    for (const [kind, shown, expected] of [['busy', parts[0] + parts[1], firing], ['in collectives', parts[1], collective]]) {
      assert.ok(Math.abs(shown - expected) < SHARE_DIFFERENCE_MAX, `${name}: the page shows a share of ${shown} (${kind}), but /metrics implies ${expected.toFixed(3)}`);
    }
    const all = parts.reduce((a, b) => a + b, 0);
    assert.ok(all > 0.7 && all < 1.02, `${name}: the parts of the bar are ${parts}`);
  }
  assert.ok(bars.some(([name, parts]) => name.endsWith('compute') && parts[0] > 0.1), 'some compute actor is busy');
  assert.ok(bars.some(([, parts]) => parts[1] > 0.01), 'some actor is in collectives');
}

// Checks the keyboard: Tab reaches rows and edges, arrow keys change the row and the step, and Enter opens a register.
async function keyboard(page, port) {
  await page.locator('#timeline').focus();
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), await page.locator('#rows button').first().textContent());
  await until('the details of a row', async () => /: \d+ in /.test(await text(page, 'row-detail')));
  await page.keyboard.press('ArrowDown');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), await page.locator('#rows button').nth(1).textContent());
  await page.keyboard.press('ArrowLeft');
  await until('an older step', async () => (await text(page, 'timeline-step')).includes('End'));
  await page.keyboard.press('End');
  await until('the newest step', async () => !(await text(page, 'timeline-step')).includes('End'));
  await page.locator('.edge').first().focus();
  await page.keyboard.press('Enter');
  assert.ok(await page.locator('#register').isVisible());
  const [facts, name] = [await text(page, 'register-facts'), await text(page, 'register-name')];
  const [, held, slots] = /slots(\d+) held of (\d+)/.exec(facts).map(Number);
  const got = await metrics(port);
  assert.equal(slots, ['free', 'writing', 'filled'].reduce((sum, state) => sum + got.get(`shardflow_register_slots{register="${name}",state="${state}"}`), 0), name);
  assert.ok(held <= slots);
  assert.match(facts, /pieces published[1-9]/);
  assert.equal(await page.locator('#register-slots .uplot').count(), 1, 'slots over time');
  await page.keyboard.press('Escape');
  assert.ok(!(await page.locator('#register').isVisible()));
}

const appearance = (page) => page.evaluate(() => ({
  width: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  animated: [...document.querySelectorAll('*')].some((element) => parseFloat(getComputedStyle(element).transitionDuration) > 0),
}));
const LIGHT = 'rgb(255, 255, 255)';
const DARK = 'rgb(20, 23, 28)';

// Checks that the page fits a narrow window, follows the dark colour scheme, and respects reduced motion.
async function fits(port) {
  const { page, wrong, close } = await openPage(port, { viewport: { width: 360, height: 700 }, colorScheme: 'dark', reducedMotion: 'reduce' });
  await until('an event', async () => (await text(page, 'step')) !== '-');
  await until('all charts', async () => (await page.locator('#charts .uplot').count()) === 4);
  const { width, background, animated } = await appearance(page);
  assert.ok(width <= 360, `the page is ${width} pixels wide`);
  assert.equal(background, DARK);
  assert.ok(!animated);
  assert.deepEqual(wrong, []);
  await close();
}

// Checks that an open page follows changes of the colour scheme and of the window's width.
async function follows(page) {
  const before = await appearance(page);
  assert.deepEqual([before.background, before.animated], [LIGHT, true]);
  // Whether the chart contains the colour that the style sheet gives to the grid.
  const hasGrid = () => page.evaluate(() => {
    const canvas = document.querySelector('#chart-loss canvas');
    const copy = Object.assign(document.createElement('canvas'), { width: canvas.width, height: canvas.height }).getContext('2d', { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const line = getComputedStyle(document.documentElement).getPropertyValue('--line').trim();
    const [r, g, b] = line.match(/[0-9a-f]{2}/g).map((part) => parseInt(part, 16));
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let i = 0; i < data.length; i += 4) count += data[i] === r && data[i + 1] === g && data[i + 2] === b && data[i + 3] === 255;
    return count > 100;
  });
  await until('a grid', hasGrid);
  await page.emulateMedia({ colorScheme: 'dark' });
  await until('the dark colours', async () => (await appearance(page)).background === DARK && (await hasGrid()));
  await page.setViewportSize({ width: 700, height: 900 });
  await until('narrower charts', () => page.evaluate(() => [...document.querySelectorAll('#charts .chart')].every((chart) => chart.firstChild.offsetWidth <= chart.clientWidth)));
  assert.ok((await appearance(page)).width <= 700);
}

// Checks several processes: each page shows the actors of its process, and has links to the other pages.
async function processes() {
  const port = await twoPorts();
  const launched = ['launch', '--nproc-per-node=2', `--log-dir=${path.join(modules, 'logs')}`, '--', path.join(programs, 'gpt')];
  const training = await start('shardflow', [...launched, ...gptArgs(port, ...SMALL)], port);
  const { page, wrong, close } = await openPage(port);
  await until('steps', async () => Number((await text(page, 'step')).split(' ')[0]) > 2);
  assert.match(await text(page, 'what'), /rank 0 of 2/);
  const names = () => page.locator('#rows button').allTextContents();
  assert.ok((await names()).every((name) => name.startsWith('device 0')));
  const row = (rank) => page.locator('#processes tbody tr').nth(rank).locator('td').allTextContents();
  assert.deepEqual(await row(0), ['0', '0', '', 'this page', '']);
  await until('a heartbeat', async () => / ago$/.test((await row(1))[4]));
  const [rank, devices, on, link] = await row(1);
  assert.deepEqual([rank, devices, link], ['1', '1', `port ${port + 1}`]);
  const pid = Number(/^the same machine, process (\d+)$/.exec(on)[1]);
  assert.match(readFileSync(`/proc/${pid}/cmdline`, 'utf8'), /gpt/);
  assert.equal(await page.locator('#incidents li').count(), 0);
  // Rank 1 reports the process id of rank 0.
  const { peers } = await (await fetch(`http://127.0.0.1:${port + 1}/plan`)).json();
  await sendNonsense(peers[0].pid);
  await until('a refusal', async () => /refused after .*: .* bad_format/.test(await text(page, 'incidents')));
  assert.ok((await metrics(port)).get('shardflow_refused_total{reason="bad_format"}') >= 1);
  assert.deepEqual(wrong, []);
  await page.locator('#processes a').click();
  await until('the other page', async () => /rank 1 of 2/.test(await text(page, 'what')));
  await until('the actors of the other page', async () => (await names()).length > 0 && (await names()).every((name) => name.startsWith('device 1')));
  await until('the steps of the other page', async () => Number((await text(page, 'step')).split(' ')[0]) > 2);
  await close();
  await end(training, 'SIGTERM');
}

async function twoPorts() {
  return until('two ports', async () => {
    const port = await freePort();
    const next = createServer().listen(port + 1, '127.0.0.1');
    await once(next, 'listening');
    next.close();
    await once(next, 'close');
    return port;
  });
}

// Sends an invalid datagram to each UDP port of a process.
async function sendNonsense(pid) {
  const links = readdirSync(`/proc/${pid}/fd`).map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`));
  const lines = readFileSync(`/proc/${pid}/net/udp`, 'utf8').split('\n').slice(1).map((line) => line.trim().split(/\s+/));
  const own = lines.filter((fields) => links.includes(`socket:[${fields[9]}]`));
  assert.ok(own.length > 0, 'the process has a UDP port for heartbeats');
  const socket = createSocket('udp4');
  for (const [, local] of own) {
    const [address, port] = local.split(':');
    const host = address.match(/../g).reverse().map((byte) => parseInt(byte, 16)).join('.');
    await new Promise((resume) => socket.send('nonsense', parseInt(port, 16), host, resume));
  }
  socket.close();
}

// Checks that the bubble of four evenly loaded stages agrees with the prediction and the published formula.
async function bubble(schedule) {
  const [port, microBatches, stages] = [await freePort(), 8, 4];
  const training = await watched(port, `stage=${stages}`, schedule, microBatches, 20);
  const { page, wrong, close } = await openPage(port);
  const shares = () => page.evaluate(() => ['bubble', 'bubble-predicted'].map((id) => Number(document.getElementById(id).dataset.share)));
  await until('a prediction', async () => (await shares()).every((share) => share > 0));
  const expected = (stages - 1) / (microBatches + stages - 1);
  // On a busy machine, some steps take longer. The check therefore waits until three events in a row agree.
  let [seen, inARow, both] = ['', 0, []];
  await until('bubbles that agree', async () => {
    const now = await text(page, 'step');
    if (now === seen) return false;
    [seen, both] = [now, await shares()];
    const [measured, predicted] = both;
    const agree = Math.abs(measured - predicted) <= BUBBLE_DIFFERENCE_MAX && Math.abs(predicted - expected) <= BUBBLE_DIFFERENCE_MAX;
    inARow = agree ? inARow + 1 : 0;
    if (!agree) throw new Error(`bubble ${measured} measured, ${predicted} predicted, ${expected} by the formula`);
    return inARow === 3;
  });
  console.log(`${schedule}: bubble ${both[0].toFixed(3)}, predicted ${both[1].toFixed(3)}, by the formula ${expected.toFixed(3)}`);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Checks a stall: the edge that blocks its reader turns red, the incidents show the cause, and the page recovers later.
async function stall() {
  const port = await freePort();
  const training = await watched(port, 'stage=2', '1f1b', 4, 2);
  const { page, wrong, close } = await openPage(port);
  await until('steps', async () => Number(await text(page, 'step')) > 2);
  assert.equal(await page.locator('.edge.blocked').count(), 0);
  training.child.stdin.write('close\n');
  await until('a red edge', async () => (await page.locator('.edge.blocked').count()) > 0);
  const stroke = () => page.evaluate(() => getComputedStyle(document.querySelector('.edge.blocked path')).stroke);
  await until('the red stroke', async () => (await stroke()) === 'rgb(198, 32, 28)');
  await until('a report of blocked edges', async () => (await text(page, 'health')) === 'running, edges are blocked');
  await until('the waiting actor', async () => /waits for piece/.test(await text(page, 'breakdown')));
  await until('an incident', async () => /device 1 compute forward has not ended, and waits for no other action/.test(await text(page, 'incidents')));
  // `shardflow status` prints the same information.
  const status = execFileSync(path.join(programs, 'shardflow'), ['status', '--at', `127.0.0.1:${port}`], { encoding: 'utf8' });
  assert.match(status, /^no progress for [1-9]\d+\.\d s; run `shardflow explain-hang` for the cause$/m);
  assert.match(status, /device 1 compute forward is in flight$/m);
  assert.match(status, /device 0 compute backward waits for piece \d+ of register/);
  assert.doesNotMatch(status, /waited +0\.0 %/);
  assert.match(await (await fetch(`http://127.0.0.1:${port}/healthz`)).text(), /^ok, \d+ steps, no progress for [1-9]\d+ s\n$/);
  await page.locator('.edge.blocked').first().focus();
  await page.keyboard.press('Enter');
  await until('the reason', async () => /blocked/.test(await text(page, 'register-facts')));
  await page.keyboard.press('Escape');
  training.child.stdin.write('open\n');
  await until('no red edge', async () => (await page.locator('.edge.blocked').count()) === 0);
  await until('a report without blocked edges', async () => (await text(page, 'health')) === 'running');
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Checks that the page reports the end of its server, and shows the session of a new server on the same port.
async function reconnects() {
  const port = await freePort();
  let training = await watched(port, 'stage=2', '1f1b', 4, 2);
  const { page, wrong, close } = await openPage(port, {}, true);
  await until('steps', async () => Number(await text(page, 'step')) > 20);
  await end(training);
  await until('an attempt to reconnect', async () => /^reconnecting/.test(await text(page, 'fresh')));
  training = await watched(port, 'stage=4', '1f1b', 4, 20);
  await until('the new session', async () => /stage=4/.test(await text(page, 'what')));
  await until('fresh data', async () => /^\d\.\d s ago$/.test(await text(page, 'fresh')));
  assert.equal(await page.locator('#rows button').count(), (await (await fetch(`http://127.0.0.1:${port}/plan`)).json()).actors.length);
  // A server that is suspended does not close the connection at first, but its data becomes stale.
  training.child.kill('SIGSTOP');
  await until('stale data', async () => /^stale, /.test(await text(page, 'fresh')));
  training.child.kill('SIGCONT');
  await until('fresh data again', async () => /^\d\.\d s ago$/.test(await text(page, 'fresh')));
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Measures the bytes of events per second for a plan with a thousand actors, and checks that the page shows this plan.
async function manyActors() {
  const port = await freePort();
  const training = await watched(port, 'data=100,stage=4', '1f1b', 2, 0);
  const plan = await (await fetch(`http://127.0.0.1:${port}/plan`)).json();
  assert.ok(plan.actors.length >= 1000, `the plan has only ${plan.actors.length} actors`);
  const { page, wrong, close } = await openPage(port);
  await until('steps', async () => Number(await text(page, 'step')) >= 3);
  const abort = new AbortController();
  const answer = await fetch(`http://127.0.0.1:${port}/events`, { signal: abort.signal });
  const [begin, seconds] = [performance.now(), 8];
  const arrivals = [];
  for await (const chunk of answer.body) {
    arrivals.push([performance.now() - begin, chunk.length]);
    if (performance.now() - begin > seconds * 1000) break;
  }
  abort.abort();
  const rates = arrivals.map(([from]) => arrivals.filter(([at]) => at >= from && at < from + 1000).reduce((sum, [, size]) => sum + size, 0));
  const most = Math.max(...rates);
  const steps = Number(await text(page, 'step'));
  console.log(`${plan.actors.length} actors, ${plan.registers.length} registers, ${steps} steps: at most ${most} bytes of events within a second`);
  assert.ok(most > 0 && most < BYTES_PER_SECOND_MAX);
  assert.equal(await page.locator('#rows button').count(), plan.actors.length);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Saves screenshots of a training in the light and in the dark colour scheme.
async function takePictures() {
  const port = await freePort();
  const training = await start('gpt', gptArgs(port, '--mesh=stage=4', '--micro-batches=8', '--threads-per-device=1', '--layers=4', '--width=64', '--heads=4', '--context=64', '--batch=32', '--clip=1'), port);
  for (const colorScheme of ['light', 'dark']) {
    const { page, close } = await openPage(port, { colorScheme, viewport: { width: 1120, height: 1000 } });
    await until('a prediction', async () => (await text(page, 'bubble-predicted')) !== '-');
    await until('a curve', async () => Number((await text(page, 'step')).split(' ')[0]) >= 40);
    await page.screenshot({ path: path.join(pictures, `page-${colorScheme}.png`) });
    await close();
  }
  await end(training);
}

// Chromium's sandbox does not work as root.
const args = process.getuid() === 0 ? ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'] : ['--disable-gpu', '--disable-dev-shm-usage'];
const checks = [matchesMetrics, processes, bubble.bind(null, 'gpipe'), bubble.bind(null, '1f1b'), stall, reconnects, manyActors];
let failed = 0;
try {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args });
  for (const check of process.env.ONLY ? checks.filter((check) => check.name.includes(process.env.ONLY)) : checks) {
    const begin = performance.now();
    try {
      await check();
      console.log(`ok: ${check.name}, ${((performance.now() - begin) / 1000).toFixed(1)} s`);
    } catch (error) {
      failed += 1;
      console.log(`error: ${check.name}: ${error.stack}`);
    }
    for (const child of running) child.kill('SIGKILL');
  }
  if (pictures) await takePictures();
} finally {
  for (const child of running) child.kill('SIGKILL');
  await browser?.close();
}
process.exit(failed > 0 ? 1 : 0);
