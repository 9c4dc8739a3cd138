/* TensorRT plugin `Int4Gemm`, version "1", namespace "lora_drop": the glue between TensorRT and kernels/int4_gemm.h,
 * which says what is computed.
 *
 * Weights are inputs, so that two engines share one copy of them; TensorRT itself takes int4 weights as constants
 * alone.
 *
 *     field block             int32: 16, 32, 64 or 128 weights that share a scale
 *     field has_zero_points   int32: 0 or 1
 *
 *     x            [..., K]              T       at least 2 axes; all but the last are rows
 *     weights      [N, K / 2]            int8    two nibbles a byte, as the header says
 *     scales       [N, K / block]        T
 *     zero_points  [N, K / block / 2]    int8    two nibbles a byte; has_zero_points = 1
 *     output y     [..., N]              T
 *
 * T is float16 or bfloat16. All formats are linear. N and K are fixed, the rows may be dynamic.
 */
#ifndef LORA_DROP_INT4_GEMM_PLUGIN_H
#define LORA_DROP_INT4_GEMM_PLUGIN_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "../kernels/int4_gemm.h"
#include "names.h"

namespace lora_drop {

class Int4GemmPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuildV2,
                             public nvinfer1::IPluginV3OneRuntime {
  public:
    enum Tensor : int32_t { kX, kWEIGHTS, kSCALES, kZERO_POINTS, kY, kNB_TENSORS };

    struct Fields {
        int32_t block{0};
        int32_t has_zero_points{0};
    };

    /// Throws std::invalid_argument for a block that the kernel refuses, and for a flag that is neither 0 nor 1.
    explicit Int4GemmPlugin(Fields const& fields);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kGEMM_NAME; }
    char const* getPluginVersion() const noexcept override { return kPLUGIN_VERSION; }
    char const* getPluginNamespace() const noexcept override { return kPLUGIN_NAMESPACE; }

    // IPluginV3OneBuildV2
    int32_t getNbOutputs() const noexcept override { return 1; }
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
    char const* getTimingCacheID() noexcept override { return mDescription.c_str(); }
    char const* getMetadataString() noexcept override { return mDescription.c_str(); }

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nb_inputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t nb_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mCollection; }

  private:
    int32_t nbInputs() const { return kZERO_POINTS + mFields.has_zero_points; }
    /// Throws std::invalid_argument when a node has another number of tensors.
    void requireNumbers(int32_t nb_inputs, int32_t nb_outputs) const;
    /// The call of these tensors, without pointers; zero_points are null where there are none. Throws
    /// std::invalid_argument for other types and shapes.
    LoraDropInt4Gemm callOf(nvinfer1::PluginTensorDesc const* const (&descs)[kNB_TENSORS]) const;

    Fields mFields;
    std::string mDescription;
    nvinfer1::PluginField mSerialized[2];
    nvinfer1::PluginFieldCollection mCollection;
};

} // namespace lora_drop
#endif
