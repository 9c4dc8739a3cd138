#include "device.h"

#include <algorithm>
#include <string>

#include "log.h"

namespace lora_drop {
namespace {

using nvinfer1::DataType;

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
    if (fields.has_sinks != 0)
        call.sinks = reinterpret_cast<float const*>(nowhere);
}

} // namespace

int32_t deviceMultiprocessors() noexcept {
    int device{0};
    int count{0};
    if (cudaGetDevice(&device) == cudaSuccess
        && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0)
        return count;
    cudaGetLastError();
    log(nvinfer1::ILogger::Severity::kINFO,
        "no GPU or no driver; the workspace is planned for " + std::to_string(kFALLBACK_MULTIPROCESSORS) + " SMs");
    return kFALLBACK_MULTIPROCESSORS;
}

LoraDropAttention callOf(Fields const& fields, Sizes const& sizes) {
    LoraDropAttention call{};
    call.batch = sizes.batch;
    call.new_tokens = sizes.new_tokens;
    call.heads = fields.heads;
    call.kv_heads = fields.kv_heads;
    call.head_dim = fields.head_dim;
    call.slots = sizes.slots;
    call.rotary_dim = fields.rotary_dim;
    call.interleaved = fields.interleaved;
    call.window = fields.window;
    call.dtype = kernelType(sizes.type);
    call.kv_dtype = kernelType(sizes.cache_type);
    call.scale = fields.scale;
    call.softcap = fields.softcap;
    call.norm_epsilon = fields.norm_epsilon;
    return call;
}

void requireKernelTakes(Fields const& fields) {
    DataType const cache_type = fields.has_kv_scale != 0 ? DataType::kINT8 : DataType::kFLOAT;
    LoraDropAttention call = callOf(fields, {1, 1, 1, DataType::kFLOAT, cache_type});
    setStandInPointers(call, fields);
    if (char const* const problem = lora_drop_attention_problem(&call))
        refuse(problem, "; the fields are ", describe(fields));
}

void requireKernelTakes(Fields const& fields, Sizes const& largest) {
    LoraDropAttention call = callOf(fields, largest);
    setStandInPointers(call, fields);
    if (char const* const problem = lora_drop_attention_problem(&call))
        refuse(problem, "; batch ", call.batch, ", new tokens ", call.new_tokens, ", slots ", call.slots,
               ", the fields are ", describe(fields));
}

size_t largestWorkspaceBytes(Fields const& fields, Sizes const& largest) {
    // A large problem fills the device without cutting the slots into pieces and may need nothing, a small one is
    // cut: the largest workspace is not the largest problem's. More slots only make more pieces.
    LoraDropAttention call = callOf(fields, largest);
    setStandInPointers(call, fields);
    size_t bytes{0};
    for (call.batch = 1; call.batch <= largest.batch; ++call.batch)
        for (call.new_tokens = 1; call.new_tokens <= largest.new_tokens; ++call.new_tokens)
            bytes = std::max(bytes, lora_drop_workspace_bytes(&call, fields.multiprocessors));
    return bytes;
}

void launch(LoraDropAttention const& call, Fields const& fields, cudaStream_t stream) {
    if (char const* const problem = lora_drop_attention_problem(&call))
        refuse(problem, "; the fields are ", describe(fields));
    // TensorRT does not say what it gave; getWorkspaceSize asked for the most that any call of the profile needs.
    size_t const workspace_bytes = lora_drop_workspace_bytes(&call, fields.multiprocessors);
    if (workspace_bytes > 0 && call.workspace == nullptr)
        refuse("no workspace, where ", workspace_bytes, " bytes are needed");
    int const status = lora_drop_attention(&call, workspace_bytes, fields.multiprocessors, stream);
    if (status != cudaSuccess)
        refuse("CUDA error ", status, ": ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

} // namespace lora_drop
