/* The two symbols that TensorRT's IPluginRegistry::loadLibrary looks for: its ways into this library. */
#include <NvInferRuntime.h>

#include <cstdint>
#include <iterator>

#include "int4_gemm_creator.h"
#include "log.h"
#include "skip_write_kv_attention_creator.h"

extern "C" {

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nb_creators) {
    static lora_drop::SkipWriteKVAttentionCreator attention;
    static lora_drop::Int4GemmCreator gemm;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &gemm};
    nb_creators = static_cast<int32_t>(std::size(creators));
    return creators;
}

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    lora_drop::setFinder(finder);
}

} // extern "C"
