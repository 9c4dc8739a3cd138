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

// ---- types and shapes -----------------------------------------------------------------------------------------------

// Sizes in an Expected that the call decides; other sizes are themselves.
constexpr int64_t kB = -2;
constexpr int64_t kS = -3;
constexpr int64_t kC = -4;
constexpr int64_t kSYMBOLS[] = {kB, kS, kC};
constexpr char kSYMBOL_NAMES[] = {'B', 'S', 'C'};

constexpr int32_t kUNKNOWN_SIZE = -1; // what TensorRT calls a size that is not fixed yet

struct Expected {
    char const* name;
    int32_t rank;
    std::array<int64_t, 4> sizes;
};

/// `what` is an Input, or kNB_INPUTS + an Output.
Expected expectedOf(int32_t what, Fields const& f) {
    int64_t const query = int64_t{f.heads} * f.head_dim;
    int64_t const key = int64_t{f.kv_heads} * f.head_dim;
    switch (what) {
    case kIN_QUERY: return {"query", 3, {kB, kS, query}};
    case kIN_KEY: return {"key", 3, {kB, kS, key}};
    case kIN_VALUE: return {"value", 3, {kB, kS, key}};
    case kIN_PAST_KEY: return {"past_key", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kIN_PAST_VALUE: return {"past_value", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kIN_LENGTH: return {"length", 1, {kB}};
    case kIN_COUNT: return {"count", 1, {kB}};
    case kIN_COS: return {"cos", 3, {kB, kS, f.rotary_dim / 2}};
    case kIN_SIN: return {"sin", 3, {kB, kS, f.rotary_dim / 2}};
    case kIN_Q_NORM: return {"q_norm", 1, {f.head_dim}};
    case kIN_K_NORM: return {"k_norm", 1, {f.head_dim}};
    case kIN_K_SCALE: return {"k_scale", 1, {f.kv_heads}};
    case kIN_V_SCALE: return {"v_scale", 1, {f.kv_heads}};
    case kNB_INPUTS + kOUT_ATTENTION: return {"attention", 3, {kB, kS, query}};
    case kNB_INPUTS + kOUT_PRESENT_KEY: return {"present_key", 4, {kB, f.kv_heads, kC, f.head_dim}};
    case kNB_INPUTS + kOUT_PRESENT_VALUE: return {"present_value", 4, {kB, f.kv_heads, kC, f.head_dim}};
    default: refuse("no tensor ", what);
    }
}

/// Whether `type` is possible for `what`, given the types of query (T) and past_key (K), which come before it.
bool typeFits(int32_t what, DataType type, DataType query, DataType past_key, Fields const& fields) {
    switch (what) {
    case kIN_QUERY: return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
    case kIN_PAST_KEY:
        return fields.has_kv_scale != 0 ? type == DataType::kFP8 || type == DataType::kINT8 : type == query;
    case kIN_PAST_VALUE:
    case kNB_INPUTS + kOUT_PRESENT_KEY:
    case kNB_INPUTS + kOUT_PRESENT_VALUE: return type == past_key;
    case kIN_LENGTH:
    case kIN_COUNT: return type == DataType::kINT64;
    case kIN_K_SCALE:
    case kIN_V_SCALE: return type == DataType::kFLOAT;
    default: return type == query;
    }
}

char const* typeName(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kFP8: return "fp8";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
    }
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

template <typename Sizes>
std::string shapeText(Sizes const& sizes, int32_t rank) {
    std::ostringstream text;
    text << '[';
    for (int32_t i = 0; i < rank; ++i) {
        text << (i == 0 ? "" : ", ");
        auto const* const symbol = std::find(std::begin(kSYMBOLS), std::end(kSYMBOLS), sizes[i]);
        if (symbol != std::end(kSYMBOLS))
            text << kSYMBOL_NAMES[symbol - kSYMBOLS];
        else
            text << sizes[i];
    }
    text << ']';
    return text.str();
}

PluginTensorDesc const& plain(PluginTensorDesc const& desc) { return desc; }
PluginTensorDesc const& plain(DynamicPluginTensorDesc const& desc) { return desc.desc; }

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
    : mFields{fields}, mPhase{phase} {
    if (mFields.multiprocessors == 0)
        mFields.multiprocessors = deviceMultiprocessors();
    mDescription = describe(mFields);
    for (int32_t what = 0; what < kNB_INPUTS; ++what) {
        bool const absent = (what == kIN_COUNT && fields.has_count == 0)
            || ((what == kIN_COS || what == kIN_SIN) && fields.rotary_dim == 0)
            || ((what == kIN_Q_NORM || what == kIN_K_NORM) && fields.has_norm == 0)
            || ((what == kIN_K_SCALE || what == kIN_V_SCALE) && fields.has_kv_scale == 0);
        mPosition[what] = absent ? -1 : mNbInputs++;
    }
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
    case kOUT_PRESENT_KEY: return mPosition[kIN_PAST_KEY];
    case kOUT_PRESENT_VALUE: return mPosition[kIN_PAST_VALUE];
    default: return -1;
    }
}

int32_t SkipWriteKVAttentionPlugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs,
                                                       DataType const* input_types, int32_t nb_inputs) const noexcept {
    return guarded("getOutputDataTypes", -1, [&] {
        if (nb_inputs != mNbInputs || nb_outputs != kNB_OUTPUTS)
            refuse(nb_inputs, " inputs and ", nb_outputs, " outputs; these fields call for ", mNbInputs, " and ",
                   +kNB_OUTPUTS, ": ", mDescription);
        output_types[kOUT_ATTENTION] = input_types[mPosition[kIN_QUERY]];
        output_types[kOUT_PRESENT_KEY] = input_types[mPosition[kIN_PAST_KEY]];
        output_types[kOUT_PRESENT_VALUE] = input_types[mPosition[kIN_PAST_VALUE]];
        return 0;
    });
}

