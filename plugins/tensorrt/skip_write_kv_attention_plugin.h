/* TensorRT plugin `SkipWriteKVAttention`, version "1", namespace "lora_drop": the glue between TensorRT and the kernel
 * of kernels/skip_write_kv_attention.h, which says what is computed. Here is only how TensorRT hands it over.
 *
 * The parts, each without knowledge of those after it:
 *
 *     log.h                               messages and refusals
 *     fields.h                            the fields, and the ONNX attributes that they are
 *     tensors.h                           the inputs and outputs: type and shape of each, their order
 *     types_and_shapes.h                  the checker of types and shapes
 *     device.h                            what the kernel is told and asked, its launch
 *     this file                           TensorRT's questions, each answered from the parts above
 *     skip_write_kv_attention_creator.h   how TensorRT finds the plugin
 *
 * Enter: Fields; descriptors, pointers and a stream of TensorRT. Leave: answers, and work on the stream. Nothing here
 * knows what the kernel computes or which sizes it takes.
 *
 * In place. The kernel updates the cache and copies nothing, so past and present must be one address:
 *
 *     alias = 1    getAliasedInput says so; needs PreviewFeature::kALIASED_PLUGIN_IO_10_03 when the engine is built
 *     alias = 0    TensorRT is not told, and the caller binds past and present to one address: declaring the alias can
 *                  make the compiler keep a copy of the cache
 *
 * Different addresses are refused, whatever alias says, with one exception: while an engine is built, TensorRT may time
 * a plugin on scratch memory, where past and present differ. Such a call launches nothing and succeeds; the plugin has
 * one tactic and, in a strongly typed network, one format combination, so its time decides nothing. The plugin of a
 * deserialized engine never takes this path: TensorRT creates it for TensorRTPhase::kRUNTIME. With alias = 1 the timing
 * does launch, on inputs of arbitrary contents: the kernel must stay inside its buffers for any length and count.
 *
 * present_key and present_value must be outputs of the network, or TensorRT puts them where it likes.
 *
 * Built without a GPU or driver, getWorkspaceSize plans for kFALLBACK_MULTIPROCESSORS.
 */
#ifndef LORA_DROP_SKIP_WRITE_KV_ATTENTION_PLUGIN_H
#define LORA_DROP_SKIP_WRITE_KV_ATTENTION_PLUGIN_H

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/skip_write_kv_attention.h"
#include "device.h"
#include "fields.h"
#include "names.h"
#include "tensors.h"
#include "types_and_shapes.h"

namespace lora_drop {

class SkipWriteKVAttentionPlugin final : public nvinfer1::IPluginV3,
                                         public nvinfer1::IPluginV3OneCore,
                                         public nvinfer1::IPluginV3OneBuildV2,
                                         public nvinfer1::IPluginV3OneRuntime {
  public:
    SkipWriteKVAttentionPlugin(Fields const& fields, nvinfer1::TensorRTPhase phase);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kPLUGIN_NAME; }
    char const* getPluginVersion() const noexcept override { return kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return kPLUGIN_NAMESPACE; }

    // IPluginV3OneBuildV2
    int32_t getNbOutputs() const noexcept override { return kNB_OUTPUTS; }
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t nb_outputs,
                               nvinfer1::DataType const* input_types, int32_t nb_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                            nvinfer1::DimsExprs const* shape_inputs, int32_t nb_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* in_out, int32_t nb_inputs,
                                   int32_t nb_outputs) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nb_outputs) const noexcept override;
    char const* getTimingCacheID() noexcept override { return mDescription.c_str(); }
    char const* getMetadataString() noexcept override { return mDescription.c_str(); }

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nb_inputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t nb_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  private:
    /// Throws std::invalid_argument unless the tensors are those of a node with these fields.
    template <typename Desc>
    Sizes sizesOf(Desc const* in, int32_t nb_inputs, Desc const* out, int32_t nb_outputs, bool may_be_dynamic) const;
    /// The sizes of a profile's largest call. Throws when the kernel would refuse it.
    Sizes largestSizesOf(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                         nvinfer1::DynamicPluginTensorDesc const* out, int32_t nb_outputs) const;
    LoraDropAttention callWithPointers(Sizes const& sizes, void const* const* inputs, void* const* outputs,
                                       void* workspace) const;

    Fields mFields;
    nvinfer1::TensorRTPhase mPhase;
    Positions mPositions;
    std::string mDescription; // all fields, as `name=value`
    std::vector<nvinfer1::PluginField> mSerialized;
    nvinfer1::PluginFieldCollection mSerializedCollection{};
};

} // namespace lora_drop
#endif
