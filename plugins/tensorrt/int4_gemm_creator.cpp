#include "int4_gemm_creator.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "int4_gemm_plugin.h"
#include "log.h"

namespace lora_drop {
namespace {

/// The value of the one field of a name.
int32_t valueOf(char const* name, nvinfer1::PluginFieldCollection const* fields) {
    nvinfer1::PluginField const* found = nullptr;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
        if (fields->fields[i].name != nullptr && std::strcmp(fields->fields[i].name, name) == 0)
            found = &fields->fields[i];
    if (found == nullptr || fields->nbFields != 2)
        refuse("expected two fields: block and has_zero_points");
    if (found->type != nvinfer1::PluginFieldType::kINT32 || found->length != 1 || found->data == nullptr)
        refuse("field ", name, " has ", found->length, " values of PluginFieldType ",
               static_cast<int32_t>(found->type), "; expected one int32");
    int32_t value{0};
    std::memcpy(&value, found->data, sizeof(value));
    return value;
}

} // namespace

nvinfer1::IPluginV3* Int4GemmCreator::createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                                   nvinfer1::TensorRTPhase) noexcept {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
        try {
            return new Int4GemmPlugin{{valueOf("block", fields), valueOf("has_zero_points", fields)}};
        } catch (std::invalid_argument const& error) {
            refuse("`", name == nullptr ? "" : name, "`: ", error.what());
        }
    }, kGEMM_NAME);
}

} // namespace lora_drop
