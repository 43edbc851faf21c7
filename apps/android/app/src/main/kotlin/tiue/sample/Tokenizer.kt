package tiue.sample

import java.text.Normalizer
import java.util.Locale

/**
 * CLIP's byte-pair encoding, from the bundle's tokenizer.json.
 *
 * `length` is the text length of all `chunks`; each chunk is start, words, end, padding.
 */
class Tokenizer(json: Json, length: Int, private val chunks: Int) {
    private val vocabulary = json["model"]["vocab"].let { vocab -> vocab.keys.associateWith { vocab[it].int } }
    private val ranks = json["model"]["merges"].list.withIndex().associate { (rank, pair) ->
        pair.list.let { (left, right) -> left.text to right.text } to rank
    }
    private val start = json["post_processor"]["cls"].list[1].int
    private val end = json["post_processor"]["sep"].list[1].int
    private val pad = json["padding"]["pad_id"].int
    private val size = json["padding"]["strategy"]["Fixed"].int - 2

    // Tokens that are no words: <|startoftext|>, <|endoftext|>, and "!" where Stable Diffusion 2 pads with it.
    private val marks = json["added_tokens"].list.filter { it["special"].flag }
        .associate { it["content"].text to it["id"].int }
    private val mark = marks.keys.joinToString("|", transform = Regex::escape).toRegex()

    init {
        if ((size + 2) * chunks != length) {
            throw Failure("tokenizer.json pads to ${size + 2}; expected ${length / chunks}", "Export the bundle again.")
        }
        if (json["added_tokens"].list.size > marks.size) {
            throw Failure(
                "the bundle knows words of textual inversions, which this sample does not",
                "Export it without --embedding.",
            )
        }
    }

    /** The ids of a prompt; what is too long is cut. */
    fun ids(prompt: String): IntArray {
        val words = ArrayList<Int>()
        var done = 0
        for (found in mark.findAll(prompt)) {
            words += words(prompt.substring(done, found.range.first)) + marks.getValue(found.value)
            done = found.range.last + 1
        }
        words += words(prompt.substring(done))
        return (0 until chunks).flatMap { chunk ->
            val part = words.drop(chunk * size).take(size)
            listOf(start) + part + end + List(size - part.size) { pad }
        }.toIntArray()
    }

    private fun words(text: String): List<Int> =
        PIECE.findAll(normalized(text)).flatMap { WORD.findAll(it.value) }.flatMap { merged(it.value) }.toList()

    /** Joins the pair of lowest rank until none is left. */
    private fun merged(word: String): List<Int> {
        val parts = word.toByteArray().mapTo(ArrayList()) { LETTERS[it.toInt() and 0xff].toString() }
        parts[parts.size - 1] += "</w>"
        while (true) {
            val best = (0 until parts.size - 1).minByOrNull { ranks[parts[it] to parts[it + 1]] ?: Int.MAX_VALUE }
            if (best == null || (parts[best] to parts[best + 1]) !in ranks) break
            parts[best] += parts.removeAt(best + 1)
        }
        return parts.map { vocabulary[it] ?: end }
    }

    private companion object {
        val WORD = Regex("'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+")
        val PIECE = Regex("<\\|startoftext\\|>|<\\|endoftext\\|>|${WORD.pattern}")

        // \s is ASCII alone in Java, and lacks U+000B on Android.
        val SPACE = Regex("[\\s\\u000b\\u0085\\p{Z}]+")

        // GPT-2's letter for each byte: itself where it prints, else one from 256 on.
        val LETTERS = ((0x21..0x7e) + (0xa1..0xac) + (0xae..0xff)).let { printable ->
            var other = 256
            CharArray(256) { (if (it in printable) it else other++).toChar() }
        }

        /** Lower case letter by letter: of a whole text Java knows Greek's final sigma, CLIP does not. */
        fun normalized(text: String): String {
            val composed = SPACE.replace(Normalizer.normalize(text, Normalizer.Form.NFC), " ")
            val made = StringBuilder()
            composed.codePoints().forEach { made.append(String(Character.toChars(it)).lowercase(Locale.ROOT)) }
            return made.toString()
        }
    }
}
