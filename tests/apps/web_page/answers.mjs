// Runs the page's modules in Node: a question as JSON on standard input, its answer on output.

import { readFileSync } from "node:fs";

const [page, vendor] = process.argv.slice(2);
const load = (name) => import(`${page}/${name}.js`);
const bytes = (hex) => Uint8Array.from(Buffer.from(hex, "hex"));
const floats = (hex) => new Float32Array(bytes(hex).buffer);
const hex = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("hex");

const ANSWERS = {
  async normals({ seed, sizes }) {
    const { RandomState } = await load("random_state");
    const stream = new RandomState(seed);
    return sizes.map((size) => hex(stream.normals(size)));
  },
  async tokens({ folder, length, chunks, prompts }) {
    const { Tokenizer } = await import(vendor);
    const { ClipTokenizer } = await load("clip_tokenizer");
    const read = (name) => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"));
    const json = read("tokenizer.json");
    const config = read("tokenizer_config.json");
    const tokenizer = new ClipTokenizer(Tokenizer, json, config, { length, chunks });
    return prompts.map((prompt) => tokenizer.ids(prompt));
  },
  async pixels({ sample }) {
    const { pixels } = await load("drawing");
    return hex(pixels(floats(sample)));
  },
  async psnr({ reference, value }) {
    const { psnrDb } = await load("reference");
    return psnrDb(floats(reference), floats(value));
  },
  async tensors({ file }) {
    const { safetensors } = await load("reference");
    const tensors = safetensors(new Uint8Array(readFileSync(file)));
    return Object.entries(tensors).map(([name, { values, dims }]) => [name, dims, hex(values)]);
  },
  async texts({ drawn }) {
    const { Drawing } = await load("drawing");
    const ran = [];
    const graphs = {
      float32: (values, dims) => ({ type: "float32", values, dims }),
      int64: (ids) => ids,
      run: async (name, { input_ids: ids }) => {
        ran.push(ids);
        const values = Float32Array.from(ids);
        const getData = async () => values;
        const dims = [1, ids.length];
        return { last_hidden_state: { type: "float32", dims, size: values.length, getData } };
      },
    };
    const tokenizer = { ids: (prompt) => Array.from(prompt.padEnd(4), (letter) => letter.codePointAt(0)) };
    const drawing = new Drawing({}, tokenizer, graphs);
    const texts = [];
    for (const prompts of drawn) texts.push(hex((await drawing.text(prompts)).values));
    return { runs: ran.length, texts };
  },
  async sessions({ sizes, budget, asked }) {
    const { Sessions } = await load("sessions");
    const log = [];
    const open = async (name) => {
      log.push(`open ${name}`);
      return { name, release: async () => log.push(`close ${name}`) };
    };
    const sessions = new Sessions(open, sizes, budget);
    for (const name of asked) log.push(`run ${(await sessions.get(name)).name}`);
    return log;
  },
  async from_half({ halves }) {
    const { fromHalf } = await load("half");
    return hex(fromHalf(Uint16Array.from(halves)));
  },
  async to_half({ values }) {
    const { toHalf } = await load("half");
    return Array.from(toHalf(floats(values)));
  },
  async backend({ wanted, adapter, half, largestTensorBytes }) {
    const { chooseBackend } = await load("backend");
    const requestAdapter = async () =>
      adapter.features && {
        features: new Set(adapter.features),
        limits: { maxStorageBufferBindingSize: adapter.largest },
        info: adapter.info,
      };
    const value = { gpu: adapter ? { requestAdapter } : undefined };
    Object.defineProperty(globalThis, "navigator", { value, configurable: true });
    return chooseBackend(wanted, { half, largestTensorBytes });
  },
};

const { work, ...question } = JSON.parse(readFileSync(0, "utf8"));
try {
  console.log(JSON.stringify({ value: await ANSWERS[work](question) }));
} catch (error) {
  console.log(JSON.stringify({ error: error.message }));
}
