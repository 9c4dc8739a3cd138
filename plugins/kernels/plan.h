/* Sizes of a call into launch shapes: what is refused, how the work is cut, and the sequence of launches. The device
 * and the host launcher share it. Nothing here reads memory behind a pointer of a call, so nothing depends on lengths.
 *
 * A tile is `tile_rows` query rows of one key/value head of one batch row. A query row is one new token in one query
 * head of the group: row = token · group + head, so a K/V element is read once for all rows of the tile. Tiles are
 * computed by FMAs (fma_tile.cuh) or on tensor cores (tensor_tile.cuh). What all tiles attend to is dealt to `workers`
 * blocks, as many as run at the same time, in equal shares (work.cuh); `combine` joins what was cut.
 *
 * Fused: one tile holds all rows, and the worker of its end also appends the new tokens and attends to them from shared
 * memory. No other block reads a new slot, so blocks need not wait for one another. Else `append` runs before.
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
constexpr int kMaxWorkers = 2048;
constexpr int kMinTensorGroup = 8;             // below, one token's rows fill less than half of a tensor core's 16
constexpr size_t kMaxSharedBytes = 96 * 1024;  // of a block: fits on every GPU since sm_80

/* How a tile is computed: by FMAs on 4 or 8 rows at once, or on tensor cores with room for heads of this size. */
enum class Path { kFma4, kFma8, kTensor64, kTensor128, kTensor256 };

/* Blocks of `attend` on a multiprocessor: what its registers leave room for. */
constexpr int max_resident(Path path) {
    return path == Path::kFma4 || path == Path::kTensor64 ? 3 : 2;
}

/* Of tensor cores, by the room for a head: keys in shared memory at a time, and the bytes between them, an odd number
 * of 16 bytes, so that ldmatrix has no bank conflicts. */
constexpr int tensor_tile_keys(int room) { return room <= 128 ? 64 : 32; }
constexpr int tensor_key_stride(int room) { return 2 * room + 16; }