int32_t SkipWriteKVAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                                                    nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                                    int32_t nb_outputs, nvinfer1::IExprBuilder&) noexcept {
    return guarded("getOutputShapes", -1, [&] {
        if (nb_inputs != mNbInputs || nb_outputs != kNB_OUTPUTS)
            refuse(nb_inputs, " inputs and ", nb_outputs, " outputs; these fields call for ", mNbInputs, " and ",
                   +kNB_OUTPUTS, ": ", mDescription);
        outputs[kOUT_ATTENTION] = inputs[mPosition[kIN_QUERY]];
        outputs[kOUT_PRESENT_KEY] = inputs[mPosition[kIN_PAST_KEY]];
        outputs[kOUT_PRESENT_VALUE] = inputs[mPosition[kIN_PAST_VALUE]];
        return 0;
    });
}

bool SkipWriteKVAttentionPlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* in_out,
                                                           int32_t nb_inputs, int32_t nb_outputs) noexcept {
    if (nb_inputs != mNbInputs || nb_outputs != kNB_OUTPUTS || pos < 0 || pos >= nb_inputs + nb_outputs)
        return false;
    PluginTensorDesc const& desc = in_out[pos].desc;
    if (desc.format != TensorFormat::kLINEAR)
        return false;
    int32_t const what = pos >= nb_inputs
        ? kNB_INPUTS + pos - nb_inputs
        : static_cast<int32_t>(std::find(mPosition.begin(), mPosition.end(), pos) - mPosition.begin());
    // Only descriptors up to pos are set; query and past_key stand before all whose type depends on them.
    DataType const query = in_out[mPosition[kIN_QUERY]].desc.type;
    DataType const past_key = pos < mPosition[kIN_PAST_KEY] ? desc.type : in_out[mPosition[kIN_PAST_KEY]].desc.type;
    return typeFits(what, desc.type, query, past_key, mFields);
}

template <typename Desc>
SkipWriteKVAttentionPlugin::Descs SkipWriteKVAttentionPlugin::arrange(Desc const* in, int32_t nb_inputs,
                                                                      Desc const* out, int32_t nb_outputs) const {
    if (nb_inputs != mNbInputs || nb_outputs != kNB_OUTPUTS)
        refuse(nb_inputs, " inputs and ", nb_outputs, " outputs; these fields call for ", mNbInputs, " and ",
               +kNB_OUTPUTS, ": ", mDescription);
    Descs descs{};
    for (int32_t what = 0; what < kNB_INPUTS; ++what)
        descs[what] = mPosition[what] < 0 ? nullptr : &plain(in[mPosition[what]]);
    for (int32_t output = 0; output < kNB_OUTPUTS; ++output)
        descs[kNB_INPUTS + output] = &plain(out[output]);
    return descs;
}

