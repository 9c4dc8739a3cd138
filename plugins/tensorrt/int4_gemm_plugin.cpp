#include "int4_gemm_plugin.h"

#include <cuda_runtime_api.h>

#include <limits>

#include "log.h"
#include "types_and_shapes.h"

namespace lora_drop {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

constexpr char const* kTENSOR_NAMES[] = {"x", "weights", "scales", "zero_points", "y"};

bool gemmTypeFits(int32_t tensor, DataType type, DataType x) {
    switch (tensor) {
    case Int4GemmPlugin::kX: return type == DataType::kHALF || type == DataType::kBF16;
    case Int4GemmPlugin::kWEIGHTS:
    case Int4GemmPlugin::kZERO_POINTS: return type == DataType::kINT8;
    default: return type == x;
    }
}

int32_t whole(int64_t size) {
    return size < 0 || size > std::numeric_limits<int32_t>::max() ? 0 : static_cast<int32_t>(size); // 0 is refused
}

/// Sizes before there is memory.
void requireKernelTakes(LoraDropInt4Gemm call) {
    alignas(16) static char nowhere[16];
    call.x = call.weights = call.scales = call.y = nowhere;
    if (char const* const problem = lora_drop_int4_gemm_problem(&call))
        refuse(problem, "; rows ", call.rows, ", inputs ", call.inputs, ", outputs ", call.outputs, ", block ",
               call.block);
}

/// The largest of a profile where a size is not fixed.
PluginTensorDesc largest(DynamicPluginTensorDesc const& tensor) {
    PluginTensorDesc desc = tensor.desc;
    desc.dims = tensor.max;
    return desc;
}

} // namespace

Int4GemmPlugin::Int4GemmPlugin(Fields const& fields)
    : mFields{fields}, mDescription{"block=" + std::to_string(fields.block)
                                    + " has_zero_points=" + std::to_string(fields.has_zero_points)},
      mSerialized{{"block", &mFields.block, nvinfer1::PluginFieldType::kINT32, 1},
                  {"has_zero_points", &mFields.has_zero_points, nvinfer1::PluginFieldType::kINT32, 1}},
      mCollection{2, mSerialized} {
    requireKernelTakes({1, 2 * fields.block, 1, fields.block, LORA_DROP_F16, nullptr, nullptr, nullptr, nullptr, nullptr});
    if (fields.has_zero_points != 0 && fields.has_zero_points != 1)
        refuse("has_zero_points is ", fields.has_zero_points, "; expected 0 or 1");
}

void Int4GemmPlugin::requireNumbers(int32_t nb_inputs, int32_t nb_outputs) const {
    if (nb_inputs != nbInputs() || nb_outputs != 1)
        refuse(nb_inputs, " inputs and ", nb_outputs, " outputs; expected x, weights, scales",
               mFields.has_zero_points ? ", zero_points" : "", " and y");
}

nvinfer1::IPluginCapability*
Int4GemmPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Int4GemmPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [&] { return new Int4GemmPlugin{mFields}; }, kGEMM_NAME);
}

int32_t Int4GemmPlugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs, DataType const* input_types,
                                           int32_t nb_inputs) const noexcept {
    return guarded("getOutputDataTypes", -1, [&] {
        requireNumbers(nb_inputs, nb_outputs);
        output_types[0] = input_types[kX];
        return 0;
    }, kGEMM_NAME);
}

int32_t Int4GemmPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                                        nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                        int32_t nb_outputs, nvinfer1::IExprBuilder&) noexcept {
    return guarded("getOutputShapes", -1, [&] {
        requireNumbers(nb_inputs, nb_outputs);
        if (inputs[kX].nbDims < 2 || inputs[kWEIGHTS].nbDims != 2)
            refuse("x has ", inputs[kX].nbDims, " axes and weights ", inputs[kWEIGHTS].nbDims,
                   "; expected at least 2, and 2");
        outputs[0] = inputs[kX];
        outputs[0].d[outputs[0].nbDims - 1] = inputs[kWEIGHTS].d[0];
        return 0;
    }, kGEMM_NAME);
}

bool Int4GemmPlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* in_out, int32_t nb_inputs,
                                               int32_t nb_outputs) noexcept {
    if (nb_inputs != nbInputs() || nb_outputs != 1 || pos < 0 || pos > nb_inputs)
        return false;
    return in_out[pos].desc.format == TensorFormat::kLINEAR
        && gemmTypeFits(pos == nb_inputs ? kY : pos, in_out[pos].desc.type, in_out[kX].desc.type);
}

