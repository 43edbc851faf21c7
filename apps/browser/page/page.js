// The page: what is typed becomes requests to the worker, what comes back becomes pictures.

import { onNewVersion, takeOffline } from "./offline.js";
import { pngWithParameters } from "./png.js";
import { MAX_SEED } from "./random_state.js";
import { fetched, megabytes } from "./site_files.js";
import { WorkerClient } from "./worker_client.js";

const element = (id) => document.getElementById(id);
const TYPING_PAUSE_MS = 350;

const parameters = new URLSearchParams(location.search);
const wantedBackend = parameters.get("backend") ?? "auto";

globalThis.pageRuns = true; // start.js waits for it

let site;
let offline;
let client;
let loaded;
let drawing = false;
let asked = false; // while a picture was drawn
let pause; // until what is typed is drawn

main().catch(fail);

async function main() {
  onNewVersion(newVersion);
  const lacking = lackingFeature();
  if (lacking) return say(`This browser is too old to draw: it has no ${lacking}. A current one does.`);
  site = await (await fetched("site.json")).json();
  describe();
  offline = await takeOffline();
  await permission();
  client = new WorkerClient();
  const started = performance.now();
  loaded = await client.ask("load", { backend: wantedBackend }, showLoading);
  element("progress").hidden = true;
  showFacts((performance.now() - started) / 1000);
  element("draw").disabled = element("measure").disabled = false;
  say(element("prompt").value ? "Ready" : "Ready: type what it shall draw");
  if (element("prompt").value) draw();
}

/** Of the old one, what was not read yet is gone. */
function newVersion() {
  if (loaded) element("news").hidden = false;
  else location.reload();
}

function lackingFeature() {
  // An instruction of WASM's SIMD, (i8x16.popcnt), in the smallest module that has one.
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0,
    65, 0, 253, 15, 253, 98, 11];
  if (typeof WebAssembly !== "object") return "WebAssembly";
  if (!WebAssembly.validate(Uint8Array.from(simd))) return "SIMD in WebAssembly";
  if (typeof Worker !== "function") return "web workers";
  return "";
}

/** Until a click, where much has to be loaded, or anything in a frame of another page. */
async function permission() {
  const bytes = await lackingBytes();
  if (!bytes || (window.top === window && bytes < site.unasked_bytes)) return;
  const button = element("load");
  button.textContent = `Load ${megabytes(bytes)}`;
  say("What draws is loaded onto your machine, once.");
  [button.hidden, element("progress").hidden] = [false, true];
  await new Promise((resolve) => button.addEventListener("click", resolve, { once: true }));
  [button.hidden, element("progress").hidden] = [true, false];
  navigator.storage?.persist?.(); // or the browser may drop it when the disk fills
}

/** What of the bundle sw.js does not keep from an earlier visit. */
async function lackingBytes() {
  const kept = new Set();
  if (offline) {
    const cache = await caches.open(`${new URL(".", location).href} parts`);
    for (const { url } of await cache.keys()) kept.add(url);
  }
  return Object.entries(site.files)
    .filter(([name]) => !name.startsWith("parity/"))
    .flatMap(([, { parts }]) => parts)
    .filter(({ path }) => !kept.has(new URL(path, location).href))
    .reduce((sum, { size_bytes: size }) => sum + size, 0);
}

// What is shown

function describe() {
  document.title = site.title;
  element("title").textContent = site.title;
  element("about").textContent =
    `${site.width_px} × ${site.height_px} pixels, ${site.steps_text}; drawn on your own machine.`;
  element("guided").hidden = element("guidance-label").hidden = site.guidance === null;
  if (site.guidance !== null) element("guidance").value = site.guidance;
  element("typing-label").hidden = !site.one_pass;
  element("typing").checked = site.one_pass;
  element("backend").value = wantedBackend;
  element("prompt").value = parameters.get("prompt") ?? site.prompt;
  element("seed").value = parameters.get("seed") ?? 0;
}

function say(text) {
  element("status").textContent = text;
}

function fail(error) {
  say("");
  element("progress").hidden = true;
  element("failure").hidden = false;
  element("failure").textContent = [error.message, error.next].filter(Boolean).join(" ");
}

function showLoading({ loaded_bytes: done, total_bytes: total, opening }) {
  if (opening) return say(`Opening the ${spoken(opening)}`);
  element("progress").value = done / total;
  say(`Loading ${megabytes(done)} of ${megabytes(total)}`);
}

const spoken = (graph) => graph.replace("_", " ").replace("unet", "UNet").replace("vae", "VAE");

const OFFLINE = "without a network";

function showFacts(seconds) {
  const { name, why, threads } = loaded.backend;
  const kind = name === "webgpu" ? "WebGPU" : `WASM, ${threads} thread${threads === 1 ? "" : "s"}`;
  const facts = {
    "drawn by": why && name === "wasm" ? `${kind} (${why})` : kind,
    "loaded in": `${seconds.toFixed(1)} s, ${megabytes(site.total_bytes)}`,
    [OFFLINE]: offline ? "" : "does not draw: this browser keeps no page here",
    model: `${site.model}, ${site.precision}`,
    "made by": site.made_by,
  };
  const items = Object.entries(facts).flatMap(([term, fact]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [term, fact];
    if (term === OFFLINE && offline) tellWhenKept(dd);
    return [dt, dd];
  });
  element("facts").replaceChildren(...items);
}

