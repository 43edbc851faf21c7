package tiue.sample

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtHardwareDevice.OrtHardwareDeviceType
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import android.system.Os
import android.util.Half
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer

/**
 * A form's contexts on the NPU, each opened on first use and kept, by ONNX Runtime and Qualcomm's plug-in.
 *
 * `libraries` is the folder of the app's native libraries.
 */
class QnnGraphs(private val form: Form, private val libraries: String) : Graphs, AutoCloseable {
    private val environment = environment(libraries)
    private val options = options()
    private val sessions = HashMap<String, OrtSession>()

    override fun run(graph: String, feeds: Map<String, Tensor>): Map<String, Tensor> {
        val inputs = HashMap<String, OnnxTensor>()
        try {
            val session = sessions.getOrPut(graph) {
                environment.createSession(form.contexts.getValue(graph).path, options)
            }
            for ((name, tensor) in feeds) {
                inputs[name] = onnxTensor(tensor, (session.inputInfo.getValue(name).info as TensorInfo).type)
            }
            session.run(inputs).use { outputs -> return outputs.associate { it.key to tensor(it.value as OnnxTensor) } }
        } catch (error: OrtException) {
            throw Failure("the NPU failed in $graph: ${error.message}", "See adb logcat, and README.md.")
        } finally {
            inputs.values.forEach(OnnxTensor::close)
        }
    }

    private fun options() = OrtSession.SessionOptions().apply {
        val npu = environment.epDevices.filter { it.epName == PROVIDER && it.device.type == OrtHardwareDeviceType.NPU }
        if (npu.isEmpty()) throw Failure("$PROVIDER finds no NPU", "It needs a Snapdragon phone with Android 12.")
        // Nothing may be left to ONNX Runtime's CPU kernels in silence.
        addConfigEntry("session.disable_cpu_ep_fallback", "1")
        // Burst: the clock of a picture's second, not of a video's hour.
        val settings = mapOf("backend_path" to "$libraries/libQnnHtp.so", "htp_performance_mode" to "burst")
        addExecutionProvider(npu.take(1), settings)
    }

    private fun onnxTensor(tensor: Tensor, type: OnnxJavaType): OnnxTensor {
        val values = tensor.values
        val shape = tensor.shape.toLongArray()
        return when (type) {
            OnnxJavaType.INT64 -> {
                val whole = LongArray(values.size) { values[it].toLong() }
                OnnxTensor.createTensor(environment, LongBuffer.wrap(whole), shape)
            }
            OnnxJavaType.FLOAT16 -> {
                val halves = ShortBuffer.wrap(ShortArray(values.size) { Half.toHalf(values[it]) })
                OnnxTensor.createTensor(environment, halves, shape, type)
            }
            else -> OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), shape)
        }
    }

    /** Half precision becomes float on the way. */
    private fun tensor(output: OnnxTensor) =
        Tensor(output.info.shape.toList(), output.floatBuffer.let { FloatArray(it.remaining()).also(it::get) })

    override fun close() {
        sessions.values.forEach(OrtSession::close)
        options.close()  // after its sessions, as ONNX Runtime asks
    }

    private companion object {
        const val PROVIDER = "QNNExecutionProvider"
        var registered = false

        /** The plug-in is registered once in a process. */
        @Synchronized
        fun environment(libraries: String): OrtEnvironment {
            // Where the processor looks for its half of the libraries; before any of them is loaded.
            if (!registered) Os.setenv("ADSP_LIBRARY_PATH", libraries, true)
            val environment = OrtEnvironment.getEnvironment()
            if (!registered) {
                environment.registerExecutionProviderLibrary(PROVIDER, "libonnxruntime_providers_qnn.so")
            }
            registered = true
            return environment
        }
    }
}
