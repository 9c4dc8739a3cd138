#include "skip_write_kv_attention_plugin.h"

#include "log.h"

namespace lora_drop {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::ILogger;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

SkipWriteKVAttentionPlugin::SkipWriteKVAttentionPlugin(Fields const& fields, TensorRTPhase phase)
    : mFields{fields}, mPhase{phase}, mPositions{fields} {
    if (mFields.multiprocessors == 0)
        mFields.multiprocessors = deviceMultiprocessors();
    mDescription = describe(mFields);
    requireKernelTakes(mFields); // as early as possible
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

Sizes SkipWriteKVAttentionPlugin::largestSizesOf(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                 DynamicPluginTensorDesc const* out, int32_t nb_outputs) const {
    Sizes const sizes = sizesOf(in, nb_inputs, out, nb_outputs, true);
    Sizes const largest = largestSizes(sizes, in[mPositions[kIN_QUERY]], in[mPositions[kIN_PAST_KEY]]);
    requireKernelTakes(mFields, largest);
    return largest;
}

int32_t SkipWriteKVAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                    DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    return guarded("configurePlugin", -1, [&] {
        largestSizesOf(in, nb_inputs, out, nb_outputs);
        return 0;
    });
}

size_t SkipWriteKVAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                    DynamicPluginTensorDesc const* out,
                                                    int32_t nb_outputs) const noexcept {
    // What configurePlugin would refuse must not pass for a plugin without workspace: it fits no device.
    constexpr size_t kIMPOSSIBLE = size_t{1} << 62;
    return guarded("getWorkspaceSize", kIMPOSSIBLE, [&] {
        return largestWorkspaceBytes(mFields, largestSizesOf(in, nb_inputs, out, nb_outputs));
    });
}

int32_t SkipWriteKVAttentionPlugin::onShapeChange(PluginTensorDesc const* in, int32_t nb_inputs,
                                                  PluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    return guarded("onShapeChange", -1, [&] {
        sizesOf(in, nb_inputs, out, nb_outputs, false);
        return 0;
    });
}

LoraDropAttention SkipWriteKVAttentionPlugin::callWithPointers(Sizes const& sizes, void const* const* inputs,
                                                               void* const* outputs, void* workspace) const {
    LoraDropAttention call = callOf(mFields, sizes);
    auto const pointer = [&](Input input) { return mPositions[input] < 0 ? nullptr : inputs[mPositions[input]]; };
    call.query = pointer(kIN_QUERY);
    call.key = pointer(kIN_KEY);
    call.value = pointer(kIN_VALUE);
    call.cos = pointer(kIN_COS);
    call.sin = pointer(kIN_SIN);
    call.q_norm = pointer(kIN_Q_NORM);
    call.k_norm = pointer(kIN_K_NORM);
    call.k_scale = static_cast<float const*>(pointer(kIN_K_SCALE));
    call.v_scale = static_cast<float const*>(pointer(kIN_V_SCALE));
    call.sinks = static_cast<float const*>(pointer(kIN_SINKS));
    call.length = static_cast<int64_t const*>(pointer(kIN_LENGTH));
    call.count = static_cast<int64_t const*>(pointer(kIN_COUNT));
    call.key_cache = outputs[kOUT_PRESENT_KEY];
    call.value_cache = outputs[kOUT_PRESENT_VALUE];
    call.output = outputs[kOUT_ATTENTION];
    call.workspace = workspace;
    return call;
}

int32_t SkipWriteKVAttentionPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                                            void const* const* inputs, void* const* outputs, void* workspace,
                                            cudaStream_t stream) noexcept {
    return guarded("enqueue", -1, [&] {
        Sizes const sizes = sizesOf(input_desc, mPositions.nbInputs(), output_desc, kNB_OUTPUTS, false);
        LoraDropAttention const call = callWithPointers(sizes, inputs, outputs, workspace);
        void const* const past_key = inputs[mPositions[kIN_PAST_KEY]];
        void const* const past_value = inputs[mPositions[kIN_PAST_VALUE]];
        if (call.key_cache != past_key || call.value_cache != past_value) {
            if (mPhase == TensorRTPhase::kBUILD) { // the builder's timing runs, on scratch memory: see the header
                log(ILogger::Severity::kVERBOSE, "enqueue: past and present differ; nothing was launched");
                return 0;
            }
            refuse("past_key ", past_key, ", present_key ", call.key_cache, ", past_value ", past_value,
                   ", present_value ", call.value_cache,
                   " must be one address for keys and one for values: the cache is updated in place. ",
                   mFields.alias != 0 ? "Hint: build with PreviewFeature::kALIASED_PLUGIN_IO_10_03, or bind both names "
                                        "to one buffer (alias=1)."
                                      : "Hint: bind both names to one buffer (alias=0).");
        }
        launch(call, mFields, stream);
        return 0;
    });
}

} // namespace lora_drop
