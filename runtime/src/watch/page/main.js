// Connects the parts of the page: the connection passes events to the model, and each part shows the model.

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
  breakdown.showPlan(model.plan);
  graph.showPlan(model);
  processes.showPlan(plan);
  timeline.showPlan(model);
}

function onEvent(event) {
  if (event.session === '' || !model) {
    header.showHealth(event.health, false);
    return;
  }
  model.addEvent(event);
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
  // A prediction needs a complete step, and a session of a single process.
  if (connection.state !== 'live' || !model || model.plan.processes > 1 || model.completeSteps().length === 0) return;
  const current = model;
  try {
    const response = await fetch('predicted');
    if (!response.ok) return;
    const prediction = await response.json();
    if (prediction.session === current.plan.session) current.prediction = prediction;
  } catch {
    // The stream detects that the server has stopped, and reconnects.
  }
}

const connection = new Connection(onPlan, onEvent);
timeline.listen();
graph.listen();
charts.onResizeOrTheme(() => model?.event && charts.showEvent(model));
setInterval(predict, PREDICT_EVERY_MS);
setInterval(() => header.showFreshness(connection), FRESHNESS_EVERY_MS);
