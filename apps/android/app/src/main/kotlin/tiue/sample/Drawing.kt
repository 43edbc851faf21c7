package tiue.sample

import kotlin.math.floor

const val TEXT_ENCODER = "text_encoder"
const val UNET_ENCODER = "unet_encoder"
const val UNET_DECODER = "unet_decoder"
const val VAE_DECODER = "vae_decoder"
const val CONTROLNET = "controlnet"

/** Whole numbers, such as token ids, are floats too: below 2^24 they are exact. */
class Tensor(val shape: List<Long>, val values: FloatArray)

/** What runs the graphs: the NPU (QnnGraphs), or anything that computes the same. */
interface Graphs {
    fun run(graph: String, feeds: Map<String, Tensor>): Map<String, Tensor>
}

/** `latents` before the VAE; `pixels` are 0xAARRGGBB, row by row. */
class Picture(val latents: FloatArray, val width: Int, val height: Int, val pixels: IntArray)

/**
 * Prompt to picture: the plan's passes and sums, whatever runs the graphs. No scheduler is known.
 *
 * A decoder that takes timesteps takes `decoderSteps` of them.
 */
class Drawing(private val bundle: Bundle, private val graphs: Graphs, private val decoderSteps: Int) {
    private val plan = bundle.plan
    private val tokenizer = bundle.tokenizer()
    private val latentShape = bundle.latentShape

    /** `negative` counts where guidance is not distilled in. `onStep` hears how many rows are done. */
    fun draw(prompt: String, seed: Long, negative: String = "", onStep: (Int, Int) -> Unit = { _, _ -> }): Picture {
        val noises = Noise(seed).draws(plan.noises, latentShape.reduce(Long::times).toInt())
        val prompts = if (plan.guidance == null) listOf(prompt) else listOf(negative, prompt)
        val text = stacked(prompts.map(::embedded))
        val latents = latents(noises, text, onStep)
        val scaled = FloatArray(latents.size) { latents[it] / bundle.vaeScalingFactor }
        val sample = run(VAE_DECODER, mapOf("latent_sample" to Tensor(latentShape, scaled))).getValue("sample")
        val (height, width) = sample.shape.drop(2).map(Long::toInt)
        return Picture(latents, width, height, pixels(sample.values))
    }

    private fun embedded(prompt: String): Tensor {
        val ids = tokenizer.ids(prompt)
        val tokens = Tensor(listOf(1, ids.size.toLong()), FloatArray(ids.size) { ids[it].toFloat() })
        return run(TEXT_ENCODER, mapOf("input_ids" to tokens)).getValue("last_hidden_state")
    }

    private fun latents(noises: List<FloatArray>, text: Tensor, onStep: (Int, Int) -> Unit): FloatArray {
        if (plan.onePass) {
            val pool = mapOf("sample" to Tensor(latentShape, noises[0]), "encoder_hidden_states" to text)
            val latents = run(UNET_DECODER, pool + run(UNET_ENCODER, pool)).getValue("latents").values
            return latents.also { onStep(1, 1) }
        }
        val outputs = ArrayList<FloatArray>()
        for (pass in plan.passes) {
            val sample = Tensor(latentShape, pass.input.of(noises, outputs))
            val given = mapOf(
                "sample" to stacked(List(plan.copies) { sample }),
                "timestep" to times(listOf(pass.encoderTimestep)),
                "encoder_hidden_states" to text,
            )
            val features = run(UNET_ENCODER, given)
            for (timesteps in plan.pieces(pass, decoderSteps)) {
                // The context has one size: the last one again, and cut off.
                val filled = timesteps + List(decoderSteps - timesteps.size) { timesteps.last() }
                val own = mapOf("encoder_hidden_states" to text, "timesteps" to times(filled))
                val rows = run(UNET_DECODER, features + own).getValue("outputs").values
                outputs += bySteps(rows, decoderSteps).take(timesteps.size)
                onStep(outputs.size, plan.rows)
            }
        }
        return plan.latents.of(noises, outputs)
    }

    /** Step-major rows, one for each step, guided where there are two: without and with the prompt. */
    private fun bySteps(rows: FloatArray, steps: Int): List<FloatArray> {
        val size = rows.size / steps / plan.copies
        val scale = plan.guidance ?: return List(steps) { rows.copyOfRange(it * size, (it + 1) * size) }
        return List(steps) { step ->
            FloatArray(size) { i ->
                val without = rows[2 * step * size + i]
                without + scale * (rows[(2 * step + 1) * size + i] - without)
            }
        }
    }

    private fun run(graph: String, pool: Map<String, Tensor>): Map<String, Tensor> {
        val feeds = bundle.inputs(graph).associateWith {
            pool[it] ?: throw Failure("$graph takes $it; there is only ${pool.keys}", "Export the bundle again.")
        }
        val outputs = graphs.run(graph, feeds)
        for ((name, tensor) in outputs) {
            if (!tensor.values.all(Float::isFinite)) {
                throw Failure("$graph: $name holds values that are no numbers", "Prove the bundle: tiue-export parity")
            }
        }
        return outputs
    }

    private companion object {
        fun times(timesteps: List<Float>) = Tensor(listOf(timesteps.size.toLong()), timesteps.toFloatArray())

        /** Along the first axis. */
        fun stacked(tensors: List<Tensor>): Tensor {
            val first = tensors.sumOf { it.shape[0] }
            val values = tensors.map { it.values }.reduce(FloatArray::plus)
            return Tensor(listOf(first) + tensors[0].shape.drop(1), values)
        }

        /** (1, 3, H, W) in [-1, 1] to 8 bits, rounded as tiue-export and diffusers do. */
        fun pixels(sample: FloatArray): IntArray {
            val size = sample.size / 3
            fun byte(value: Float) = floor(127.5f * value + 128f).coerceIn(0f, 255f).toInt()
            return IntArray(size) {
                val red = byte(sample[it])
                val green = byte(sample[size + it])
                val blue = byte(sample[2 * size + it])
                (0xff shl 24) or (red shl 16) or (green shl 8) or blue
            }
        }
    }
}
