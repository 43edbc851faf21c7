// Which part of the machine draws: WebGPU where the graphs fit it, else WASM with SIMD and threads.

/**
 * Choose for graphs that need half precision or not, whose largest tensor has so many bytes.
 * `wanted` is "auto", "webgpu" or "wasm". Gives the name, and why it is not WebGPU.
 */
export async function chooseBackend(wanted, { half, largestTensorBytes }) {
  if (wanted === "wasm") return { name: "wasm", why: "as chosen" };
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const why = !adapter
    ? "this browser offers no WebGPU"
    : half && !adapter.features.has("shader-f16")
      ? "this GPU does not compute in half precision (shader-f16)"
      : adapter.limits.maxStorageBufferBindingSize < largestTensorBytes
        ? "the model's tensors are larger than this GPU's buffers may be"
        : wanted === "auto" && isSoftware(adapter)
          ? "its WebGPU is emulated, which is slower"
          : "";
  return { name: why ? "wasm" : "webgpu", why };
}

function isSoftware(adapter) {
  const { isFallbackAdapter, architecture } = adapter.info ?? {};
  return Boolean(isFallbackAdapter ?? adapter.isFallbackAdapter) || architecture === "swiftshader";
}

/** ONNX Runtime, set up: only what the backend needs is loaded. */
export async function loadRuntime(name) {
  const module = name === "webgpu" ? "ort.min.mjs" : "ort.wasm.min.mjs";
  const ort = await import(`./vendor/${module}`);
  ort.env.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;
  ort.env.wasm.numThreads = name === "wasm" ? threadCount() : 1;
  return ort;
}

/** Threads share memory, which a browser allows isolated pages alone. */
export function threadCount() {
  return globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
}

const WASM_BYTES = 2 ** 32;
const OWN_BYTES = 2 ** 28; // the runtime's, and the small things'

/** What sessions may take together: WASM has 4 GB, and between operations lie two or three tensors. */
export function sessionBytes(name, largestTensorBytes) {
  return name === "wasm" ? WASM_BYTES - OWN_BYTES - 3 * largestTensorBytes : Infinity;
}
