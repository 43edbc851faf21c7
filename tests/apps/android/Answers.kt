// The Android sample's files on a plain JVM, asked by test_android.py over standard input and output.

package tiue.sample

import java.io.DataInputStream
import java.io.DataOutputStream
import java.io.File

private const val FAILED = 0
private const val DONE = 1
private const val RUN = 2
private val asked = DataInputStream(System.`in`.buffered())
private val answers = DataOutputStream(System.out.buffered())

/** Answers until the asker closes its end. Text is a length and UTF-8, numbers are big-endian. */
fun main() {
    while (true) {
        val command = asked.read()
        if (command < 0) return
        try {
            answer(command.toChar())
        } catch (failure: Failure) {
            answers.writeByte(FAILED)
            send(failure.message!!)
        }
        answers.flush()
    }
}

/** What is asked for is read as a whole before any of it may be refused. */
private fun answer(command: Char) = when (command) {
    'n' -> {
        val (seed, count, size) = Triple(asked.readLong(), asked.readInt(), asked.readInt())
        val noises = Noise(seed).draws(count, size)
        answers.writeByte(DONE)
        noises.forEach(::send)
    }
    't' -> {
        val (folder, prompt) = List(2) { text() }
        val ids = Bundle(File(folder)).tokenizer().ids(prompt)
        answers.writeByte(DONE)
        send(FloatArray(ids.size) { ids[it].toFloat() })
    }
    'c' -> {
        val htp = htpOf(text())
        answers.writeByte(DONE)
        send(htp ?: "")
    }
    'f' -> {
        val (folder, htp, sdk) = List(3) { text() }
        val form = Bundle(File(folder)).form(htp.ifEmpty { null }, sdk)
        answers.writeByte(DONE)
        send("${form.htp} ${form.decoderSteps} ${form.contexts.values.joinToString(" ")}")
    }
    'd' -> {
        val (folder, prompt, negative) = List(3) { text() }
        val (steps, seed) = asked.readInt() to asked.readLong()
        val picture = Drawing(Bundle(File(folder)), Asked, steps).draw(prompt, seed, negative)
        answers.writeByte(DONE)
        send(picture.latents)
        answers.writeInt(picture.width)
        answers.writeInt(picture.height)
        picture.pixels.forEach(answers::writeInt)
    }
    else -> error("there is no command $command")
}

/** Has the asker run each graph. */
private object Asked : Graphs {
    override fun run(graph: String, feeds: Map<String, Tensor>): Map<String, Tensor> {
        answers.writeByte(RUN)
        send(graph)
        answers.writeInt(feeds.size)
        for ((name, tensor) in feeds) {
            send(name)
            answers.writeInt(tensor.shape.size)
            tensor.shape.forEach { answers.writeInt(it.toInt()) }
            send(tensor.values)
        }
        answers.flush()
        return List(asked.readInt()) { text() to tensor() }.toMap()
    }
}

private fun tensor(): Tensor {
    val shape = List(asked.readInt()) { asked.readInt().toLong() }
    return Tensor(shape, FloatArray(asked.readInt()) { asked.readFloat() })
}

private fun text() = String(ByteArray(asked.readInt()).also(asked::readFully))

private fun send(text: String) = text.toByteArray().let {
    answers.writeInt(it.size)
    answers.write(it)
}

private fun send(values: FloatArray) {
    answers.writeInt(values.size)
    values.forEach(answers::writeFloat)
}
