// What a picture was made with, in its PNG: the two text chunks that `tiue-export generate` writes.

/** A PNG file with `parameters` as JSON ("tiue") and as the line that other image tools show. */
export async function pngWithParameters(canvas, parameters) {
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const { prompt, negative_prompt: negative, ...rest } = parameters;
  const readable = [
    prompt,
    ...(negative ? [`Negative prompt: ${negative}`] : []),
    Object.entries(rest).map(([key, value]) => `${key}: ${value}`).join(", "),
  ].join("\n");
  const chunks = [textChunk("tiue", JSON.stringify(parameters)), textChunk("parameters", readable)];
  const afterHeader = 8 + 25; // the signature, and IHDR
  return new Blob([bytes.slice(0, afterHeader), ...chunks, bytes.slice(afterHeader)], {
    type: "image/png",
  });
}

/** An iTXt chunk: UTF-8, not compressed (PNG specification 11.3.4.5). */
function textChunk(keyword, text) {
  return pngChunk("iTXt", new TextEncoder().encode(`${keyword}\0\0\0\0\0${text}`));
}

/** A chunk of a PNG: length, type, content, CRC. */
export function pngChunk(type, content) {
  const chunk = new Uint8Array(content.length + 12);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length);
  chunk.set(new TextEncoder().encode(type), 4);
  chunk.set(content, 8);
  view.setUint32(content.length + 8, crc32(chunk.subarray(4, content.length + 8)));
  return chunk;
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}
