#include "skip_write_kv_attention_plugin.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>

#include "log.h"

namespace lora_drop {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::ILogger;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

// ---- device ---------------------------------------------------------------------------------------------------------

/// SMs of the current device. Without a GPU or driver: the fallback, and no CUDA error left behind.
int32_t deviceMultiprocessors() noexcept {
    int device{0};
    int count{0};
    if (cudaGetDevice(&device) == cudaSuccess
        && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0)
        return count;
    cudaGetLastError();
    log(ILogger::Severity::kINFO,
        "no GPU or no driver; the workspace is planned for " + std::to_string(kFALLBACK_MULTIPROCESSORS) + " SMs");
    return kFALLBACK_MULTIPROCESSORS;
}

int32_t kernelType(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return LORA_DROP_F32;
    case DataType::kHALF: return LORA_DROP_F16;
    case DataType::kBF16: return LORA_DROP_BF16;
    case DataType::kFP8: return LORA_DROP_F8_E4M3;
    case DataType::kINT8: return LORA_DROP_I8;
    default: refuse("the kernel has no ", typeName(type));
    }
}

/// Every pointer that these fields call for, as a non-null one: for checks of sizes before there is memory.
void setStandInPointers(LoraDropAttention& call, Fields const& fields) {
    alignas(256) static char nowhere[256];
    call.query = call.key = call.value = nowhere;
    call.key_cache = call.value_cache = call.output = call.workspace = nowhere;
    call.length = reinterpret_cast<int64_t const*>(nowhere);
    if (fields.has_count != 0)
        call.count = call.length;
    if (fields.rotary_dim > 0)
        call.cos = call.sin = nowhere;
    if (fields.has_norm != 0)
        call.q_norm = call.k_norm = nowhere;
    if (fields.has_kv_scale != 0)
        call.k_scale = call.v_scale = reinterpret_cast<float const*>(nowhere);
}

} // namespace

// ---- plugin ---------------------------------------------------------------------------------------------------------

SkipWriteKVAttentionPlugin::SkipWriteKVAttentionPlugin(Fields const& fields, TensorRTPhase phase)
    : mFields{fields}, mPhase{phase}, mPositions{fields} {
    if (mFields.multiprocessors == 0)
        mFields.multiprocessors = deviceMultiprocessors();
    mDescription = describe(mFields);
    // What the kernel itself refuses, as early as possible
    LoraDropAttention call = callOfFields();
    call.batch = call.new_tokens = call.slots = 1;
    call.dtype = LORA_DROP_F32;
    call.kv_dtype = fields.has_kv_scale != 0 ? LORA_DROP_I8 : LORA_DROP_F32;
    setStandInPointers(call, fields);
    if (char const* const problem = lora_drop_attention_problem(&call))
        refuse(problem, "; the fields are ", mDescription);
}

LoraDropAttention SkipWriteKVAttentionPlugin::callOfFields() const {
    LoraDropAttention call{};
    call.heads = mFields.heads;
    call.kv_heads = mFields.kv_heads;
    call.head_dim = mFields.head_dim;
    call.rotary_dim = mFields.rotary_dim;
    call.interleaved = mFields.interleaved;
    call.window = mFields.window;
    call.scale = mFields.scale;
    call.softcap = mFields.softcap;
    call.norm_epsilon = mFields.norm_epsilon;
    return call;
}

nvinfer1::IPluginCapability*
SkipWriteKVAttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* SkipWriteKVAttentionPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>("clone", nullptr,
                                         [&] { return new SkipWriteKVAttentionPlugin{mFields, mPhase}; });
}

nvinfer1::IPluginV3* SkipWriteKVAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone(); // nothing is kept per context
}

PluginFieldCollection const* SkipWriteKVAttentionPlugin::getFieldsToSerialize() noexcept {
    return guarded<PluginFieldCollection const*>("getFieldsToSerialize", nullptr, [&] {
        mSerialized = serializedFields(mFields);
        mSerializedCollection = {static_cast<int32_t>(mSerialized.size()), mSerialized.data()};
        return &mSerializedCollection;
    });
}

int32_t SkipWriteKVAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    if (mFields.alias == 0)
        return -1;
    switch (output) {
    case kOUT_PRESENT_KEY: return mPositions[kIN_PAST_KEY];
    case kOUT_PRESENT_VALUE: return mPositions[kIN_PAST_VALUE];
    default: return -1;
    }
}

int32_t SkipWriteKVAttentionPlugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs,
                                                       DataType const* input_types, int32_t nb_inputs) const noexcept {
    return guarded("getOutputDataTypes", -1, [&] {
        mPositions.requireNumbers(nb_inputs, nb_outputs, mFields);
        output_types[kOUT_ATTENTION] = input_types[mPositions[kIN_QUERY]];
        output_types[kOUT_PRESENT_KEY] = input_types[mPositions[kIN_PAST_KEY]];
        output_types[kOUT_PRESENT_VALUE] = input_types[mPositions[kIN_PAST_VALUE]];
        return 0;
    });
}

int32_t SkipWriteKVAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                                                    nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                                    int32_t nb_outputs, nvinfer1::IExprBuilder&) noexcept {
    return guarded("getOutputShapes", -1, [&] {
        mPositions.requireNumbers(nb_inputs, nb_outputs, mFields);
        outputs[kOUT_ATTENTION] = inputs[mPositions[kIN_QUERY]];
        outputs[kOUT_PRESENT_KEY] = inputs[mPositions[kIN_PAST_KEY]];
        outputs[kOUT_PRESENT_VALUE] = inputs[mPositions[kIN_PAST_VALUE]];
        return 0;
    });
}

bool SkipWriteKVAttentionPlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* in_out,
                                                           int32_t nb_inputs, int32_t nb_outputs) noexcept {
    if (nb_inputs != mPositions.nbInputs() || nb_outputs != kNB_OUTPUTS || pos < 0 || pos >= nb_inputs + nb_outputs)
        return false;
    PluginTensorDesc const& desc = in_out[pos].desc;
    if (desc.format != TensorFormat::kLINEAR)
        return false;
    // Only descriptors up to pos are set; query and past_key stand before all whose type depends on them.
    DataType const query = in_out[mPositions[kIN_QUERY]].desc.type;
    DataType const past_key = pos < mPositions[kIN_PAST_KEY] ? desc.type : in_out[mPositions[kIN_PAST_KEY]].desc.type;
    return typeFits(mPositions.tensorAt(pos), desc.type, query, past_key, mFields);
}

template <typename Desc>
Sizes SkipWriteKVAttentionPlugin::sizesOf(Desc const* in, int32_t nb_inputs, Desc const* out, int32_t nb_outputs,
                                          bool may_be_dynamic) const {
    mPositions.requireNumbers(nb_inputs, nb_outputs, mFields);
    return checkedSizes(arrange(mPositions, in, out), mFields, may_be_dynamic);
}

LoraDropAttention SkipWriteKVAttentionPlugin::callOf(Sizes const& sizes) const {
    LoraDropAttention call = callOfFields();
    call.batch = sizes.batch;
    call.new_tokens = sizes.new_tokens;
    call.slots = sizes.slots;
    call.dtype = kernelType(sizes.type);
    call.kv_dtype = kernelType(sizes.cache_type);
    return call;
}

LoraDropAttention SkipWriteKVAttentionPlugin::largestCall(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                          DynamicPluginTensorDesc const* out,
                                                          int32_t nb_outputs) const {
    Sizes const sizes = sizesOf(in, nb_inputs, out, nb_outputs, true);
    LoraDropAttention call
        = callOf(largestSizes(sizes, in[mPositions[kIN_QUERY]], in[mPositions[kIN_PAST_KEY]]));
    setStandInPointers(call, mFields);
    if (char const* const problem = lora_drop_attention_problem(&call))
        refuse(problem, "; batch ", call.batch, ", new tokens ", call.new_tokens, ", slots ", call.slots,
               ", the fields are ", mDescription);
    return call;
}

int32_t SkipWriteKVAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                    DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    return guarded("configurePlugin", -1, [&] {
        largestCall(in, nb_inputs, out, nb_outputs);
        return 0;
    });
}

size_t SkipWriteKVAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                    DynamicPluginTensorDesc const* out,
                                                    int32_t nb_outputs) const noexcept {
    // What configurePlugin would refuse must not pass for a plugin without workspace: it fits no device.
    constexpr size_t kIMPOSSIBLE = size_t{1} << 62;
    return guarded("getWorkspaceSize", kIMPOSSIBLE, [&] {
        // A large problem fills the device without cutting the slots into pieces and may need nothing, a small one is
        // cut: the largest workspace is not the largest problem's. More slots only make more pieces.
        LoraDropAttention call = largestCall(in, nb_inputs, out, nb_outputs);
        int32_t const batch = call.batch;
        int32_t const new_tokens = call.new_tokens;
        size_t bytes{0};
        for (call.batch = 1; call.batch <= batch; ++call.batch)
            for (call.new_tokens = 1; call.new_tokens <= new_tokens; ++call.new_tokens)
                bytes = std::max(bytes, lora_drop_workspace_bytes(&call, mFields.multiprocessors));
        return bytes;
    });
}

