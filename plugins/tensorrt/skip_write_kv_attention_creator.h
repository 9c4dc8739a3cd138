/* The creator of SkipWriteKVAttentionPlugin.
 *
 * Enter: a node's name and fields, the phase. Leaves: a plugin, or null with the reason in
 * the log. Nothing here knows tensors or the device.
 */
#ifndef LORA_DROP_SKIP_WRITE_KV_ATTENTION_CREATOR_H
#define LORA_DROP_SKIP_WRITE_KV_ATTENTION_CREATOR_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <vector>

#include "names.h"

namespace lora_drop {

class SkipWriteKVAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    SkipWriteKVAttentionCreator();
    char const* getPluginName() const noexcept override { return kPLUGIN_NAME; }
    char const* getPluginVersion() const noexcept override { return kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return kPLUGIN_NAMESPACE; }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    /// Null, with the reason in the log, for a field that is missing, unknown, of another type or of another value.
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;

  private:
    std::vector<nvinfer1::PluginField> mNames;
    nvinfer1::PluginFieldCollection mCollection{};
};

} // namespace lora_drop
#endif