struct Plan {
    int group;      // query heads per key/value head
    int rows;       // group · S
    int tile_rows;  // query rows of a block
    int tiles;
    Path path;
    bool fused;
    int tile_keys;     // keys and values in shared memory at a time
    int key_stride;    // bytes between them
    int workers;       // blocks of `attend`
    int combine_rows;  // blocks of `combine` per worker
    size_t shared_bytes;
    size_t workspace_bytes;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline int bytes_of(int dtype) { return dtype == LORA_DROP_F32 ? 4 : dtype <= LORA_DROP_BF16 ? 2 : 1; }

inline const char* problem_of_fields(const LoraDropAttention& call) {
    const int d = call.head_dim;
    if (call.batch < 1 || call.new_tokens < 1 || call.heads < 1 || call.kv_heads < 1 || call.slots < 1) {
        return "batch, new_tokens, heads, kv_heads and slots must be positive";
    }
    if (call.heads % call.kv_heads != 0) return "heads must be a multiple of kv_heads";
    if (call.batch > 65535 || call.kv_heads > 65535) return "batch and kv_heads must be at most 65535";
    if (static_cast<int64_t>(call.heads) * call.new_tokens > INT32_MAX / 256) return "heads · new_tokens is too large";
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
    if (!call.query || !call.key || !call.value || !call.length || !call.key_cache || !call.value_cache ||
        !call.output) {
        return "a required pointer is null";
    }
    if (call.rotary_dim > 0 && (!call.cos || !call.sin)) return "RoPE needs cos and sin";
    if (!call.q_norm != !call.k_norm) return "q_norm and k_norm: both or neither";
    if (quantized != (call.k_scale != nullptr) || quantized != (call.v_scale != nullptr)) {
        return "k_scale and v_scale belong to a quantized cache, both";
    }
    return nullptr;
}

constexpr bool is_fma(Path path) { return path == Path::kFma4 || path == Path::kFma8; }

/* Shared memory of `attend`, in this order; the offsets are recomputed there. */
inline size_t shared_bytes(const Plan& plan, int head_dim) {
    const int group = plan.path == Path::kFma4 ? 4 : plan.path == Path::kFma8 ? 8 : 16;
    const size_t rows = static_cast<size_t>(ceil_div(plan.tile_rows, group)) * group;
    const size_t keys = 2 * static_cast<size_t>(plan.tile_keys) * plan.key_stride;  // and values
    const size_t scratch = static_cast<size_t>(kWarps) * head_dim * 4;              // a head that each warp prepares
    if (!is_fma(plan.path)) return rows * plan.key_stride + keys + scratch;
    return keys + rows * head_dim * 4                              // queries
           + static_cast<size_t>(plan.tile_keys) * (rows + 4) * 4  // scores
           + rows * 4 * 4                                          // maximum, sum, correction, last slot of each row
           + scratch;
}

inline void plan_fma_tile(Plan& plan, const LoraDropAttention& call) {
    const int d = call.head_dim, row_bytes = d * bytes_of(call.kv_dtype);
    plan.tile_keys = row_bytes <= 256 ? 64 : 32;
    // 4 threads read neighbouring 16 bytes of one key, the next 4 threads of the next: free of bank conflicts if the
    // stride is 64 bytes past a multiple of 128
    plan.key_stride = (row_bytes + 63) / 128 * 128 + 64;

    // A thread scores thread_rows rows per read of a key, and holds one chunk of as many outputs in registers
    plan.path = plan.rows <= 4 ? Path::kFma4 : Path::kFma8;
    const int thread_rows = plan.path == Path::kFma4 ? 4 : 8;
    plan.tile_rows = std::min(plan.rows, thread_rows * (kThreads / (d / kChunk)));
    while (shared_bytes(plan, d) > kMaxSharedBytes) plan.tile_rows -= thread_rows;
}

inline void plan_tensor_tile(Plan& plan, const LoraDropAttention& call) {
    const int room = call.head_dim <= 64 ? 64 : call.head_dim <= 128 ? 128 : 256;
    plan.path = room == 64 ? Path::kTensor64 : room == 128 ? Path::kTensor128 : Path::kTensor256;
    plan.tile_keys = tensor_tile_keys(room);
    plan.key_stride = tensor_key_stride(room);
    plan.tile_rows = std::min(plan.rows, 16 * kWarps);
}

/* The plan but for its number of workers and the workspace, which depend on the device. */
inline Plan tiles_of(const LoraDropAttention& call) {
    Plan plan{};
    plan.group = call.heads / call.kv_heads;
    plan.rows = plan.group * call.new_tokens;
    if (call.dtype != LORA_DROP_F32 && (call.new_tokens > 1 || plan.group >= kMinTensorGroup)) {
        plan_tensor_tile(plan, call);
    } else {
        plan_fma_tile(plan, call);
    }
    plan.shared_bytes = shared_bytes(plan, call.head_dim);
    plan.tiles = ceil_div(plan.rows, plan.tile_rows);
    plan.fused = plan.tiles == 1 && call.new_tokens <= kMaxFusedTokens;
    plan.combine_rows = std::min(plan.tile_rows, 8);
    return plan;
}

/* The most units of work (work.cuh) that a call can have. */
inline int64_t most_units(const LoraDropAttention& call, const Plan& plan) {
    const double of_item = static_cast<double>(call.slots) / plan.tile_keys + 2;
    const double units = of_item * call.batch * call.kv_heads * plan.tiles;
    return units > INT32_MAX ? INT64_MAX : static_cast<int64_t>(units);
}

/* resident: blocks of `attend` that run on a multiprocessor at the same time. */
inline Plan plan_of(const LoraDropAttention& call, int multiprocessors, int resident) {
    Plan plan = tiles_of(call);
    const int64_t wave = static_cast<int64_t>(multiprocessors) * std::max(resident, 1);
    plan.workers = static_cast<int>(std::min<int64_t>({wave, most_units(call, plan), kMaxWorkers}));
    const size_t results = 2 * static_cast<size_t>(plan.tile_rows) * (call.head_dim + 2) * 4;
    plan.workspace_bytes = plan.workers == 1 ? 0 : plan.workers * (16 + results);
    return plan;
}

/* Enough for every device with so many multiprocessors, however few blocks each of them takes. */
inline Plan largest_plan_of(const LoraDropAttention& call, int multiprocessors) {
    return plan_of(call, multiprocessors, max_resident(tiles_of(call).path));
}

inline const char* problem(const LoraDropAttention& call) {
    if (const char* problem = problem_of_fields(call)) return problem;
    if (most_units(call, tiles_of(call)) > INT32_MAX) return "batch · heads · new_tokens · slots is too large";
    return nullptr;
}

template <class T>
struct Type {
    using type = T;
};

}  // namespace lora_drop

#endif
