// Puts the page together: what the connection hears goes to the model, and from there to each part. Imports all parts.

import * as breakdown from './breakdown.js';
import * as charts from './charts.js';
import { Connection } from './connection.js';
import * as graph from './graph.js';
import * as header from './header.js';
import { showIncidents, showMemory } from './incidents.js';
import { Model } from './model.js';
import * as processes from './processes.js';
import * as timeline from './timeline.js';

const PREDICT_EVERY_MS = 5000;
const FRESHNESS_EVERY_MS = 200;

let model = null;

function onPlan(plan) {
  model = new Model(plan);
  header.showPlan(plan);
  breakdown.showPlan(plan);
  graph.showPlan(model);
  processes.showPlan(plan);
  timeline.showPlan(model);
}

function onEvent(event) {
  if (event.session === '' || !model) {
    header.showHealth(event.health, false);
    return;
  }
  model.take(event);
  header.showEvent(model);
  showIncidents(event);
  showMemory(event);
  processes.showEvent(event);
  breakdown.showEvent(model);
  charts.showEvent(model);
  graph.showEvent();
  timeline.show();
}

async function predict() {
  // Nothing to predict from before a step has been seen whole; one process of several cannot.
  if (connection.state !== 'live' || !model || model.plan.processes > 1 || model.wholeSteps().length === 0) return;
  const own = model;
  try {
    const answer = await fetch('predicted');
    if (!answer.ok) return;
    const prediction = await answer.json();
    if (prediction.session === own.plan.session) own.prediction = prediction;
  } catch {
    // The stream tells that the server is gone, and opens again.
  }
}

const connection = new Connection(onPlan, onEvent);
timeline.listen();
graph.listen();
charts.onLook(() => model?.event && charts.showEvent(model));
setInterval(predict, PREDICT_EVERY_MS);
setInterval(() => header.showFreshness(connection), FRESHNESS_EVERY_MS);
