// Everything that computes, beside the page, which so stays alive: loads the bundle, draws, measures.
//
// Asked: { id, work: "load" | "draw" | "measure", ... }. Answered: { id, progress | value | failure }.

import { chooseBackend, loadRuntime, sessionBytes, threadCount } from "./backend.js";
import { ClipTokenizer } from "./clip_tokenizer.js";
import { Drawing } from "./drawing.js";
import { GRAPHS, Graphs } from "./graphs.js";
import { measureParity } from "./reference.js";
import { isOnePass } from "./sampler.js";
import { Sessions } from "./sessions.js";
import { Failure, RELOAD_OR_COPY, SiteFiles, TOO_LARGE, fetched } from "./site_files.js";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

let drawing;
let site;
let tell; // the progress of the work that goes on

const WORK = { load, draw, measure };

let last = Promise.resolve();
let trapped = null; // ends the work that goes on

// One after another: sessions are opened and closed while they draw.
self.onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};

async function answer({ id, work, ...request }) {
  tell = (told) => self.postMessage({ id, progress: told });
  const trap = new Promise((_, reject) => {
    trapped = reject;
  });
  try {
    const value = await Promise.race([WORK[work](request), trap]);
    self.postMessage({ id, value }, value.pixels ? [value.pixels.buffer] : []);
  } catch (error) {
    tellFailure(id, error);
  }
  trapped = null;
}

// A trap in WASM may reject a promise that nobody waits for: the work would never end.
for (const kind of ["error", "unhandledrejection"]) {
  self.addEventListener(kind, (event) => {
    if (!trapped) return;
    event.preventDefault();
    trapped(event.reason ?? event.error ?? event.message);
  });
}

function tellFailure(id, error) {
  const { message, next = "" } = explained(error);
  self.postMessage({ id, failure: { message, next } });
}

async function load({ backend: wanted }) {
  site = await (await fetched("site.json")).json();
  const backend = await chooseBackend(wanted, {
    half: site.half,
    largestTensorBytes: site.largest_tensor_bytes,
  });
  let done = 0;
  const files = new SiteFiles(site.files, (bytes) => {
    done += bytes;
    if (done <= site.total_bytes) tell({ loaded_bytes: done, total_bytes: site.total_bytes });
  });
  const manifest = await files.json("tiue.json");
  const json = await files.json("tokenizer/tokenizer.json");
  const config = await files.json("tokenizer/tokenizer_config.json");
  const tokenizer = new ClipTokenizer(Tokenizer, json, config, {
    length: manifest.text_shape[1],
    chunks: manifest.text_chunks,
  });
  const ort = await loadRuntime(backend.name);
  const open = (graph) => {
    tell({ opening: graph });
    return opened(ort, backend.name, files, manifest.graphs[graph], graph);
  };
  const room = sessionBytes(backend.name, site.largest_tensor_bytes);
  const sessions = new Sessions(open, site.open_bytes, room);
  for (const graph of GRAPHS) await sessions.get(graph);
  drawing = new Drawing(manifest, tokenizer, new Graphs(ort, manifest, sessions));
  return { backend: { ...backend, threads: backend.name === "wasm" ? threadCount() : 0 } };
}

async function opened(ort, backend, files, record, graph) {
  const externalData = [];
  for (const file of Object.keys(record.files).filter((name) => name.endsWith(".data"))) {
    externalData.push({ path: file.split("/").pop(), data: await files.bytes(file) });
  }
  return ort.InferenceSession.create(await files.bytes(record.path), {
    executionProviders: [backend],
    externalData,
    // What the encoder made stays where the decoder takes it.
    preferredOutputLocation:
      backend === "webgpu" && graph === "unet_encoder" ? "gpu-buffer" : undefined,
  });
}

async function draw({ prompt, negative, seed, guidance }) {
  const onStep = (done, total) => tell({ step: done, steps: total });
  const picture = await drawing.draw({ prompt, negative, seed, guidance, onStep });
  const words = drawing.tokenizer.words(prompt).length;
  const cut = Math.max(0, words - drawing.tokenizer.capacity);
  return { ...picture, cut_tokens: cut };
}

async function measure() {
  const reference = await new SiteFiles(site.files).bytes("parity/reference.safetensors");
  const records = await measureParity(drawing, isOnePass(drawing.manifest.plan), reference);
  return { records };
}

const OTHER_BACKEND = "Reload the page, or choose the other backend below.";

/** What a person can do something about. */
function explained(error) {
  if (error instanceof Failure) return error;
  const message = String(error?.message ?? error);
  if (/fetching of the wasm|no available backend|failed to fetch|dynamically imported/i.test(message)) {
    return new Failure(`What draws cannot be loaded: ${message}`, RELOAD_OR_COPY);
  }
  if (/out of bounds|unreachable/i.test(message)) {
    return new Failure(`What draws stopped: ${message}.`, OTHER_BACKEND);
  }
  if (error instanceof RangeError || /memory|bad_alloc|allocat|Aborted/i.test(message)) {
    return new Failure(`Memory ran out: ${message}`, TOO_LARGE);
  }
  return new Failure(message, OTHER_BACKEND);
}
