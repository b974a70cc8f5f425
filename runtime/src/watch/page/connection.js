// The stream of events, opened again with growing pauses when it breaks. Imports nothing.

const PAUSE_MS_FIRST = 500;
const PAUSE_MS_MAX = 8000;
// An event comes each second: a stream that has been silent for so long is broken, whatever the browser thinks.
const SILENT_MS_MAX = 5000;

export class Connection {
  // `onEvent` gets each event; `onPlan` the plan of a session that has not been seen before.
  constructor(onPlan, onEvent) {
    Object.assign(this, { onPlan, onEvent, session: null, pauseMs: PAUSE_MS_FIRST, heardAt: null, state: 'connecting' });
    setInterval(() => this.watch(), 1000);
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    this.source?.close();
    this.openedAt = performance.now();
    this.source = new EventSource('events');
    this.source.onmessage = (message) => this.hear(JSON.parse(message.data));
    this.source.onerror = () => this.retry();
  }

  retry() {
    this.source.close();
    this.state = 'reconnecting';
    clearTimeout(this.timer);
    this.openedAt = Infinity;
    this.timer = setTimeout(() => this.open(), this.pauseMs);
    this.pauseMs = Math.min(this.pauseMs * 2, PAUSE_MS_MAX);
  }

  watch() {
    if (performance.now() - Math.max(this.openedAt, this.heardAt ?? 0) > SILENT_MS_MAX) this.retry();
  }

  async hear(event) {
    this.pauseMs = PAUSE_MS_FIRST;
    this.heardAt = performance.now();
    this.state = 'live';
    if (event.session !== '' && event.session !== this.session) {
      // Events that come meanwhile wait for the plan.
      this.session = event.session;
      this.plan = fetch('plan').then((answer) => answer.json()).then((plan) => this.onPlan(plan));
    }
    try {
      await this.plan;
      this.onEvent(event);
    } catch {
      // The server has gone between the event and its plan: the next event asks again.
      this.session = null;
    }
  }
}
