// The state of the session: the plan, and the data of recent events.

const STEPS_KEPT = 24;
const POINTS_KEPT = 2000;
const SAMPLES_KEPT = 300;
const WINDOW_US = 10e6;
const FIRING_FIELDS = 7;

// Puts each entry at the index that is its id. A process knows only a part of the plan, so some indices are empty.
function byId(entries) {
  const all = [];
  for (const entry of entries) all[entry.id] = entry;
  return all;
}

export class Model {
  constructor(plan) {
    this.plan = { ...plan, actors: byId(plan.actors), registers: byId(plan.registers) };
    this.event = null;
    this.points = [];
    // The firings of each step: {actor, action, firing, from, took, cause, register}; `from` and `took` are in us.
    this.steps = new Map();
    // The state of each register, [held, published, ...released], and samples of the slots held over time.
    this.registers = new Map();
    this.slots = [];
    // The samples {at, sums} of each actor in the last seconds.
    this.busy = new Map();
    this.prediction = null;
    this.firingsPerStep = this.plan.actors
      .filter((actor) => actor.is_here)
      .reduce((sum, actor) => sum + actor.actions.reduce((s, action) => s + action.per_step, 0), 0);
  }

  addEvent(event) {
    this.event = event;
    if (event.points.length > 0) {
      // After a rollback, points continue from the restored step.
      this.points = this.points.filter((point) => point[0] < event.points[0][0]).concat(event.points).slice(-POINTS_KEPT);
    }
    this.addFirings(event.firings);
    for (const [register, ...state] of event.registers) this.registers.set(register, state);
    // Only the registers of this process's actors have a state.
    const held = new Map([...this.registers].map(([register, state]) => [register, state[0]]));
    this.slots.push({ at: event.now_us / 1e6, held });
    if (this.slots.length > SAMPLES_KEPT) this.slots.shift();
    for (const [actor, ...sums] of event.busy) {
      const samples = this.busy.get(actor) ?? [];
      samples.push({ at: event.now_us, sums });
      while (samples.length > 2 && samples[1].at < event.now_us - WINDOW_US) samples.shift();
      this.busy.set(actor, samples);
    }
  }

  addFirings(flat) {
    for (let i = 0; i < flat.length; i += FIRING_FIELDS) {
      const [actor, action, firing, from, took, cause, register] = flat.slice(i, i + FIRING_FIELDS);
      const step = Math.floor(firing / Math.max(1, this.plan.actors[actor].actions[action].per_step));
      if (!this.steps.has(step)) this.steps.set(step, []);
      this.steps.get(step).push({ actor, action, firing, from, took, cause, register });
    }
    const newest = [...this.steps.keys()].sort((a, b) => b - a);
    for (const step of newest.slice(STEPS_KEPT)) this.steps.delete(step);
  }

  // The steps whose firings are all known, oldest first.
  completeSteps() {
    const complete = [...this.steps].filter(([, firings]) => firings.length >= this.firingsPerStep);
    return complete.map(([step]) => step).sort((a, b) => a - b);
  }

  // The step to which a pass over the plan belongs, counted from 1.
  stepOf(pass) {
    const mark = this.event.passes.findLast(([first]) => first <= pass) ?? [0, 0];
    return mark[1] + (pass - mark[0]) + 1;
  }

  // Shares of the last seconds: computing, in collectives, waiting for input, for a credit and for the host, and own
  // time between firings. If the sum is below 1, the remainder is a wait that has not ended.
  shares(actor) {
    const samples = this.busy.get(actor) ?? [];
    if (samples.length === 0) return [0, 0, 0, 0, 0, 0];
    const [first, last] = [samples[0], samples[samples.length - 1]];
    const elapsed = Math.max(1, this.event.now_us - first.at);
    const parts = last.sums.map((sum, i) => Math.max(0, sum - first.sums[i]) / elapsed);
    const sum = parts.reduce((a, b) => a + b, 0);
    return sum > 1 ? parts.map((part) => part / sum) : parts;
  }
}
