// Prompts to CLIP token ids, from the bundle's own tokenizer.json.
//
// Known to differ from Python's: U+FEFF, the mark of byte order, which is a space to JavaScript's
// patterns and a sign to Unicode's.

export class ClipTokenizer {
  #words;
  #frame;
  #chunks;

  /**
   * `Tokenizer` is the class of npm's @huggingface/tokenizers; `json` and `config` are the bundle's
   * files. `length` is the text length of all `chunks`; each is start, words, end, padding.
   */
  constructor(Tokenizer, json, config, { length, chunks }) {
    this.#words = new Tokenizer(json, config);
    this.#chunks = chunks;
    const { cls, sep } = json.post_processor;
    const size = length / chunks - 2;
    this.#frame = { start: cls[1], end: sep[1], pad: json.padding.pad_id, size };
  }

  /** How many words' tokens a prompt may have. */
  get capacity() {
    return this.#frame.size * this.#chunks;
  }

  /** The ids of a prompt's words. */
  words(prompt) {
    // JavaScript knows Greek's final sigma, CLIP's lower case does not.
    const text = prompt.replaceAll("\u03a3", "\u03c3");
    return [...this.#words.encode(text, { add_special_tokens: false }).ids];
  }

  /** The ids that the text encoder takes; what is too long is cut. */
  ids(prompt) {
    const { start, end, pad, size } = this.#frame;
    const words = this.words(prompt);
    const row = [];
    for (let chunk = 0; chunk < this.#chunks; chunk++) {
      const part = words.slice(chunk * size, (chunk + 1) * size);
      row.push(start, ...part, end, ...Array(size - part.length).fill(pad));
    }
    return row;
  }
}
