// Asks the worker that draws, and waits for its answers.

import { Failure } from "./site_files.js";

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
      if (failure) asked.reject(new Failure(failure.message, failure.next));
      else asked.resolve(value);
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const next = "Reload the page. If this stays, its files are not whole: copy the site again.";
      const message = `What draws cannot be started: ${event.message ?? "a script is missing"}`;
      for (const { reject } of this.#waiting.values()) reject(new Failure(message, next));
      this.#waiting.clear();
    };
  }

  /** One work of drawing_worker.js; its value. Throws `Failure`. */
  ask(work, request = {}, onProgress = () => {}) {
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, onProgress });
      this.#worker.postMessage({ id, work, ...request });
    });
  }
}
