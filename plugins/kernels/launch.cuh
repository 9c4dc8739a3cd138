/* The launches of a call: number types and tile, then append, attend, combine, through a launcher of the device or of
 * the host.
 */
#ifndef LORA_DROP_LAUNCH_CUH
#define LORA_DROP_LAUNCH_CUH

#include <type_traits>

#include "skip_write_kv_attention.cuh"

namespace lora_drop {

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

/* Calls f(Type<T>, Type<KV>, Type<Tile>) with the tile of a call. */
template <class F>
auto with_tile(const LoraDropAttention& call, Path path, F f) {
    return with_types(call, [&](auto type, auto cache_type) {
        using T = typename decltype(type)::type;
        using KV = typename decltype(cache_type)::type;
        if constexpr (!std::is_same_v<T, float>) {
            switch (path) {
                case Path::kTensor64: return f(type, cache_type, Type<TensorTile<T, KV, 64>>{});
                case Path::kTensor128: return f(type, cache_type, Type<TensorTile<T, KV, 128>>{});
                case Path::kTensor256: return f(type, cache_type, Type<TensorTile<T, KV, 256>>{});
                default: break;
            }
        }
        return path == Path::kFma4 ? f(type, cache_type, Type<FmaTile<T, KV, 4>>{})
                                   : f(type, cache_type, Type<FmaTile<T, KV, 8>>{});
    });
}

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

/* A launcher has `resident<Tile>(shared_bytes)`, the blocks of `attend` that a multiprocessor takes, and a member for
 * each body: (call, plan, grid, shared_bytes) -> error, 0 if none. */
template <class Launcher>
int launch(const LoraDropAttention& call, size_t workspace_bytes, int multiprocessors, const Launcher& launcher) {
    const Plan tiles = tiles_of(call);
    return with_tile(call, tiles.path, [&](auto type, auto cache_type, auto tile_type) {
        using T = typename decltype(type)::type;
        using KV = typename decltype(cache_type)::type;
        using Tile = typename decltype(tile_type)::type;
        const int resident = launcher.template resident<Tile>(tiles.shared_bytes);
        // Never more than the workspace was asked for
        const Plan plan = plan_of(call, multiprocessors, std::min(resident, max_resident(tiles.path)));
        if (workspace_bytes < plan.workspace_bytes) return kInvalidValue;
        if (plan.workspace_bytes > 0 && call.workspace == nullptr) return kInvalidValue;

        const Index append_grid{ceil_div(call.new_tokens, kWarps), call.kv_heads, call.batch};
        const size_t append_bytes = static_cast<size_t>(kWarps) * call.head_dim * 4;
        const size_t combine_bytes = (2 * static_cast<size_t>(plan.workers) + kThreads * kChunk) * 4;
        int error = 0;
        if (!plan.fused) error = launcher.template append<T, KV>(call, plan, append_grid, append_bytes);
        if (error != 0) return error;
        error = launcher.template attend<Tile>(call, plan, {plan.workers, 1, 1}, plan.shared_bytes);
        if (error != 0 || plan.workers == 1) return error;
        return launcher.template combine<T>(call, plan, {plan.workers, plan.combine_rows, 1}, combine_bytes);
    });
}

}  // namespace lora_drop

#endif
