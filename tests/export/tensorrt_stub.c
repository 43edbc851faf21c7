/* What the bindings of TensorRT 10 and 11 look up in its libraries when Python imports them. Built at
   test time as libnvinfer, libnvinfer_plugin and libnvonnxparser: classes and enums of the bindings
   are then the real ones, and every factory gives nothing, as without a GPU. */
#define FACTORY(name) void *name(void) { return (void *)0; }

FACTORY(createInferBuilder_INTERNAL)
FACTORY(createInferRefitter_INTERNAL)
FACTORY(createInferRuntime_INTERNAL)
FACTORY(createNvOnnxParser_INTERNAL)
FACTORY(createNvOnnxParserRefitter_INTERNAL)
FACTORY(getBuilderPluginRegistry)
FACTORY(getPluginRegistry)
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