int32_t SkipWriteKVAttentionPlugin::onShapeChange(PluginTensorDesc const* in, int32_t nb_inputs,
                                                  PluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    return guarded("onShapeChange", -1, [&] {
        sizesOf(in, nb_inputs, out, nb_outputs, false);
        return 0;
    });
}

int32_t SkipWriteKVAttentionPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                                            void const* const* inputs, void* const* outputs, void* workspace,
                                            cudaStream_t stream) noexcept {
    return guarded("enqueue", -1, [&] {
        LoraDropAttention call
            = callOf(sizesOf(input_desc, mPositions.nbInputs(), output_desc, kNB_OUTPUTS, false));
        auto const pointer = [&](Input what) { return mPositions[what] < 0 ? nullptr : inputs[mPositions[what]]; };
        call.query = pointer(kIN_QUERY);
        call.key = pointer(kIN_KEY);
        call.value = pointer(kIN_VALUE);
        call.cos = pointer(kIN_COS);
        call.sin = pointer(kIN_SIN);
        call.q_norm = pointer(kIN_Q_NORM);
        call.k_norm = pointer(kIN_K_NORM);
        call.k_scale = static_cast<float const*>(pointer(kIN_K_SCALE));
        call.v_scale = static_cast<float const*>(pointer(kIN_V_SCALE));
        call.length = static_cast<int64_t const*>(pointer(kIN_LENGTH));
        call.count = static_cast<int64_t const*>(pointer(kIN_COUNT));
        call.key_cache = outputs[kOUT_PRESENT_KEY];
        call.value_cache = outputs[kOUT_PRESENT_VALUE];
        call.output = outputs[kOUT_ATTENTION];
        call.workspace = workspace;
        if (call.key_cache != pointer(kIN_PAST_KEY) || call.value_cache != pointer(kIN_PAST_VALUE)) {
            if (mPhase == TensorRTPhase::kBUILD) { // the builder's timing runs, on scratch memory: see the header
                log(ILogger::Severity::kVERBOSE, "enqueue: past and present differ; nothing was launched");
                return 0;
            }
            refuse("past_key ", pointer(kIN_PAST_KEY), ", present_key ", call.key_cache, ", past_value ",
                   pointer(kIN_PAST_VALUE), ", present_value ", call.value_cache,
                   " must be one address for keys and one for values: the cache is updated in place. ",
                   mFields.alias != 0 ? "Hint: build with PreviewFeature::kALIASED_PLUGIN_IO_10_03, or bind both names "
                                        "to one buffer (alias=1)."
                                      : "Hint: bind both names to one buffer (alias=0).");
        }
        if (char const* const problem = lora_drop_attention_problem(&call))
            refuse(problem, "; the fields are ", mDescription);
        // TensorRT does not say what it gave; getWorkspaceSize asked for the most that any call of the profile needs.
        size_t const workspace_bytes = lora_drop_workspace_bytes(&call, mFields.multiprocessors);
        if (workspace_bytes > 0 && workspace == nullptr)
            refuse("no workspace, where ", workspace_bytes, " bytes are needed");
        int const status = lora_drop_attention(&call, workspace_bytes, mFields.multiprocessors, stream);
        if (status != cudaSuccess)
            refuse("CUDA error ", status, ": ", cudaGetErrorString(static_cast<cudaError_t>(status)));
        return 0;
    });
}

// ---- creator --------------------------------------------------------------------------------------------------------

SkipWriteKVAttentionCreator::SkipWriteKVAttentionCreator() : mNames{advertisedFields()} {
    mCollection = {static_cast<int32_t>(mNames.size()), mNames.data()};
}

nvinfer1::IPluginV3* SkipWriteKVAttentionCreator::createPlugin(char const* name, PluginFieldCollection const* fields,
                                                               TensorRTPhase phase) noexcept {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
        try {
            return new SkipWriteKVAttentionPlugin{parseFields(fields), phase};
        } catch (std::invalid_argument const& error) {
            refuse("`", name == nullptr ? "" : name, "`: ", error.what());
        }
    });
}

} // namespace lora_drop

extern "C" {

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nb_creators) {
    static lora_drop::SkipWriteKVAttentionCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    nb_creators = 1;
    return creators;
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { lora_drop::setFinder(finder); }

} // extern "C"
