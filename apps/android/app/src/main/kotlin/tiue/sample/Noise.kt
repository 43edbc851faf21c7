package tiue.sample

import kotlin.math.ln
import kotlin.math.sqrt

/**
 * NumPy's RandomState(seed).standard_normal: Mersenne Twister (MT19937), then the polar method.
 *
 * NumPy froze that stream for good, so a seed draws here what it draws with tiue-export.
 */
class Noise(seed: Long) {
    private val state = IntArray(SIZE)
    private var used = SIZE
    private var kept: Double? = null

    init {
        if (seed !in 0..0xffffffffL) {
            throw Failure("seed $seed is out of range; expected 0 to 4294967295", "Choose another.")
        }
        state[0] = seed.toInt()
        for (i in 1 until SIZE) state[i] = 1812433253 * (state[i - 1] xor (state[i - 1] ushr 30)) + i
    }

    /** The initial noise of a picture and the fresh ones of its plan: all from the one stream. */
    fun draws(count: Int, size: Int): List<FloatArray> =
        List(count) { FloatArray(size) { normal().toFloat() } }

    private fun normal(): Double {
        kept?.let { return it.also { kept = null } }
        while (true) {
            val x = 2.0 * uniform() - 1.0
            val y = 2.0 * uniform() - 1.0
            val square = x * x + y * y
            if (square >= 1.0 || square == 0.0) continue
            val scale = sqrt(-2.0 * ln(square) / square)
            kept = scale * x
            return scale * y
        }
    }

    private fun uniform(): Double = ((word() ushr 5) * 67108864.0 + (word() ushr 6)) / 9007199254740992.0

    private fun word(): Int {
        if (used == SIZE) twist()
        var y = state[used++]
        y = y xor (y ushr 11)
        y = y xor ((y shl 7) and 0x9d2c5680.toInt())
        y = y xor ((y shl 15) and 0xefc60000.toInt())
        return y xor (y ushr 18)
    }

    private fun twist() {
        for (i in 0 until SIZE) {
            val y = (state[i] and Int.MIN_VALUE) or (state[(i + 1) % SIZE] and Int.MAX_VALUE)
            val odd = if (y and 1 == 1) 0x9908b0df.toInt() else 0
            state[i] = state[(i + 397) % SIZE] xor (y ushr 1) xor odd
        }
        used = 0
    }

    private companion object {
        const val SIZE = 624
    }
}
