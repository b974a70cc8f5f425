// The stream of events, which reconnects with growing delays after an error.

const DELAY_MS_MIN = 500;
const DELAY_MS_MAX = 8000;
// An event arrives each second, so a stream without events for this time is broken, even if the browser reports no error.
const SILENT_MS_MAX = 5000;

export class Connection {
  // Calls `onEvent` with each event, and `onPlan` with the plan of each new session.
  constructor(onPlan, onEvent) {
    Object.assign(this, { onPlan, onEvent, session: null, delayMs: DELAY_MS_MIN, receivedAt: null, state: 'connecting' });
    setInterval(() => this.watch(), 1000);
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    this.source?.close();
    this.openedAt = performance.now();
    this.source = new EventSource('events');
    this.source.onmessage = (message) => this.receive(JSON.parse(message.data));
    this.source.onerror = () => this.retry();
  }

  retry() {
    this.source.close();
    this.state = 'reconnecting';
    clearTimeout(this.timer);
    this.openedAt = Infinity;
    this.timer = setTimeout(() => this.open(), this.delayMs);
    this.delayMs = Math.min(this.delayMs * 2, DELAY_MS_MAX);
  }

  watch() {
    if (performance.now() - Math.max(this.openedAt, this.receivedAt ?? 0) > SILENT_MS_MAX) this.retry();
  }

  async receive(event) {
    this.delayMs = DELAY_MS_MIN;
    this.receivedAt = performance.now();
    this.state = 'live';
    if (event.session !== '' && event.session !== this.session) {
      // Events that arrive before the plan wait for it.
      this.session = event.session;
      this.plan = fetch('plan').then((response) => response.json()).then((plan) => this.onPlan(plan));
    }
    try {
      await this.plan;
      this.onEvent(event);
    } catch {
      // The server stopped between the event and its plan: the next event requests the plan again.
      this.session = null;
    }
  }
}
