// Asks the worker that draws, and waits for its answers.

export class Failed extends Error {
  constructor({ message, next }) {
    super(message);
    this.next = next;
  }
}

export class WorkerClient {
  #worker = new Worker(new URL("drawing_worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #last = 0;

  constructor() {
    this.#worker.onmessage = ({ data: { id, progress, value, failure } }) => {
      const asked = this.#waiting.get(id);
      if (!asked) return; // failed already
      if (progress) return void asked.onProgress(progress);
      this.#waiting.delete(id);
      if (failure) asked.reject(new Failed(failure));
      else asked.resolve(value);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const next = "Reload the page. If this stays, its files are not whole: copy the site again.";
      const message = `What draws cannot be started: ${event.message ?? "a script is missing"}`;
      for (const { reject } of this.#waiting.values()) reject(new Failed({ message, next }));
      this.#waiting.clear();
    };
  }

  /** One work of drawing_worker.js; its value. Throws `Failed`. */
  ask(work, request = {}, onProgress = () => {}) {
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, onProgress });
      this.#worker.postMessage({ id, work, ...request });
    });
  }
}