/** What was loaded last is still being kept. */
async function tellWhenKept(told) {
  for (let waits = 0; waits < 40 && (await lackingBytes()); waits++) {
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  told.textContent = (await lackingBytes())
    ? "does not draw: this browser has no room to keep it all"
    : "draws too";
}

function showTimes(seconds) {
  const longest = Math.max(...Object.values(seconds));
  const rows = Object.entries(seconds).map(([stage, time]) => {
    const row = document.createElement("div");
    row.className = "stage";
    const [label, bar, number] = ["span", "i", "b"].map((tag) => document.createElement(tag));
    label.textContent = stage;
    bar.style.width = `${(70 * time) / longest}%`;
    number.textContent = time < 1 ? `${(1000 * time).toFixed(0)} ms` : `${time.toFixed(1)} s`;
    row.append(label, bar, number);
    return row;
  });
  element("times").replaceChildren(...rows);
  element("times").hidden = false;
}

// Drawing

async function draw() {
  clearTimeout(pause); // what was typed is drawn now
  if (!loaded) return;
  if (drawing) {
    asked = true;
    return;
  }
  drawing = true;
  do {
    asked = false;
    element("failure").hidden = true;
    await drawAll(request()).catch(fail);
  } while (asked);
  drawing = false;
}

function request() {
  const number = (id, least, most) => {
    const value = Math.round(Number(element(id).value));
    return Math.min(most, Math.max(least, Number.isFinite(value) ? value : least));
  };
  const count = number("count", 1, 16);
  const scale = element("guidance").valueAsNumber;
  return {
    prompt: element("prompt").value.trim(),
    negative: element("negative").value.trim(),
    guidance:
      site.guidance === null ? undefined : Math.min(1000, Math.max(1, scale || site.guidance)),
    seed: number("seed", 0, MAX_SEED - count + 1),
    count,
  };
}

async function drawAll({ count, seed, ...rest }) {
  const pictures = element("pictures");
  let total = 0;
  for (let i = 0; i < count; i++) {
    if (asked) return; // something newer was typed
    const own = { ...rest, seed: seed + i };
    say(count > 1 ? `Drawing ${i + 1} of ${count}` : "Drawing");
    const picture = await client.ask("draw", own, ({ step, steps, opening }) => {
      if (opening) say(`Drawing ${i + 1} of ${count}: opening the ${spoken(opening)}`);
      if (steps > 1) say(`Drawing ${i + 1} of ${count}: step ${step} of ${steps}`);
    });
    const shown = pictureButton(picture, own);
    if (i === 0) pictures.replaceChildren(shown);
    else pictures.append(shown);
    pictures.className = count === 1 ? "one" : "";
    showTimes(picture.seconds);
    total += Object.values(picture.seconds).reduce((sum, time) => sum + time);
    const cut = picture.cut_tokens ? `; the prompt's last ${picture.cut_tokens} tokens are cut` : "";
    say(`${i + 1} drawn in ${total.toFixed(2)} s${cut}`);
  }
}

function pictureButton({ pixels, width, height }, own) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  const button = document.createElement("button");
  button.type = "button";
  button.className = width < 256 ? "picture small" : "picture";
  button.title = `${own.prompt}, seed ${own.seed}: click to keep it`;
  button.setAttribute("aria-label", button.title);
  button.append(canvas);
  button.addEventListener("click", () => keep(canvas, own).catch(fail));
  return button;
}

async function keep(canvas, { prompt, negative, seed, guidance }) {
  const file = await pngWithParameters(canvas, {
    prompt,
    seed,
    ...(negative ? { negative_prompt: negative } : {}),
    ...(guidance === undefined ? {} : { guidance }),
    ...site.parameters,
    runtime: `onnxruntime-web ${loaded.backend.name}`,
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  link.download = `${words || "picture"}-${seed}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// What a person does

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});

element("dice").addEventListener("click", () => {
  element("seed").value = Math.floor(Math.random() * (MAX_SEED + 1));
  draw();
});

for (const id of ["prompt", "negative", "seed", "guidance"]) {
  element(id).addEventListener("input", () => {
    clearTimeout(pause);
    if (element("typing").checked) pause = setTimeout(draw, TYPING_PAUSE_MS);
  });
}

element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    draw();
  }
});

element("backend").addEventListener("change", (event) => {
  parameters.set("backend", event.target.value);
  parameters.set("prompt", element("prompt").value);
  parameters.set("seed", element("seed").value);
  location.search = parameters;
});

element("measure").addEventListener("click", async () => {
  element("measure").disabled = true;
  element("failure").hidden = true;
  say("Measuring");
  try {
    const { records } = await client.ask("measure");
    const isReached = ({ graph, psnr_db: decibels }) => decibels >= site.gates_db[graph];
    const rows = records.map((record) => {
      const row = document.createElement("tr");
      row.className = isReached(record) ? "" : "short";
      const gate = site.gates_db[record.graph].toFixed(0);
      const cells = [record.what, record.psnr_db.toFixed(1), gate].map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        return cell;
      });
      row.append(...cells);
      return row;
    });
    element("parity").tBodies[0].replaceChildren(...rows);
    element("parity").hidden = false;
    say(
      records.every(isReached)
        ? "Measured: every stage is as near the model in float32 as it has to be"
        : "Measured: this browser computes something else than the model; the other backend may not",
    );
  } catch (error) {
    fail(error);
  }
  element("measure").disabled = false;
});
