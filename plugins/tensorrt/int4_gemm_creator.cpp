#include "int4_gemm_creator.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "int4_gemm_plugin.h"
#include "log.h"

namespace lora_drop {
namespace {

int32_t blockOf(nvinfer1::PluginFieldCollection const* fields) {
    if (fields == nullptr || fields->nbFields != 1 || fields->fields[0].name == nullptr
        || std::strcmp(fields->fields[0].name, "block") != 0)
        refuse("expected one field: block");
    nvinfer1::PluginField const& field = fields->fields[0];
    if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr)
        refuse("field block has ", field.length, " values of PluginFieldType ", static_cast<int32_t>(field.type),
               "; expected one int32");
    int32_t block{0};
    std::memcpy(&block, field.data, sizeof(block));
    return block;
}

} // namespace

nvinfer1::IPluginV3* Int4GemmCreator::createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                                   nvinfer1::TensorRTPhase) noexcept {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
        try {
            return new Int4GemmPlugin{blockOf(fields)};
        } catch (std::invalid_argument const& error) {
            refuse("`", name == nullptr ? "" : name, "`: ", error.what());
        }
    }, kGEMM_NAME);
}

} // namespace lora_drop
