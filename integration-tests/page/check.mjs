// Looks at the live page in a real Chromium, with no window, while real trainings run under it.
//
//     node check.mjs PROGRAMS MODULES [PICTURES]
//
// PROGRAMS is the folder with `gpt` and `watched`, MODULES one where playwright-core is installed, and PICTURES, if given, where
// pictures of the page are put. CHROMIUM names the browser's program. Ends with 0, or with 1 and what was wrong.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createRequire } from 'node:module';
import { createServer } from 'node:net';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [programs, modules, pictures] = process.argv.slice(2).map((name) => path.resolve(name));
const { chromium } = createRequire(pathToFileURL(`${modules}/`))('playwright-core');
// For each thing that is waited for.
const DEADLINE_MS = 60_000;
const LOOK_EVERY_MS = 20;
const BYTES_A_SECOND_MAX = 1_000_000;
const BUBBLES_APART_MAX = 0.05;

const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

// What `look` gives, once it is true.
async function until(what, look) {
  const deadline = performance.now() + DEADLINE_MS;
  let last = '';
  while (performance.now() < deadline) {
    try {
      const found = await look();
      if (found) return found;
    } catch (error) {
      last = `: ${error.message}`;
    }
    await pause(LOOK_EVERY_MS);
  }
  throw new Error(`${what}: not within ${DEADLINE_MS / 1000} s${last}`);
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

// A program that answers on `port`.
async function start(program, args, port) {
  const child = spawn(path.join(programs, program), args, { stdio: ['pipe', 'pipe', 'pipe'] });
  running.add(child);
  let said = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => (said = (said + data).slice(-4000)));
  child.on('exit', () => running.delete(child));
  await until(`${program} answers`, async () => {
    if (child.exitCode !== null) throw new Error(`it ended: ${said}`);
    return (await fetch(`http://127.0.0.1:${port}/healthz`)).ok;
  });
  return { child, said: () => said };
}

async function end({ child }, signal = 'SIGKILL') {
  child.kill(signal);
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
}

const watched = (port, mesh, schedule, microBatches, ms) =>
  start('watched', [`127.0.0.1:${port}`, mesh, schedule, `${microBatches}`, `${ms}`], port);

const gpt = (port, ...args) => start('gpt', [`--listen=127.0.0.1:${port}`, '--sample=0', '--steps=1000000', ...args], port);

let browser;

// A page on that port, and what its console said that was no mere word. `mayBreak` lets it tell of connections that broke.
async function look(port, options = {}, mayBreak = false) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  const isBroken = (text) => mayBreak && /net::ERR_|Failed to load resource/.test(text);
  page.on('pageerror', (error) => wrong.push(`${error}`));
  page.on('console', (message) => {
    if (['error', 'warning'].includes(message.type()) && !isBroken(message.text())) wrong.push(message.text());
  });
  await page.goto(`http://127.0.0.1:${port}/`);
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

