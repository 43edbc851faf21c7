// IEEE 754 half precision as 16 bits: for JavaScript that has no Float16Array (before Chrome 135,
// Firefox 129, Safari 18.2, Node 24), and for onnxruntime-node 1.30, which does not read one.

/** Float32Array -> bits, rounded to the nearest, ties to even. */
export function toHalf(values) {
  const [word, bits] = sharedWord();
  return Uint16Array.from(values, (value) => {
    const size = Math.abs(value);
    word[0] = value;
    const sign = (bits[0] >>> 16) & 0x8000;
    if (Number.isNaN(value)) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    // The spacing of halves at this size, 2^-24 at the least; counts of it are half's own order.
    word[0] = size;
    const exponent = Math.max(-14, (bits[0] >>> 23) - 127);
    const count = nearestEven(size * 2 ** (10 - exponent));
    return sign | ((exponent + 14) * 1024 + count);
  });
}

/** Bits -> Float32Array, exactly. */
export function fromHalf(halves) {
  return Float32Array.from(halves, (half) => {
    const [exponent, fraction] = [(half >>> 10) & 31, half & 1023];
    const size =
      exponent === 31
        ? fraction ? NaN : Infinity
        : exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
    return half & 0x8000 ? -size : size;
  });
}

/** One number as float32 and as its bits. */
function sharedWord() {
  const word = new Float32Array(1);
  return [word, new Uint32Array(word.buffer)];
}

function nearestEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2) ? below + 1 : below;
}
