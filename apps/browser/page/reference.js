// How near this machine comes to the fp32 student: the bundle's captured reference, stage by stage.

import { float32Values } from "./graphs.js";
import { release } from "./sampler.js";

/** A safetensors file's float32 and int64 tensors: name -> { values, dims }. */
export function safetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const kinds = { F32: Float32Array, I64: BigInt64Array };
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: place }] of Object.entries(header)) {
    if (!(dtype in kinds)) continue;
    // Copied, as a typed array starts at a multiple of its items' size.
    const data = bytes.slice(start + place[0], start + place[1]);
    tensors[name] = { values: new kinds[dtype](data.buffer), dims: shape };
  }
  return tensors;
}

/** 20 log10(largest value / rms error) in dB; 300 where there is no error. */
export function psnrDb(reference, values) {
  let [peak, squares] = [0, 0];
  for (let i = 0; i < reference.length; i++) {
    peak = Math.max(peak, Math.abs(reference[i]));
    squares += (reference[i] - values[i]) ** 2;
  }
  if (squares === 0) return 300;
  const decibels = 20 * Math.log10(peak / Math.sqrt(squares / reference.length));
  return Number.isFinite(decibels) ? decibels : 0;
}

/**
 * Hold a drawing against the reference: text and picture each from the reference's own input, and
 * the latents from its noise and text where the plan is one pass, else the UNet's outputs.
 */
export async function measureParity(drawing, onePass, bytes) {
  const { graphs } = drawing;
  const known = safetensors(bytes);
  const records = [];
  const record = async (graph, what, name, tensor) => {
    const decibels = psnrDb(known[name].values, await float32Values(tensor));
    records.push({ graph, what, psnr_db: decibels });
  };
  const tensor = (name) => graphs.float32(known[name].values, known[name].dims);

  const ids = known.input_ids;
  const text = await drawing.encode([Array.from(ids.values, Number)]);
  const embedded = "prompt_embeds" in known ? "prompt_embeds" : "encoder_hidden_states";
  await record("text_encoder", "text", embedded, text);
  const pool = { sample: tensor("sample"), encoder_hidden_states: tensor("encoder_hidden_states") };
  if (!onePass) Object.assign(pool, { timestep: tensor("timestep"), timesteps: tensor("timesteps") });
  const features = await graphs.run("unet_encoder", pool);
  try {
    const ran = await graphs.run("unet_decoder", { ...pool, ...features });
    const value = onePass ? "latents" : "outputs";
    await record("unet_decoder", value, value, ran[value]);
  } finally {
    release(features);
  }
  const decoded = await graphs.run("vae_decoder", { latent_sample: tensor("latent_sample") });
  await record("vae_decoder", "picture", "picture", decoded.sample);
  return records;
}
