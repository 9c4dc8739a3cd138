/* The creator of Int4GemmPlugin.
 *
 * Enter: a node's name and fields. Leaves: a plugin, or null with the reason in the log. Nothing here knows tensors.
 */
#ifndef LORA_DROP_INT4_GEMM_CREATOR_H
#define LORA_DROP_INT4_GEMM_CREATOR_H

#include <NvInferRuntime.h>

#include "names.h"

namespace lora_drop {

class Int4GemmCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    char const* getPluginName() const noexcept override { return kGEMM_NAME; }
    char const* getPluginVersion() const noexcept override { return kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return kPLUGIN_NAMESPACE; }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    /// Null, with the reason in the log, unless there are two fields, each an int32: block (16, 32, 64 or 128) and
    /// has_zero_points (0 or 1).
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;

  private:
    nvinfer1::PluginField mNames[2]{{"block", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
                                    {"has_zero_points", nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
    nvinfer1::PluginFieldCollection mCollection{2, mNames};
};

} // namespace lora_drop
#endif
