package tiue.sample

/**
 * noise * initial noise + sum_i outputs[[i]] * output i + sum_j fresh[[j]] * fresh noise j.
 *
 * Outputs are counted over all rows of all passes.
 */
class Combination(json: Json) {
    private val noise = json["noise"].number
    private val outputs = json["outputs"].numbers
    val fresh = json["fresh"].numbers

    /** In doubles, in the order of the Python sampler: the same bits come out. */
    fun of(noises: List<FloatArray>, rows: List<FloatArray>): FloatArray {
        val total = DoubleArray(noises[0].size) { noise * noises[0][it] }
        for ((weight, array) in fresh.zip(noises.drop(1)) + outputs.zip(rows)) {
            if (weight != 0.0) for (i in total.indices) total[i] += weight * array[i]
        }
        return FloatArray(total.size) { total[it].toFloat() }
    }
}

/** The encoder runs on `input` at `encoderTimestep`, decoder row k at `timesteps[k]`. */
class Pass(json: Json) {
    val encoderTimestep = json["encoder_timestep"].number.toFloat()
    val timesteps = json["timesteps"].numbers.map(Double::toFloat)
    val input = Combination(json["input"])
}

/** A sampler as data, from tiue.json: whatever the model's scheduler was, this is all of it. */
class Plan(json: Json) {
    val passes = json["passes"].list.map(::Pass)
    val latents = Combination(json["latents"])

    /** The scale; null where it is distilled in, and the network runs on one row, not on two. */
    val guidance = json["guidance"].takeUnless { it.isNull }?.number?.toFloat()
    private val maxDecoderRows = json["max_decoder_rows"].takeUnless { it.isNull }?.int

    /** Then timesteps and the final sum are constants of the graphs. */
    val onePass = passes.size == 1 && guidance == null && latents.fresh.isEmpty() && !json["open_time"].flag
    val noises = 1 + latents.fresh.size
    val copies = if (guidance == null) 1 else 2
    val rows = passes.sumOf { it.timesteps.size }

    /** A pass's timesteps, in decoder runs of at most `steps` and of what the plan allows. */
    fun pieces(pass: Pass, steps: Int): List<List<Float>> {
        val most = minOf(steps, (maxDecoderRows ?: Int.MAX_VALUE) / copies)
        if (most < 1) {
            throw Failure(
                "at most $maxDecoderRows decoder rows are allowed; one step takes $copies",
                "Export again with --max-decoder-rows $copies or more.",
            )
        }
        return pass.timesteps.chunked(most)
    }
}