LoraDropAttention SkipWriteKVAttentionPlugin::checkedSizes(Descs const& descs, bool may_be_dynamic) const {
    std::array<int64_t, std::size(kSYMBOLS)> sizes;
    sizes.fill(kUNKNOWN_SIZE);
    for (int32_t what = 0; what < static_cast<int32_t>(descs.size()); ++what) {
        if (descs[what] == nullptr)
            continue;
        PluginTensorDesc const& desc = *descs[what];
        Expected const expected = expectedOf(what, mFields);
        if (desc.format != TensorFormat::kLINEAR)
            refuse(expected.name, " has TensorFormat ", static_cast<int32_t>(desc.format), "; accepted: kLINEAR");
        if (!typeFits(what, desc.type, descs[kIN_QUERY]->type, descs[kIN_PAST_KEY]->type, mFields))
            refuse(expected.name, " is ", typeName(desc.type), ", where query is ", typeName(descs[kIN_QUERY]->type),
                   ", past_key ", typeName(descs[kIN_PAST_KEY]->type), " and has_kv_scale = ", mFields.has_kv_scale);
        bool fits = desc.dims.nbDims == expected.rank;
        for (int32_t axis = 0; fits && axis < expected.rank; ++axis) {
            int64_t const size = desc.dims.d[axis];
            if (size == kUNKNOWN_SIZE && may_be_dynamic)
                continue;
            auto const* const symbol = std::find(std::begin(kSYMBOLS), std::end(kSYMBOLS), expected.sizes[axis]);
            if (symbol == std::end(kSYMBOLS)) {
                fits = size == expected.sizes[axis];
                continue;
            }
            int64_t& known = sizes[static_cast<size_t>(symbol - kSYMBOLS)];
            fits = size >= 0 && size <= std::numeric_limits<int32_t>::max()
                && (known == kUNKNOWN_SIZE || size == known);
            known = size;
        }
        if (!fits)
            refuse(expected.name, " is ", shapeText(desc.dims.d, desc.dims.nbDims), "; expected ",
                   shapeText(expected.sizes, expected.rank), " with B and S of query ",
                   shapeText(descs[kIN_QUERY]->dims.d, descs[kIN_QUERY]->dims.nbDims), ", C of past_key ",
                   shapeText(descs[kIN_PAST_KEY]->dims.d, descs[kIN_PAST_KEY]->dims.nbDims));
    }
    LoraDropAttention call = callOfFields();
    call.batch = static_cast<int32_t>(sizes[0]);
    call.new_tokens = static_cast<int32_t>(sizes[1]);
    call.slots = static_cast<int32_t>(sizes[2]);
    call.dtype = kernelType(descs[kIN_QUERY]->type);
    call.kv_dtype = kernelType(descs[kIN_PAST_KEY]->type);
    return call;
}

LoraDropAttention SkipWriteKVAttentionPlugin::largestCall(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                                          DynamicPluginTensorDesc const* out,
                                                          int32_t nb_outputs) const {
    LoraDropAttention call = checkedSizes(arrange(in, nb_inputs, out, nb_outputs), true);
    auto const most = [](char const* what, int64_t size) {
        if (size < 1 || size > std::numeric_limits<int32_t>::max())
            refuse("the profile's largest ", what, " is ", size, "; accepted: 1 to 2^31 - 1");
        return static_cast<int32_t>(size);
    };
    call.batch = most("batch", in[mPosition[kIN_QUERY]].max.d[0]);
    call.new_tokens = most("number of new tokens", in[mPosition[kIN_QUERY]].max.d[1]);
    call.slots = most("number of slots", in[mPosition[kIN_PAST_KEY]].max.d[2]);
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
        checkedSizes(arrange(in, nb_inputs, out, nb_outputs), false);
        return 0;
    });
}

int32_t SkipWriteKVAttentionPlugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                                            void const* const* inputs, void* const* outputs, void* workspace,
                                            cudaStream_t stream) noexcept {
    return guarded("enqueue", -1, [&] {
        LoraDropAttention call = checkedSizes(arrange(input_desc, mNbInputs, output_desc, kNB_OUTPUTS), false);
        auto const pointer = [&](Input what) { return mPosition[what] < 0 ? nullptr : inputs[mPosition[what]]; };
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
