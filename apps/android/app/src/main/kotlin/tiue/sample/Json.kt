package tiue.sample

/** What went wrong, and what to do next. */
class Failure(what: String, next: String) : Exception("$what\n$next")

/** A value of a JSON file and its path there, so that what does not fit is named. */
class Json(private val value: Any?, private val where: String) {
    val isNull get() = value == null
    val keys: List<String> get() = map.keys.map { it as String }
    val list get() = (value as? List<*> ?: fail("a list")).mapIndexed { i, it -> Json(it, "$where[$i]") }
    val numbers get() = list.map { it.number }
    val text get() = value as? String ?: fail("text")
    val number get() = value as? Double ?: fail("a number")
    val flag get() = value as? Boolean ?: fail("true or false")
    val int get() = number.toInt().also { if (it.toDouble() != number) fail("a whole number") }
    private val map get() = value as? Map<*, *> ?: fail("an object")

    operator fun get(key: String): Json =
        if (key in map) Json(map[key], "$where.$key") else throw Failure("$where has no $key", EXPORT_AGAIN)

    private fun fail(expected: String): Nothing =
        throw Failure("$where is ${value.toString().take(60)}; expected $expected", EXPORT_AGAIN)

    companion object {
        private const val EXPORT_AGAIN = "Export the bundle again, or take the app that belongs to it."

        fun parse(text: String, where: String) = Json(Parser(text, where).whole(), where)
    }
}

/** Into Map, List, String, Double, Boolean and null. Its own, so that any JVM runs these files. */
private class Parser(private val text: String, private val where: String) {
    private var at = 0

    fun whole(): Any? = value().also { if (next() != END) wrong() }

    private fun value(): Any? = when (next()) {
        '{' -> LinkedHashMap<String, Any?>().also { map ->
            items('}') {
                val key = string()
                take(':')
                map[key] = value()
            }
        }
        '[' -> ArrayList<Any?>().also { list -> items(']') { list += value() } }
        '"' -> string()
        't' -> word("true", true)
        'f' -> word("false", false)
        'n' -> word("null", null)
        else -> NUMBER.matchAt(text, at)?.value?.also { at += it.length }?.toDouble() ?: wrong()
    }

    private fun items(end: Char, item: () -> Unit) {
        at++
        if (next() != end) item()
        while (next() == ',') {
            at++
            item()
        }
        take(end)
    }

    private fun string(): String {
        take('"')
        val made = StringBuilder()
        while (true) {
            val letter = letter()
            if (letter == '"') return made.toString()
            made.append(if (letter == '\\') escaped() else letter)
        }
    }

    private fun escaped(): Char {
        val letter = letter()
        if (letter != 'u') return ESCAPED[letter] ?: wrong()
        val code = List(4) { letter() }.joinToString("")
        return (code.toIntOrNull(16) ?: wrong()).toChar()
    }

    private fun <T> word(word: String, value: T): T =
        if (text.startsWith(word, at)) value.also { at += word.length } else wrong()

    private fun take(letter: Char) {
        if (next() == letter) at++ else wrong()
    }

    private fun letter() = text.getOrElse(at++) { wrong() }

    private fun next(): Char {
        while (at < text.length && text[at] in " \t\r\n") at++
        return text.getOrElse(at) { END }
    }

    private fun wrong(): Nothing =
        throw Failure("$where is no JSON: it breaks at letter $at of ${text.length}", "Copy the bundle again.")

    private companion object {
        const val END = '\u0000'
        val NUMBER = Regex("-?\\d+(\\.\\d+)?([eE][+-]?\\d+)?")
        val ESCAPED = "\"\\/bfnrt".zip("\"\\/\b\u000c\n\r\t").toMap()
    }
}
