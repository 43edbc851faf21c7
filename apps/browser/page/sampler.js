// The one loop of every plan in tiue.json: passes in order, an encoder run and decoder runs each.
// It knows no scheduler: the plan holds every coefficient. tiue_export/sampling/sampler.py is the
// same in Python. Tensors are ONNX Runtime's; B is 1, so C is 1, or 2 with guidance.

import { float32Values } from "./graphs.js";

/** Whether timesteps and the final sum are constants of the graphs. */
export function isOnePass(plan) {
  const { passes, guidance, latents, open_time: openTime } = plan;
  return passes.length === 1 && guidance === null && latents.fresh.length === 0 && !openTime;
}

/** How many noises a picture draws: the initial one, and those that its steps add. */
export const noiseCount = (plan) => 1 + plan.latents.fresh.length;

/** How many decoder rows a picture takes before they are doubled for guidance. */
export const rowCount = (plan) => plan.passes.reduce((sum, pass) => sum + pass.timesteps.length, 0);

/**
 * Noises, each (1, 4, H, W) as Float32Array, and text (C, L, D) -> latents (1, 4, H, W).
 *
 * `graphs.run(name, pool)` runs a graph on what it takes of the pool; `onStep` hears (done, total).
 */
export async function sampleLatents(plan, graphs, noises, text, { guidance, onStep = () => {} } = {}) {
  const { latentShape } = graphs;
  if (isOnePass(plan)) {
    const pool = { sample: graphs.float32(noises[0], latentShape), encoder_hidden_states: text };
    const features = await graphs.run("unet_encoder", pool);
    try {
      const { latents } = await graphs.run("unet_decoder", { ...pool, ...features });
      onStep(1, 1);
      return await float32Values(latents);
    } finally {
      release(features);
    }
  }
  const copies = plan.guidance === null ? 1 : 2;
  const scale = plan.guidance === null ? null : Math.fround(guidance ?? plan.guidance);
  const outputs = [];
  for (const pass of plan.passes) {
    const sample = combined(pass.input, noises, outputs);
    const features = await graphs.run("unet_encoder", {
      sample: graphs.float32(repeated(sample, copies), [copies, ...latentShape.slice(1)]),
      timestep: graphs.float32([pass.encoder_timestep], [1]),
      encoder_hidden_states: text,
    });
    try {
      for (const timesteps of pieces(pass.timesteps, plan.max_decoder_rows, copies)) {
        const ran = await graphs.run("unet_decoder", {
          ...features,
          encoder_hidden_states: text,
          timesteps: graphs.float32(timesteps, [timesteps.length]),
        });
        outputs.push(...bySteps(await float32Values(ran.outputs), timesteps.length, scale));
        onStep(outputs.length, rowCount(plan));
      }
    } finally {
      release(features);
    }
  }
  return combined(plan.latents, noises, outputs);
}

/** terms.noise * initial noise + the weighted outputs and fresh noises, summed in double precision. */
export function combined(terms, noises, outputs) {
  const total = Float64Array.from(noises[0], (value) => terms.noise * value);
  const add = (weight, array) => {
    if (weight !== 0) for (let i = 0; i < total.length; i++) total[i] += weight * array[i];
  };
  // As many as there are coefficients.
  terms.fresh.forEach((weight, j) => add(weight, noises[1 + j]));
  terms.outputs.forEach((weight, j) => j < outputs.length && add(weight, outputs[j]));
  return Float32Array.from(total);
}

/** A pass's timesteps, in runs of at most `maxRows` decoder rows. */
export function pieces(timesteps, maxRows, copies) {
  const size = maxRows === null ? timesteps.length : Math.max(1, Math.floor(maxRows / copies));
  const runs = [];
  for (let first = 0; first < timesteps.length; first += size) {
    runs.push(timesteps.slice(first, first + size));
  }
  return runs;
}

/** Step-major rows, one for each step; with guidance two, without and with the prompt. */
function bySteps(rows, steps, scale) {
  const size = rows.length / steps;
  return Array.from({ length: steps }, (_, step) => {
    const own = rows.slice(step * size, (step + 1) * size);
    if (scale === null) return own;
    const [without, prompted] = [own.subarray(0, size / 2), own.subarray(size / 2)];
    // float32 after every operation, as numpy has it
    return without.map((value, i) => value + Math.fround(scale * Math.fround(prompted[i] - value)));
  });
}

function repeated(values, copies) {
  const all = new Float32Array(values.length * copies);
  for (let copy = 0; copy < copies; copy++) all.set(values, copy * values.length);
  return all;
}

/** Give back what lies on a GPU. */
export function release(tensors) {
  for (const tensor of Object.values(tensors)) {
    if (tensor.location === "gpu-buffer") tensor.dispose();
  }
}