LoraDropInt4Gemm Int4GemmPlugin::callOf(PluginTensorDesc const* const (&descs)[kNB_TENSORS]) const {
    PluginTensorDesc const& x = *descs[kX];
    for (int32_t tensor = 0; tensor < kNB_TENSORS; ++tensor)
        if (descs[tensor] != nullptr
            && (descs[tensor]->format != TensorFormat::kLINEAR || !gemmTypeFits(tensor, descs[tensor]->type, x.type)))
            refuse(kTENSOR_NAMES[tensor], " is ", typeName(descs[tensor]->type), " in TensorFormat ",
                   static_cast<int32_t>(descs[tensor]->format), ", where x is ", typeName(x.type));
    Dims const& weights = descs[kWEIGHTS]->dims;
    Dims const& scales = descs[kSCALES]->dims;
    Dims const& y = descs[kY]->dims;
    int32_t const last = x.dims.nbDims - 1;
    if (last < 1 || weights.nbDims != 2 || scales.nbDims != 2 || y.nbDims != x.dims.nbDims)
        refuse("x, weights, scales and y have ", x.dims.nbDims, ", ", weights.nbDims, ", ", scales.nbDims, " and ",
               y.nbDims, " axes; expected as many of y as of x, at least 2, and 2 of the others");
    int64_t const inputs = x.dims.d[last];
    int64_t const outputs = weights.d[0];
    int64_t rows{1};
    bool fits = weights.d[1] * 2 == inputs && scales.d[0] == outputs && scales.d[1] * mFields.block == inputs
        && y.d[last] == outputs;
    for (int32_t axis = 0; axis < last; ++axis) {
        rows *= x.dims.d[axis];
        fits = fits && x.dims.d[axis] >= 0 && y.d[axis] == x.dims.d[axis]; // −1: not known yet
    }
    if (!fits)
        refuse("x has ", rows, " rows and ", inputs, " inputs; weights [", weights.d[0], ", ", weights.d[1],
               "], scales [", scales.d[0], ", ", scales.d[1], "] and ", y.d[last],
               " outputs do not fit it with block ", mFields.block);
    if (descs[kZERO_POINTS] != nullptr) {
        Dims const& points = descs[kZERO_POINTS]->dims;
        if (points.nbDims != 2 || points.d[0] != outputs || points.d[1] * 2 != scales.d[1])
            refuse("zero_points have ", points.nbDims, " axes of ", points.d[0], " and ", points.nbDims < 2 ? 0 : points.d[1],
                   "; expected ", outputs, " and half of ", scales.d[1]);
    }
    LoraDropInt4Gemm call{};
    call.rows = whole(rows);
    call.inputs = whole(inputs);
    call.outputs = whole(outputs);
    call.block = mFields.block;
    call.dtype = x.type == DataType::kHALF ? LORA_DROP_F16 : LORA_DROP_BF16;
    return call;
}

int32_t Int4GemmPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                        DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    return guarded("configurePlugin", -1, [&] {
        requireNumbers(nb_inputs, nb_outputs);
        PluginTensorDesc const x = largest(in[kX]);
        PluginTensorDesc const y = largest(out[0]);
        PluginTensorDesc const* const points = mFields.has_zero_points ? &in[kZERO_POINTS].desc : nullptr;
        requireKernelTakes(callOf({&x, &in[kWEIGHTS].desc, &in[kSCALES].desc, points, &y}));
        return 0;
    }, kGEMM_NAME);
}

int32_t Int4GemmPlugin::onShapeChange(PluginTensorDesc const* in, int32_t nb_inputs, PluginTensorDesc const* out,
                                      int32_t nb_outputs) noexcept {
    return guarded("onShapeChange", -1, [&] {
        requireNumbers(nb_inputs, nb_outputs);
        PluginTensorDesc const* const points = mFields.has_zero_points ? &in[kZERO_POINTS] : nullptr;
        requireKernelTakes(callOf({&in[kX], &in[kWEIGHTS], &in[kSCALES], points, &out[0]}));
        return 0;
    }, kGEMM_NAME);
}

int32_t Int4GemmPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                                void const* const* inputs, void* const* outputs, void*,
                                cudaStream_t stream) noexcept {
    return guarded("enqueue", -1, [&] {
        PluginTensorDesc const* const points = mFields.has_zero_points ? &input_desc[kZERO_POINTS] : nullptr;
        LoraDropInt4Gemm call
            = callOf({&input_desc[kX], &input_desc[kWEIGHTS], &input_desc[kSCALES], points, &output_desc[0]});
        call.x = inputs[kX];
        call.weights = inputs[kWEIGHTS];
        call.scales = inputs[kSCALES];
        call.zero_points = points == nullptr ? nullptr : inputs[kZERO_POINTS];
        call.y = outputs[0];
        if (char const* const problem = lora_drop_int4_gemm_problem(&call))
            refuse(problem, "; ", mDescription);
        int const status = lora_drop_int4_gemm(&call, stream);
        if (status != cudaSuccess)
            refuse("CUDA error ", status, ": ", cudaGetErrorString(static_cast<cudaError_t>(status)));
        return 0;
    }, kGEMM_NAME);
}

} // namespace lora_drop
