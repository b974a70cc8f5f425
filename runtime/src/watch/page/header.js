// The header of the page: step, time left, health, and age of the data.

import { at, duration, number, setText } from './format.js';

const STALE_MS = 3000;

export function showPlan(plan) {
  const rank = plan.processes > 1 ? `, rank ${plan.process} of ${plan.processes}` : '';
  setText('what', `${plan.mesh} on ${plan.device}, ${plan.micro_batches} micro-batch${plan.micro_batches === 1 ? '' : 'es'}, ${plan.schedule}${rank}`);
}

export function showEvent(model) {
  const { event, points } = model;
  const last = points[points.length - 1];
  setText('step', event.steps_planned == null ? `${event.steps}` : `${event.steps} of ${event.steps_planned}`);
  at('step').dataset.step = event.steps;
  const left = event.steps_planned == null ? null : Math.max(0, event.steps_planned - event.steps);
  const isKnown = left != null && event.step_seconds != null;
  setText('eta', isKnown ? duration(left * event.step_seconds) : event.step_seconds ? `${(1 / event.step_seconds).toFixed(2)} steps/s` : '-');
  setText('loss', number(last?.[1], 4));
  setText('norm', number(last?.[2], 4));
  setText('step-time', event.step_seconds == null ? '-' : duration(event.step_seconds));
  setText('rate', number(event.tokens_per_second, 0));
  setText('tokens', `${event.tokens}`);
  showHealth(event.health, event.blocked.length > 0);
}

export function showHealth(health, isBlocked) {
  const text = { running: isBlocked ? 'running, edges are blocked' : 'running', none: 'no session is running' }[health] ?? health;
  setText('health', text);
  at('health').className = health === 'running' && !isBlocked ? 'good' : 'bad';
}

// Called often, because the age grows while no event arrives.
export function showFreshness(connection) {
  const age = connection.receivedAt == null ? null : performance.now() - connection.receivedAt;
  const ago = age == null ? '' : `${(age / 1000).toFixed(1)} s ago`;
  const isStale = age != null && age > STALE_MS;
  const text = { connecting: 'connecting', reconnecting: `reconnecting, ${ago || 'not yet connected'}`, live: isStale ? `stale, ${ago}` : ago }[connection.state];
  setText('fresh', text);
  at('fresh').className = connection.state === 'live' && !isStale ? '' : 'bad';
}