// Step, loss, gradient norm, tokens and memory on the page are those of `/metrics` at the same step; rows for all actors.
async function showsWhatMetricsSay() {
  const port = await freePort();
  const training = await gpt(port, '--mesh=stage=2', '--micro-batches=4', '--layers=2', '--width=32', '--heads=2', '--context=32', '--batch=8', '--clip=1');
  const { page, wrong, close } = await look(port);
  const told = new Map();
  const shown = await until('a step that both have told', async () => {
    const got = await metrics(port);
    told.set(got.get('shardflow_steps_total'), got);
    const page_ = await page.evaluate(() => Object.fromEntries(['step', 'loss', 'norm', 'tokens'].map((id) => [id, document.getElementById(id).textContent])));
    page_.got = told.get(Number(page_.step.split(' ')[0]));
    return page_.got && page_.loss !== '-' && page_;
  });
  assert.equal(shown.loss, shown.got.get('shardflow_loss').toFixed(4));
  assert.equal(shown.norm, shown.got.get('shardflow_gradient_norm').toFixed(4));
  assert.equal(Number(shown.tokens), shown.got.get('shardflow_tokens_total'));
  assert.match(shown.step, /^\d+ of 1000000$/);
  const memory = await page.evaluate(() => [...document.querySelectorAll('#memory tbody tr')].map((row) => [row.dataset.planned, row.dataset.peak].map(Number)));
  assert.deepEqual(memory, [0, 1].map((device) => ['planned', 'peak'].map((kind) => shown.got.get(`shardflow_memory_bytes{device="${device}",kind="${kind}"}`))));
  const plan = await (await fetch(`http://127.0.0.1:${port}/plan`)).json();
  assert.ok(plan.actors.length >= 4);
  const rows = await page.locator('#rows button').allTextContents();
  assert.deepEqual([...rows].sort(), plan.actors.map((actor) => actor.name).sort());
  assert.equal(await page.locator('#breakdown tbody tr').count(), plan.actors.length);
  assert.equal(await page.locator('.uplot').count(), 4, 'four charts');
  await until('a prediction', async () => (await text(page, 'bubble-predicted')) !== '-');
  await until('a whole step', async () => /^\d+/.test(await text(page, 'timeline-step')));
  assert.ok(/ min | h | s$/.test(await text(page, 'eta')), 'time left');
  await keyboard(page);
  await fits(port);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Rows and edges are reached by the Tab key, steps by arrows, a register by Enter.
async function keyboard(page) {
  await page.locator('#timeline').focus();
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), await page.locator('#rows button').first().textContent());
  await until('a row tells what it did', async () => /: \d+ in /.test(await text(page, 'row-detail')));
  await page.keyboard.press('ArrowDown');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), await page.locator('#rows button').nth(1).textContent());
  await page.keyboard.press('ArrowLeft');
  await until('an older step', async () => (await text(page, 'timeline-step')).includes('End'));
  await page.keyboard.press('End');
  await until('the newest step', async () => !(await text(page, 'timeline-step')).includes('End'));
  await page.locator('.edge').first().focus();
  await page.keyboard.press('Enter');
  assert.ok(await page.locator('#register').isVisible());
  assert.match(await text(page, 'register-facts'), /slots\d+ held of \d+/);
  await page.keyboard.press('Escape');
  assert.ok(!(await page.locator('#register').isVisible()));
}

// Nothing stands out of a narrow window; dark is dark; nothing moves for who wants no motion.
async function fits(port) {
  const { page, wrong, close } = await look(port, { viewport: { width: 360, height: 700 }, colorScheme: 'dark', reducedMotion: 'reduce' });
  await until('an event', async () => (await text(page, 'step')) !== '-');
  const [width, ground, moves] = await page.evaluate(() => [
    document.documentElement.scrollWidth,
    getComputedStyle(document.body).backgroundColor,
    [...document.querySelectorAll('*')].some((element) => parseFloat(getComputedStyle(element).transitionDuration) > 0),
  ]);
  assert.ok(width <= 360, `${width} pixels`);
  assert.equal(ground, 'rgb(20, 23, 28)');
  assert.ok(!moves);
  assert.deepEqual(wrong, []);
  await close();
}

