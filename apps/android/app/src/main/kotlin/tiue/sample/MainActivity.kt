package tiue.sample

import android.app.Activity
import android.graphics.Bitmap
import android.os.Build
import android.os.Bundle as State
import android.widget.Button
import android.widget.EditText
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

/** A prompt, a button, a picture. */
class MainActivity : Activity() {
    // One at a time, and never on the thread that draws the screen.
    private val worker = Executors.newSingleThreadExecutor()
    private var graphs: QnnGraphs? = null
    private var drawing: Drawing? = null
    private var seed = 0L

    override fun onCreate(state: State?) {
        super.onCreate(state)
        val prompt = EditText(this).apply { hint = "a red fox in the snow" }
        val draw = Button(this).apply { text = "Draw" }
        val status = TextView(this)
        val image = ImageView(this).apply { adjustViewBounds = true }
        val column = LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true
        }
        listOf(prompt, draw, status, image).forEach(column::addView)
        setContentView(column)
        draw.setOnClickListener {
            draw.isEnabled = false
            val words = prompt.text.toString().ifEmpty { prompt.hint.toString() }
            worker.execute {
                val start = System.nanoTime()
                val drawn = runCatching {
                    opened().draw(words, seed) { done, total -> runOnUiThread { status.text = "$done of $total" } }
                }
                val milliseconds = (System.nanoTime() - start) / 1_000_000
                runOnUiThread {
                    drawn.onSuccess {
                        image.setImageBitmap(bitmap(it))
                        status.text = "seed ${seed++}, $milliseconds ms (the first time with opening)"
                    }
                    drawn.onFailure { status.text = it.message ?: it.toString() }
                    draw.isEnabled = true
                }
            }
        }
    }

    /** For a chip that is not known: adb shell am start -n tiue.sample/.MainActivity --es htp v75 */
    private fun opened(): Drawing = drawing ?: run {
        val bundle = Bundle(File(filesDir, "bundle"))
        val form = bundle.form(intent.getStringExtra("htp") ?: htpOf(Build.SOC_MODEL), BuildConfig.QNN_SDK)
        val npu = graphs ?: QnnGraphs(form, applicationInfo.nativeLibraryDir).also { graphs = it }
        Drawing(bundle, npu, form.decoderSteps).also { drawing = it }
    }

    private fun bitmap(picture: Picture) =
        Bitmap.createBitmap(picture.pixels, picture.width, picture.height, Bitmap.Config.ARGB_8888)

    override fun onDestroy() {
        worker.execute { graphs?.close() }
        worker.shutdown()
        super.onDestroy()
    }
}
