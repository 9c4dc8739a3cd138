/* Sizes of a call into launch shapes: what is refused, how the work is cut, and the sequence of launches. The device and
 * the host launcher share it. Nothing here reads memory behind a pointer of a call, so nothing depends on lengths.
 *
 * One block of `attend` handles `tile_rows` query rows of one key/value head of one batch row. A query row is one new token
 * in one query head of the group: row = token · group + head, so a K/V element is read once for the whole group. The slots
 * it attends to are cut into `splits` of about equal length, a block each; `combine` joins them.
 *
 * Fused (decode): one tile holds all rows, and the last split also appends the new tokens and attends to them from shared
 * memory. No other block reads a new slot, so blocks need not wait for one another. Else (prefill): `append` runs before.
 */
#ifndef LORA_DROP_PLAN_H
#define LORA_DROP_PLAN_H

#include <algorithm>

#include "block.h"
#include "skip_write_kv_attention.h"

namespace lora_drop {

constexpr int kChunk = 8;                    // elements that a thread loads at once
constexpr int kMaxHeadDim = kWarp * kChunk;  // a warp holds one head, a chunk per lane
constexpr int kMaxFusedTokens = 16;
constexpr int kMaxSplits = 256;
constexpr size_t kMaxSharedBytes = 96 * 1024;             // of a block: fits on every GPU since sm_80
constexpr size_t kMultiprocessorSharedBytes = 160 * 1024;  // of an A100; where there is less, a last wave is not full

/* Blocks of `attend` on a multiprocessor: what its registers leave room for. */
constexpr int max_resident(int thread_rows) { return thread_rows == 4 ? 3 : 2; }

struct Plan {
    int group;      // query heads per key/value head
    int rows;       // group · S
    int tile_rows;  // query rows of a block
    int tiles;
    int splits;
    int thread_rows;  // query rows that a thread works on at once: 4 or 8
    bool fused;
    int tile_keys;    // keys and values in shared memory at a time
    int key_stride;   // bytes between them
    size_t shared_bytes;
    size_t workspace_bytes;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline int bytes_of(int dtype) { return dtype == LORA_DROP_F32 ? 4 : dtype <= LORA_DROP_BF16 ? 2 : 1; }

inline const char* problem(const LoraDropAttention& call) {
    const int d = call.head_dim;
    if (call.batch < 1 || call.new_tokens < 1 || call.heads < 1 || call.kv_heads < 1 || call.slots < 1) {
        return "batch, new_tokens, heads, kv_heads and slots must be positive";
    }
    if (call.heads % call.kv_heads != 0) return "heads must be a multiple of kv_heads";
    if (call.batch > 65535 || call.kv_heads > 65535) return "batch and kv_heads must be at most 65535";
    if (static_cast<int64_t>(call.heads) * call.new_tokens > INT32_MAX / kMaxSplits) {
        return "heads · new_tokens is too large";
    }
    if (d < kChunk || d > kMaxHeadDim || d % kChunk != 0) return "head_dim must be a multiple of 8, at most 256";
    if (call.rotary_dim < 0 || call.rotary_dim > d || call.rotary_dim % 2 != 0) {
        return "rotary_dim must be even, 0 … head_dim";
    }
    if (call.dtype < LORA_DROP_F32 || call.dtype > LORA_DROP_BF16) return "dtype must be F32, F16 or BF16";
    const bool quantized = call.kv_dtype == LORA_DROP_F8_E4M3 || call.kv_dtype == LORA_DROP_I8;
    if (!quantized && call.kv_dtype != call.dtype) return "kv_dtype must be dtype, F8_E4M3 or I8";
    if (quantized && d % 16 != 0) return "head_dim must be a multiple of 16 with a quantized cache";
    if (call.window < 0) return "window must not be negative";
    if (!(call.softcap >= 0.0f)) return "softcap must not be negative";
    if (!call.query || !call.key || !call.value || !call.length || !call.key_cache || !call.value_cache || !call.output) {
        return "a required pointer is null";
    }
    if (call.rotary_dim > 0 && (!call.cos || !call.sin)) return "RoPE needs cos and sin";
    if (!call.q_norm != !call.k_norm) return "q_norm and k_norm: both or neither";
    if (quantized != (call.k_scale != nullptr) || quantized != (call.v_scale != nullptr)) {
        return "k_scale and v_scale belong to a quantized cache, both";
    }
    return nullptr;
}

/* Shared memory of `attend`, in this order; the offsets are recomputed there. */
inline size_t shared_bytes(const Plan& plan, int head_dim) {
    const size_t rows = static_cast<size_t>(ceil_div(plan.tile_rows, plan.thread_rows)) * plan.thread_rows;
    return 2 * static_cast<size_t>(plan.tile_keys) * plan.key_stride  // keys, values
           + rows * head_dim * 4                                      // queries
           + static_cast<size_t>(plan.tile_keys) * (rows + 4) * 4     // scores
           + rows * 4 * 4                                             // maximum, sum, correction, last slot of each row
           + static_cast<size_t>(kWarps) * head_dim * 4;              // a head being prepared by each warp
}

inline Plan plan_of(const LoraDropAttention& call, int multiprocessors) {
    Plan plan{};
    const int d = call.head_dim;
    plan.group = call.heads / call.kv_heads;
    plan.rows = plan.group * call.new_tokens;

    const int row_bytes = d * bytes_of(call.kv_dtype);
    plan.tile_keys = row_bytes <= 256 ? 64 : 32;
    // 4 threads read neighbouring 16 bytes of one key, the next 4 threads of the next: free of bank conflicts if the
    // stride is 64 bytes past a multiple of 128
    plan.key_stride = (row_bytes + 63) / 128 * 128 + 64;

    // A thread holds one chunk of thread_rows output rows in registers
    const int row_groups = kThreads / (d / kChunk);
    plan.thread_rows = plan.rows <= 4 * row_groups ? 4 : 8;
    plan.tile_rows = std::min(plan.rows, plan.thread_rows * row_groups);
    while (shared_bytes(plan, d) > kMaxSharedBytes) plan.tile_rows -= plan.thread_rows;
    plan.shared_bytes = shared_bytes(plan, d);
    plan.tiles = ceil_div(plan.rows, plan.tile_rows);
    plan.fused = plan.tiles == 1 && call.new_tokens <= kMaxFusedTokens;

    // As many blocks as can run at the same time
    const int resident = static_cast<int>(kMultiprocessorSharedBytes / plan.shared_bytes);
    const int64_t wave = static_cast<int64_t>(multiprocessors) * std::min(resident, max_resident(plan.thread_rows));
    const int64_t blocks = static_cast<int64_t>(call.batch) * call.kv_heads * plan.tiles;
    const int64_t splits = std::min<int64_t>({wave / blocks, ceil_div(call.slots, plan.tile_keys), kMaxSplits});
    plan.splits = static_cast<int>(std::max<int64_t>(splits, 1));

    const size_t partials = static_cast<size_t>(call.batch) * call.kv_heads * plan.splits * plan.rows;
    plan.workspace_bytes = plan.splits == 1 ? 0 : partials * (d + 2) * 4;
    return plan;
}

template <class T>
struct Type {
    using type = T;
};

/* Calls f(Type<T>, Type<KV>) with the number types of a call. */
template <class F>
auto with_types(const LoraDropAttention& call, F f) {
    const auto with_cache = [&](auto type) {
        switch (call.kv_dtype) {
            case LORA_DROP_F8_E4M3: return f(type, Type<Float8>{});
            case LORA_DROP_I8: return f(type, Type<int8_t>{});
            default: return f(type, type);
        }
    };
    switch (call.dtype) {
        case LORA_DROP_F16: return with_cache(Type<Half>{});
        case LORA_DROP_BF16: return with_cache(Type<BFloat16>{});
        default: return with_cache(Type<float>{});
    }
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

/* The launches of a call, through a launcher with a member for each body: (call, plan, grid, shared_bytes) -> error, 0 if
 * none. */
template <class Launcher>
int launch(const LoraDropAttention& call, size_t workspace_bytes, int multiprocessors, const Launcher& launcher) {
    const Plan plan = plan_of(call, multiprocessors);
    if (workspace_bytes < plan.workspace_bytes) return kInvalidValue;
    if (plan.workspace_bytes > 0 && call.workspace == nullptr) return kInvalidValue;

    const Index append_grid{ceil_div(call.new_tokens, kWarps), call.kv_heads, call.batch};
    const Index attend_grid{plan.tiles * plan.splits, call.kv_heads, call.batch};
    const Index combine_grid{plan.rows, call.kv_heads, call.batch};
    const size_t append_bytes = static_cast<size_t>(kWarps) * call.head_dim * 4;
    const size_t combine_bytes = (2 * static_cast<size_t>(plan.splits) + kThreads * kChunk) * 4;

    return with_types(call, [&](auto type, auto cache_type) {
        using T = typename decltype(type)::type;
        using KV = typename decltype(cache_type)::type;
        int error = 0;
        if (!plan.fused) error = launcher.template append<T, KV>(call, plan, append_grid, append_bytes);
        if (error != 0) return error;
        error = plan.thread_rows == 4
                    ? launcher.template attend<T, KV, 4>(call, plan, attend_grid, plan.shared_bytes)
                    : launcher.template attend<T, KV, 8>(call, plan, attend_grid, plan.shared_bytes);
        if (error != 0 || plan.splits == 1) return error;
        return launcher.template combine<T>(call, plan, combine_grid, combine_bytes);
    });
}

}  // namespace lora_drop

#endif
