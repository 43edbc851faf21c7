package tiue.sample

import java.io.File
import java.security.MessageDigest

/** The HTP architecture of each Snapdragon that contexts are compiled for, by part number. */
val HTP_OF_SOC = mapOf(
    "sm8450" to "v69",
    "sm8475" to "v69",
    "sm8550" to "v73",
    "sm8650" to "v75",
    "sm8750" to "v79",
    "sm8850" to "v81",
)

/** The architecture of a chip as Android names it (Build.SOC_MODEL), such as "SM8650"; null: unknown. */
fun htpOf(model: String): String? =
    Regex("\\bsm\\d{4}").find(model.lowercase())?.let { HTP_OF_SOC[it.value] }

/** Contexts of all graphs for one architecture; the decoder's takes `decoderSteps` timesteps at once. */
class Form(val htp: String, val decoderSteps: Int, val contexts: Map<String, File>)

/** An unpacked bundle: what tiue.json says of drawing. */
class Bundle(private val folder: File) {
    private val manifest = Json.parse(read("tiue.json"), "tiue.json")

    init {
        val format = manifest["format_version"].int
        if (format != 2) throw Failure("tiue.json has format $format; expected 2", "Export the bundle again.")
    }

    private val graphs = manifest["graphs"]
    val plan = Plan(manifest["plan"])
    val latentShape = sides(manifest["latent_shape"])
    val vaeScalingFactor = manifest["vae_scaling_factor"].number.toFloat()

    init {
        // What would make a sample long. All other ways to draw are in the plan.
        if (latentShape[0] != 1L) refuse("pictures in batches of ${latentShape[0]}", "with --batch 1")
        if (CONTROLNET in graphs.keys) refuse("a ControlNet", "without --controlnet")
        val decoded = sides(graphs[VAE_DECODER]["inputs"].list[0]["shape"])
        if (decoded != latentShape) refuse("a VAE that decodes tiles", "without --vae-tile")
    }

    /** The names of what a graph takes. */
    fun inputs(graph: String): List<String> = graphs[graph]["inputs"].list.map { it["name"].text }

    fun tokenizer(): Tokenizer {
        val json = Json.parse(read("tokenizer/tokenizer.json"), "tokenizer.json")
        return Tokenizer(json, manifest["text_shape"].list[1].int, manifest["text_chunks"].int)
    }

    /**
     * The contexts for `htp`, the SHA-256 of every file checked; null takes the only ones there are.
     *
     * `sdk` is the version of Qualcomm's libraries in the app: older ones do not open newer contexts.
     */
    fun form(htp: String?, sdk: String): Form {
        val compiled = manifest["compiled"]
        val there = compiled.keys.filter { it.startsWith(PREFIX) }.associateBy { it.removePrefix(PREFIX) }
        val folder = if (htp == null) there.values.singleOrNull() else there[htp]
        if (folder == null) {
            throw Failure(
                "the bundle has contexts for ${there.keys}; this chip's HTP is ${htp ?: "not known"}",
                if (htp == null) "Name its architecture (README.md)."
                else "Make them: tiue-export qnn --bundle BUNDLE --htp ${htp.drop(1)}",
            )
        }
        val form = compiled[folder]
        val version = form["version"].text
        if (release(version) > release(sdk)) {
            throw Failure(
                "the contexts were compiled by Qualcomm's SDK $version, the app has the older $sdk",
                "Raise qnnRuntime in app/build.gradle.kts, or compile by the app's SDK (README.md).",
            )
        }
        val contexts = form["graphs"].keys.associateWith { graph ->
            val record = form["graphs"][graph]
            for (name in record["files"].keys) verify(name, record["files"][name]["sha256"].text)
            File(this.folder, record["path"].text)
        }
        return Form(form["target"]["htp"].text, form["flags"]["decoder_steps"].int, contexts)
    }

    private fun read(name: String) = file(name).readText()

    private fun file(name: String) = File(folder, name).takeIf { it.isFile }
        ?: throw Failure("$folder has no $name", "Copy the bundle there (README.md).")

    private fun verify(name: String, sha256: String) {
        val digest = MessageDigest.getInstance("SHA-256")
        file(name).forEachBlock(1 shl 20) { block, size -> digest.update(block, 0, size) }
        if (digest.digest().joinToString("") { "%02x".format(it) } != sha256) {
            throw Failure("$name was altered: its SHA-256 is not the manifest's", "Copy the bundle again.")
        }
    }

    private fun refuse(what: String, how: String): Nothing =
        throw Failure("the bundle has $what, which this sample does not draw", "Export it again $how.")

    private companion object {
        const val PREFIX = "qnn-"

        fun sides(shape: Json) = shape.list.map { it.int.toLong() }

        // Maven's package leaves out point releases: 2.50.0 stands for SDK 2.50.40 too.
        fun release(version: String) = version.split(".").map(String::toInt).let { it[0] * 1000 + it[1] }
    }
}
