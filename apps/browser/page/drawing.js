// Prompt to picture: text encoder, the plan's loop, VAE. The same in the browser and in Node.

import { float32Values } from "./graphs.js";
import { RandomState } from "./random_state.js";
import { noiseCount, sampleLatents } from "./sampler.js";

export class Drawing {
  #known = new Map(); // what was drawn last: prompts as JSON -> their text embeddings

  constructor(manifest, tokenizer, graphs) {
    this.manifest = manifest;
    this.tokenizer = tokenizer;
    this.graphs = graphs;
  }

  /**
   * Draw one picture. `negative` and `guidance` count where guidance is not distilled in.
   *
   * Gives pixels (RGBA, row by row), width, height, latents, and the seconds of each stage.
   */
  async draw({ prompt, negative = "", seed, guidance, onStep }) {
    const { plan } = this.manifest;
    const seconds = {};
    const timed = async (stage, work) => {
      const start = performance.now();
      const value = await work;
      seconds[stage] = (performance.now() - start) / 1000;
      return value;
    };
    const prompts = plan.guidance === null ? [prompt] : [negative, prompt];
    const text = await timed("text", this.text(prompts));
    const size = this.graphs.latentShape.reduce((product, side) => product * side);
    const stream = new RandomState(seed);
    const noises = Array.from({ length: noiseCount(plan) }, () => stream.normals(size));
    const options = { guidance, onStep };
    const latents = await timed("UNet", sampleLatents(plan, this.graphs, noises, text, options));
    finite("unet_decoder", latents);
    const sample = await timed("VAE", this.decode(latents));
    const [, , height, width] = sample.dims;
    const values = await float32Values(sample);
    finite("vae_decoder", values);
    return { latents, pixels: pixels(values), width, height, seconds };
  }

  /** Text embeddings (C, L, D) of one or two prompts; those of the last picture are known. */
  async text(prompts) {
    const key = JSON.stringify(prompts);
    if (!this.#known.has(key)) {
      const text = await this.encode(prompts.map((prompt) => this.tokenizer.ids(prompt)));
      this.#known = new Map([[key, text]]);
    }
    return this.#known.get(key);
  }

  /** Text embeddings (C, L, D) of rows of ids (L,). */
  async encode(rows) {
    const embeddings = [];
    for (const ids of rows) {
      const tokens = this.graphs.int64(ids, [1, ids.length]);
      const ran = await this.graphs.run("text_encoder", { input_ids: tokens });
      embeddings.push(ran.last_hidden_state);
    }
    const [first] = embeddings;
    const values = new Float32Array(first.size * embeddings.length);
    for (const [row, one] of embeddings.entries()) values.set(await float32Values(one), row * first.size);
    finite("text_encoder", values);
    return this.graphs.float32(values, [embeddings.length, ...first.dims.slice(1)]);
  }

  /** Latents (1, 4, H, W) -> the VAE's sample (1, 3, 8H, 8W) in [-1, 1]. */
  async decode(latents) {
    const factor = Math.fround(this.manifest.vae_scaling_factor);
    const scaled = latents.map((value) => value / factor);
    const latent = this.graphs.float32(scaled, this.graphs.latentShape);
    return (await this.graphs.run("vae_decoder", { latent_sample: latent })).sample;
  }
}

/** (1, 3, H, W) in [-1, 1] -> RGBA of 8 bits, rounded as tiue-export and diffusers do. */
export function pixels(sample) {
  const size = sample.length / 3;
  const rgba = new Uint8ClampedArray(4 * size);
  for (let i = 0; i < size; i++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = Math.fround(127.5 * sample[channel * size + i]);
      rgba[4 * i + channel] = Math.floor(Math.fround(value + 128));
    }
    rgba[4 * i + 3] = 255;
  }
  return rgba;
}

function finite(graph, values) {
  if (!values.every(Number.isFinite)) {
    throw new Error(`${graph} made values that are no numbers; draw with another backend.`);
  }
}
