// The site's files of a bundle: fetched part by part, each held against its SHA-256 in site.json.

/** What went wrong, and what helps. */
export class Failure extends Error {
  constructor(message, next = "") {
    super(message);
    this.next = next;
  }
}

export class SiteFiles {
  #files;
  #onBytes;

  /** `files` as in site.json; `onBytes` hears of every piece that arrives. */
  constructor(files, onBytes = () => {}) {
    this.#files = files;
    this.#onBytes = onBytes;
  }

  /** One file of the bundle, by its path there. */
  async bytes(name) {
    const { size_bytes: size, parts } = this.#files[name];
    let whole;
    try {
      whole = new Uint8Array(size);
    } catch (error) {
      throw new Failure(`${name} (${megabytes(size)}) does not fit into memory.`, TOO_LARGE);
    }
    let place = 0;
    for (const part of parts) {
      place = await this.#read(name, part, whole, place);
    }
    return whole;
  }

  async json(name) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(name)));
  }

  async #read(name, part, whole, start) {
    const kept = await keptWhole(part.path);
    if (kept && (await isWhole(kept, part))) {
      whole.set(kept, start);
      this.#onBytes(kept.length);
      return start + kept.length;
    }
    if (kept) await forget(part.path); // what stands there now may be better
    let place = start;
    for await (const bytes of arriving(name, part.path)) {
      if (place + bytes.length > start + part.size_bytes) break;
      whole.set(bytes, place);
      place += bytes.length;
      this.#onBytes(bytes.length);
    }
    if (!(await isWhole(whole.subarray(start, place), part))) {
      await forget(part.path);
      throw damaged(name);
    }
    return place;
  }
}

/** What sw.js keeps of a file, read at once and not by way of it, which takes twice as long. */
async function keptWhole(path) {
  const kept = await globalThis.caches?.match(path).catch(() => undefined);
  return kept && new Uint8Array(await kept.arrayBuffer());
}

const isWhole = async (bytes, part) =>
  bytes.length === part.size_bytes && (await sha256(bytes)) === part.sha256;

/** A file's bytes as they come. */
async function* arriving(name, path) {
  // The browser's own cache asks the host whether its copy changed.
  const reader = (await fetched(path, { cache: "no-cache" })).body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new Failure(`The connection broke while ${name} was loaded.`, RELOAD);
    });
    if (done) return;
    yield value;
  }
}

export const TOO_LARGE =
  "Close other tabs, draw by WebGPU, or take a smaller bundle: --precision fp16 halves what is " +
  "loaded, --max-decoder-rows 1 what one run takes.";
export const RELOAD_OR_COPY =
  "Reload the page; if this stays, the whole site has to be copied again.";
const RELOAD = "Reload the page: what was loaded is kept.";

export const megabytes = (bytes) =>
  bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;

export async function fetched(path, options) {
  const response = await fetch(path, options).catch(() => {
    throw new Failure(`${path} cannot be reached.`, RELOAD);
  });
  if (!response.ok) {
    throw new Failure(`${path} is not there (${response.status}).`, RELOAD_OR_COPY);
  }
  return response;
}

/** Drop what sw.js keeps of a file: the next visit loads it again. */
async function forget(path) {
  for (const name of await caches.keys()) {
    await (await caches.open(name)).delete(path);
  }
}

const damaged = (name) =>
  new Failure(`${name} is damaged: its SHA-256 is not the one in site.json.`, RELOAD_OR_COPY);

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) {
    throw new Failure(
      "This page came over a connection that is not secure: its files cannot be checked.",
      "Open it by https, or on the machine itself by http://localhost.",
    );
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
