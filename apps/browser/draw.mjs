// Draws one picture from a bundle in Node: a bundle needs neither Python nor a browser.
//
//   npm install --no-save onnxruntime-node@1.30.0
//   node draw.mjs BUNDLE "a red fox in the snow" fox.png [SEED]

import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { deflateSync } from "node:zlib";

import { Tokenizer } from "@huggingface/tokenizers";
import ort from "onnxruntime-node";

import { ClipTokenizer } from "./page/clip_tokenizer.js";
import { Drawing } from "./page/drawing.js";
import { GRAPHS, Graphs } from "./page/graphs.js";
import { pngChunk } from "./page/png.js";

// onnxruntime-node 1.30 reads half precision as bits alone: it finds a Float16Array empty.
delete globalThis.Float16Array;

const [bundle, prompt, out, seed = "0"] = process.argv.slice(2);
if (!out) {
  console.error('usage: node draw.mjs BUNDLE "PROMPT" PICTURE.png [SEED]');
  process.exit(2);
}

const json = async (name) => JSON.parse(await readFile(join(bundle, name), "utf8"));
const manifest = await json("tiue.json");
const tokens = await json("tokenizer/tokenizer.json");
const config = await json("tokenizer/tokenizer_config.json");
const shape = { length: manifest.text_shape[1], chunks: manifest.text_chunks };
const tokenizer = new ClipTokenizer(Tokenizer, tokens, config, shape);

const sessions = new Map();
for (const graph of GRAPHS) {
  const path = join(bundle, manifest.graphs[graph].path);
  sessions.set(graph, await ort.InferenceSession.create(path));
}

const drawing = new Drawing(manifest, tokenizer, new Graphs(ort, manifest, sessions));
const { pixels, width, height, seconds } = await drawing.draw({ prompt, seed: Number(seed) });
await writeFile(out, png(pixels, width, height));
const times = Object.entries(seconds).map(([stage, time]) => `${stage} ${time.toFixed(2)} s`);
console.log(`${out}: ${width}x${height}, ${times.join(", ")}`);

/** RGBA -> a PNG file: signature, header, one block of rows without filters, end. */
function png(rgba, width, height) {
  const rows = Buffer.alloc(height * (4 * width + 1));
  for (let y = 0; y < height; y++) {
    rows.set(rgba.subarray(4 * width * y, 4 * width * (y + 1)), y * (4 * width + 1) + 1);
  }
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([8, 6, 0, 0, 0], 8); // 8 bits, RGBA, deflate, no filter, not interlaced
  return Buffer.concat([
    Buffer.from([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]),
    pngChunk("IHDR", header),
    pngChunk("IDAT", deflateSync(rows)),
    pngChunk("IEND", Buffer.alloc(0)),
  ]);
}
