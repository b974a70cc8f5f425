// Curves, drawn by uPlot.

import { at, colour } from './format.js';
import UPlot from './uplot.js';

const HEIGHT = 160;
const charts = new Map();
const dark = matchMedia('(prefers-color-scheme: dark)');

// The width of the longest label. uPlot repeats the layout a few times, until the sizes no longer change.
function axisWidth(self, labels, index, cycle) {
  const axis = self.axes[index];
  if (cycle > 1) return axis._size;
  const [font] = axis.font;
  self.ctx.font = font;
  const widest = Math.max(0, ...(labels ?? []).map((label) => self.ctx.measureText(label ?? '').width));
  return Math.max(50, Math.ceil(axis.ticks.size + axis.gap + widest / devicePixelRatio) + 2);
}

// Draws `ys` over `xs` in the element `id`; creates the chart on the first call.
export function draw(id, name, xs, ys, colourName, xLabel) {
  const element = at(id);
  if (element.clientWidth === 0) return;
  // A curve has a gap at Inf or NaN.
  const drawn = ys.map((y) => (typeof y === 'string' ? null : y));
  let chart = charts.get(id);
  if (!chart) {
    const [quiet, line] = [colour('quiet'), colour('line')];
    const axis = { stroke: quiet, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    chart = new UPlot({
      width: element.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 34, label: undefined }, { ...axis, size: axisWidth }],
      series: [{ label: xLabel }, { label: name, stroke: colour(colourName), width: 1.5, points: { show: xs.length < 3 } }],
    }, [xs, drawn], element);
    charts.set(id, chart);
  } else {
    chart.setData([xs, drawn]);
  }
  element.setAttribute('role', 'img');
  element.setAttribute('aria-label', `${name}: ${ys.length === 0 ? 'none yet' : `now ${ys[ys.length - 1]}`}`);
}

export function forget(id) {
  charts.get(id)?.destroy();
  charts.delete(id);
}

// A chart has fixed sizes and colours, so it is recreated when they change.
export function onResizeOrTheme(redraw) {
  const recreate = () => {
    [...charts.keys()].forEach(forget);
    redraw();
  };
  dark.addEventListener('change', recreate);
  addEventListener('resize', recreate);
}

export function showEvent(model) {
  const { points, slots, event, plan } = model;
  const steps = points.map((point) => point[0]);
  const tokens = event.tokens_per_second && event.step_seconds ? event.tokens_per_second * event.step_seconds : 0;
  draw('chart-loss', 'loss', steps, points.map((point) => point[1]), 'forward', 'step');
  draw('chart-norm', 'gradient norm', steps, points.map((point) => point[2]), 'backward', 'step');
  draw('chart-rate', 'tokens/s', steps, points.map((point) => tokens / point[4]), 'update', 'step');
  const held = slots.map((sample) => [...sample.held.values()].reduce((a, b) => a + b, 0));
  const own = plan.registers.filter((register) => plan.actors[register.producer].is_here);
  draw('chart-slots', `slots held of ${own.reduce((sum, register) => sum + register.slots, 0)}`,
    slots.map((sample) => sample.at), held, 'communication', 'seconds');
}
