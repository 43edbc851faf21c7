// ONNX Runtime's sessions, as many at once as fit: Stable Diffusion's four graphs are 5 GB in
// float32, and WASM has 4 GB for everything. What was used longest ago is closed for the next.

export class Sessions {
  #open;
  #sizes;
  #budget;
  #opened = new Map(); // the one used last stands last

  /** `open(name)` makes a session of so many bytes, `sizes[name]`; together at most `budget`. */
  constructor(open, sizes, budget = Infinity) {
    this.#open = open;
    this.#sizes = sizes;
    this.#budget = budget;
  }

  async get(name) {
    const known = this.#opened.get(name);
    this.#opened.delete(name);
    if (!known) await this.#makeRoom(this.#sizes[name]);
    const session = known ?? (await this.#open(name));
    this.#opened.set(name, session);
    return session;
  }

  async #makeRoom(size) {
    const used = () => [...this.#opened.keys()].reduce((sum, name) => sum + this.#sizes[name], 0);
    while (this.#opened.size && used() + size > this.#budget) {
      const [oldest, session] = this.#opened.entries().next().value;
      this.#opened.delete(oldest);
      await session.release();
    }
  }
}
