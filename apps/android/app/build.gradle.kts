plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

// Those that compiled and emulated the contexts (constraints.txt). Contexts do not open in an older runtime.
val onnxRuntime = "1.31.1"
val qnnPlugin = "2.7.0"
val qnnRuntime = "2.51.0"

android {
    namespace = "tiue.sample"
    compileSdk = 35

    defaultConfig {
        applicationId = "tiue.sample"
        // Build.SOC_MODEL, and the property by which the plug-in knows a Snapdragon, came with 31.
        minSdk = 31
        targetSdk = 35
        versionCode = 1
        versionName = "1"
        ndk { abiFilters += "arm64-v8a" }
        buildConfigField("String", "QNN_SDK", "\"$qnnRuntime\"")
    }
    buildFeatures { buildConfig = true }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
    // The processor opens its libraries as files: they must be unpacked when the app is installed.
    packaging { jniLibs { useLegacyPackaging = true } }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:$onnxRuntime")
    implementation("com.qualcomm.qti:onnxruntime-android-qnn:$qnnPlugin")
    implementation("com.qualcomm.qti:qnn-runtime:$qnnRuntime")
}
