// NumPy's RandomState(seed).standard_normal: Mersenne Twister (MT19937), then the polar method.
// NumPy froze that stream for good (NEP 19), so a seed draws here what `tiue-export generate` draws.

const SIZE = 624;

export const MAX_SEED = 2 ** 32 - 1;

export class RandomState {
  #state = new Uint32Array(SIZE);
  #used = SIZE;
  #kept = null;

  constructor(seed) {
    if (!Number.isInteger(seed) || seed < 0 || seed > MAX_SEED) {
      throw new RangeError(`seed ${seed} is out of range; expected 0 to ${MAX_SEED}`);
    }
    this.#state[0] = seed;
    for (let i = 1; i < SIZE; i++) {
      const before = this.#state[i - 1];
      this.#state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
  }

  /** The next `size` numbers of the stream, as float32. */
  normals(size) {
    return Float32Array.from({ length: size }, () => this.#normal());
  }

  #normal() {
    if (this.#kept !== null) {
      const second = this.#kept;
      this.#kept = null;
      return second;
    }
    for (;;) {
      const x = 2 * this.#uniform() - 1;
      const y = 2 * this.#uniform() - 1;
      const square = x * x + y * y;
      if (square >= 1 || square === 0) continue;
      const scale = Math.sqrt((-2 * Math.log(square)) / square);
      this.#kept = scale * x;
      return scale * y;
    }
  }

  #uniform() {
    const high = this.#word() >>> 5;
    return (high * 67108864 + (this.#word() >>> 6)) / 9007199254740992;
  }

  #word() {
    if (this.#used === SIZE) this.#twist();
    let y = this.#state[this.#used++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  #twist() {
    const state = this.#state;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + 397) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#used = 0;
  }
}
