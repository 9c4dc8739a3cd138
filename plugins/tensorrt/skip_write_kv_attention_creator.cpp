#include "skip_write_kv_attention_creator.h"

#include <stdexcept>

#include "fields.h"
#include "log.h"
#include "skip_write_kv_attention_plugin.h"

namespace lora_drop {

SkipWriteKVAttentionCreator::SkipWriteKVAttentionCreator() : mNames{advertisedFields()} {
    mCollection = {static_cast<int32_t>(mNames.size()), mNames.data()};
}

nvinfer1::IPluginV3* SkipWriteKVAttentionCreator::createPlugin(char const* name,
                                                               nvinfer1::PluginFieldCollection const* fields,
                                                               nvinfer1::TensorRTPhase phase) noexcept {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
        try {
            return new SkipWriteKVAttentionPlugin{parseFields(fields), phase};
        } catch (std::invalid_argument const& error) {
            refuse("`", name == nullptr ? "" : name, "`: ", error.what());
        }
    });
}

} // namespace lora_drop
