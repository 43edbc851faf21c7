// The bundle's ONNX graphs in ONNX Runtime: its sessions, and the tensors that they take.

import { fromHalf, toHalf } from "./half.js";

export const GRAPHS = ["text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"];

export class Graphs {
  #ort;
  #manifest;
  #sessions;

  /** `ort` is onnxruntime-web or onnxruntime-node; `sessions.get(graph)` gives one of each. */
  constructor(ort, manifest, sessions) {
    this.#ort = ort;
    this.#manifest = manifest;
    this.#sessions = sessions;
    this.latentShape = manifest.latent_shape;
  }

  float32(values, dims) {
    return new this.#ort.Tensor("float32", Float32Array.from(values), dims);
  }

  int64(values, dims) {
    return new this.#ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  /** Run a graph on what it takes of `pool`, in the precision it takes; its outputs by name. */
  async run(name, pool) {
    const feeds = {};
    for (const { name: input, dtype } of this.#manifest.graphs[name].inputs) {
      if (!(input in pool)) throw new Error(`${name} takes ${input}, which nothing gives it.`);
      feeds[input] = await this.#typed(pool[input], dtype);
    }
    const session = await this.#sessions.get(name);
    return session.run(feeds);
  }

  /** As it is where the type is right: what lies on a GPU stays there. */
  async #typed(tensor, dtype) {
    if (tensor.type === dtype) return tensor;
    const values = await float32Values(tensor);
    return new this.#ort.Tensor(dtype, dtype === "float16" ? toHalf(values) : values, tensor.dims);
  }
}

/** A float tensor's values as Float32Array, of whatever precision and wherever they lie. */
export async function float32Values(tensor) {
  const values = await tensor.getData();
  if (tensor.type !== "float16") return values;
  return fromHalf(new Uint16Array(values.buffer, values.byteOffset, values.length));
}
