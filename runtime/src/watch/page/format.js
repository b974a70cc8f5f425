// Formats numbers and times, and creates elements that contain only text.

export function duration(seconds) {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(0)} us`;
  if (seconds < 1) return `${(seconds * 1e3).toFixed(1)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function bytes(count) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  while (count >= 1024 && unit + 1 < units.length) {
    count /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toFixed(1)} ${units[unit]}`;
}

export const share = (part) => (part == null ? '-' : `${(part * 100).toFixed(1)} %`);
// Inf and NaN arrive as text.
export const number = (value, digits) => (value == null ? '-' : typeof value === 'string' ? value : value.toFixed(digits));

export const at = (id) => document.getElementById(id);

export function setText(id, text) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
}

export function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export function key(name, text) {
  const item = make('span');
  const square = make('span', 'key');
  square.style.background = `var(--${name})`;
  item.append(square, text);
  return item;
}