// What part of a step four evenly loaded stages stand idle: as predicted, and as the schedules' authors say.
async function bubble(schedule) {
  const [port, microBatches, stages] = [await freePort(), 8, 4];
  const training = await watched(port, `stage=${stages}`, schedule, microBatches, 20);
  const { page, wrong, close } = await look(port);
  const shares = () => page.evaluate(() => ['bubble', 'bubble-predicted'].map((id) => Number(document.getElementById(id).dataset.share)));
  await until('a prediction', async () => (await shares()).every((share) => share > 0));
  // So that the first steps, which are slower, are not among those counted.
  await until('16 steps', async () => Number(await text(page, 'step')) >= 16);
  const [measured, predicted] = await until('both again', async () => {
    const both = await shares();
    return both.every((share) => share > 0) && both;
  });
  const expected = (stages - 1) / (microBatches + stages - 1);
  console.log(`${schedule}: bubble ${measured.toFixed(3)}, predicted ${predicted.toFixed(3)}, by the formula ${expected.toFixed(3)}`);
  assert.ok(Math.abs(measured - predicted) <= BUBBLES_APART_MAX, 'the prediction is off');
  assert.ok(Math.abs(predicted - expected) <= BUBBLES_APART_MAX, 'the schedule is not what it is called');
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// An edge that holds its reader up turns red, the cause stands among the incidents, and all is well again afterwards.
async function stall() {
  const port = await freePort();
  const training = await watched(port, 'stage=2', '1f1b', 4, 2);
  const { page, wrong, close } = await look(port);
  await until('steps', async () => Number(await text(page, 'step')) > 2);
  assert.equal(await page.locator('.edge.blocked').count(), 0);
  training.child.stdin.write('close\n');
  await until('a red edge', async () => (await page.locator('.edge.blocked').count()) > 0);
  const stroke = () => page.evaluate(() => getComputedStyle(document.querySelector('.edge.blocked path')).stroke);
  await until('it is red', async () => (await stroke()) === 'rgb(198, 32, 28)');
  await until('who waits', async () => /waits for piece/.test(await text(page, 'breakdown')));
  await until('an incident', async () => /device 1 compute forward has not ended, and waits for nobody/.test(await text(page, 'incidents')));
  await page.locator('.edge.blocked').first().focus();
  await page.keyboard.press('Enter');
  await until('why', async () => /blocked/.test(await text(page, 'register-facts')));
  await page.keyboard.press('Escape');
  training.child.stdin.write('open\n');
  await until('no red edge', async () => (await page.locator('.edge.blocked').count()) === 0);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// The server dies, and another comes in its place: the page says so, and shows the new one.
async function reconnects() {
  const port = await freePort();
  let training = await watched(port, 'stage=2', '1f1b', 4, 2);
  const { page, wrong, close } = await look(port, {}, true);
  await until('steps', async () => Number(await text(page, 'step')) > 20);
  await end(training);
  await until('reconnecting', async () => /^reconnecting/.test(await text(page, 'fresh')));
  training = await watched(port, 'stage=4', '1f1b', 4, 20);
  await until('the new session', async () => /stage=4/.test(await text(page, 'what')));
  await until('fresh', async () => /^\d\.\d s ago$/.test(await text(page, 'fresh')));
  assert.equal(await page.locator('#rows button').count(), (await (await fetch(`http://127.0.0.1:${port}/plan`)).json()).actors.length);
  // A server that stands still is no broken connection at first, but what it told gets old.
  training.child.kill('SIGSTOP');
  await until('stale', async () => /^(stale|reconnecting)/.test(await text(page, 'fresh')));
  training.child.kill('SIGCONT');
  await until('fresh again', async () => /^\d\.\d s ago$/.test(await text(page, 'fresh')));
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Bytes of events in a second, of a plan with a thousand actors; and the page can show it.
async function manyActors() {
  const port = await freePort();
  const training = await watched(port, 'data=100,stage=4', '1f1b', 2, 0);
  const plan = await (await fetch(`http://127.0.0.1:${port}/plan`)).json();
  assert.ok(plan.actors.length >= 1000, `${plan.actors.length} actors`);
  const { page, wrong, close } = await look(port);
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
  assert.ok(most > 0 && most < BYTES_A_SECOND_MAX);
  assert.equal(await page.locator('#rows button').count(), plan.actors.length);
  assert.deepEqual(wrong, []);
  await close();
  await end(training);
}

// Light and dark pictures of a training.
async function takePictures() {
  const port = await freePort();
  const training = await gpt(port, '--mesh=stage=4', '--micro-batches=8', '--threads-per-device=1', '--layers=4', '--width=64', '--heads=4', '--context=64', '--batch=32', '--clip=1');
  for (const colorScheme of ['light', 'dark']) {
    const { page, close } = await look(port, { colorScheme, viewport: { width: 1120, height: 1000 } });
    await until('a prediction', async () => (await text(page, 'bubble-predicted')) !== '-');
    await until('a curve', async () => Number((await text(page, 'step')).split(' ')[0]) >= 40);
    await page.screenshot({ path: path.join(pictures, `page-${colorScheme}.png`) });
    await close();
  }
  await end(training);
}

// Root has no sandbox.
const args = process.getuid() === 0 ? ['--no-sandbox', '--disable-gpu'] : ['--disable-gpu'];
const checks = [showsWhatMetricsSay, bubble.bind(null, 'gpipe'), bubble.bind(null, '1f1b'), stall, reconnects, manyActors];
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
