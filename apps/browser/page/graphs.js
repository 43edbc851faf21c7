// The bundle's ONNX graphs in ONNX Runtime: its sessions, and the tensors that they take.

export const GRAPHS = ["text_encoder", "unet_encoder", "unet_decoder", "vae_decoder"];

export class Graphs {
  #ort;
  #manifest;
  #sessions;

  /** `ort` is onnxruntime-web or onnxruntime-node, `sessions` one for each graph by name. */
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

  /** Run a graph on what it takes of `pool`; its outputs by name. */
  async run(name, pool) {
    const feeds = {};
    for (const { name: input } of this.#manifest.graphs[name].inputs) {
      if (!(input in pool)) throw new Error(`${name} takes ${input}, which nothing gives it.`);
      feeds[input] = pool[input];
    }
    return this.#sessions[name].run(feeds);
  }
}
