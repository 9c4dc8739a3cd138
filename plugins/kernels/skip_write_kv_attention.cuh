/* What the threads of one block do: append, attend, combine. plan.h says which blocks there are, work.cuh what each of
 * them does.
 *
 * Everything here compiles for the device and, through host_block.h, for the CPU.
 */
#ifndef LORA_DROP_SKIP_WRITE_KV_ATTENTION_CUH
#define LORA_DROP_SKIP_WRITE_KV_ATTENTION_CUH

#include "fma_tile.cuh"
#include "tensor_tile.cuh"
#include "work.cuh"

namespace lora_drop {

/* Body of the append kernel: a warp per new token. Block (tokens by kWarps, kv head, batch row). Shared: [kWarps, D].
 * */
template <class T, class KV>
LORA_DROP_BODY void append(const LoraDropAttention& call, const Plan&) {
    next_kernel_may_start();
    const Index block = block_index();
    const int warp = thread_index() / kWarp;
    const Row row(call, block.z);
    const int token = block.x * kWarps + warp;
    float* scratch = reinterpret_cast<float*>(shared_memory()) + warp * call.head_dim;
    if (token < row.count) {
        append_token<T, KV, KV>(call, row, block.z, block.y, token, scratch, nullptr, nullptr);
    }
}

/* Units unit … until − 1 of an item, for one head. */
template <class Tile>
LORA_DROP_BODY void attend_to(const LoraDropAttention& call, const Plan& plan, const Item& item, int unit, int until,
                              const Destination& to) {
    using T = typename Tile::T;
    using KV = typename Tile::KV;
    using Shared = typename Tile::Shared;
    const int d = call.head_dim;
    const int64_t head = (static_cast<int64_t>(item.b) * call.kv_heads + to.g) * call.slots * d;
    const KV* key_cache = static_cast<const KV*>(call.key_cache) + head;
    const KV* value_cache = static_cast<const KV*>(call.value_cache) + head;
    const float scale = call.k_scale == nullptr ? call.scale : call.scale * call.k_scale[to.g];
    const auto slot_at = [&](int u) { return item.begin + u * plan.tile_keys; };
    const auto slots_at = [&](int u) {
        return u < min(until, item.key_tiles) ? min(plan.tile_keys, item.end - slot_at(u)) : 0;
    };

    // While keys are scored the values arrive, while values are summed the next keys arrive
    Tile tile(call, plan);
    tile.load_keys(key_cache + static_cast<int64_t>(slot_at(unit)) * d, slots_at(unit));
    copy_commit();
    tile.load_queries(item.row, to);
#pragma unroll 1
    for (int u = unit; u < until; ++u) {
        int first_slot = slot_at(u), n = slots_at(u);
        if (u < item.key_tiles) {
            tile.load_values(value_cache + static_cast<int64_t>(first_slot) * d, n);
        } else {  // the new tokens, or nothing is seen
            first_slot = item.row.length;
            n = plan.fused ? item.row.count : 0;
            tile.clear_values(n);
            for (int token = tile.warp; token < n; token += kWarps) {
                append_token<T, KV>(call, item.row, item.b, to.g, token, tile.scratch + tile.warp * d,
                                    reinterpret_cast<Shared*>(tile.keys + token * plan.key_stride),
                                    reinterpret_cast<Shared*>(tile.values + token * plan.key_stride));
            }
        }
        copy_commit();
        copy_wait<1>();
        sync_block();
        tile.score(first_slot, n, scale);
        sync_block();
        tile.load_keys(key_cache + static_cast<int64_t>(slot_at(u + 1)) * d, slots_at(u + 1));
        copy_commit();
        tile.weigh(n);
        copy_wait<1>();
        sync_block();
        tile.add_values(n);
        sync_block();
    }
    tile.put(to);
}

/* Body of the attention kernel. Block: plan.workers. Shared: plan.shared_bytes. */
template <class Tile>
LORA_DROP_BODY void attend(const LoraDropAttention& call, const Plan& plan) {
    wait_for_kernel_before();
    next_kernel_may_start();
    const Share share(call, plan, reinterpret_cast<int*>(shared_memory()));
    Cut* const cut = plan.workers > 1 && thread_index() == 0 ? Workspace(call, plan).cuts + block_index().x : nullptr;
    if (cut != nullptr) *cut = {-1, 0, 0, 0};
    int unit = share.unit, g = share.g, index = share.item;
    for (int left = share.count; left > 0;) {
        const Item item(call, plan, index);
        const int until = min(item.units, unit + left);
        const bool ends = until == item.units;
        if (cut != nullptr && unit == 0 && !ends) *cut = {index, g, share.worker_ahead(item.units - until), 0};
        sync_block();  // shared memory is free
        attend_to<Tile>(call, plan, item, unit, until,
                        {call, plan, item.b, g, item.tile * plan.tile_rows, unit == 0 && ends,
                         unit == 0 ? Workspace::kBegan : Workspace::kWentOn});
        left -= until - unit;
        unit = 0;
        g = g + 1 == call.kv_heads ? 0 : g + 1;
        if (g == 0) ++index;
    }
}

/* Joins the parts of one query row. Shared: [kThreads, kChunk] and [2, workers]. */
template <class T>
LORA_DROP_BODY void join_row(const LoraDropAttention& call, const Plan& plan, const Cut& cut, int row,
                             const Destination& to) {
    const int worker = block_index().x, thread = thread_index();
    const int pieces = cut.last_worker - worker + 1;
    const Workspace workspace(call, plan);
    float* joined = reinterpret_cast<float*>(shared_memory());  // [parts, D]
    float* maximum = joined + kThreads * kChunk;
    float* sum = maximum + pieces;
    const auto piece_of = [](int i) { return i == 0 ? Workspace::kBegan : Workspace::kWentOn; };
    for (int i = thread; i < pieces; i += kThreads) {
        const float* statistic = workspace.statistic(worker + i, piece_of(i), row);
        maximum[i] = statistic[0];
        sum[i] = statistic[1];
    }
    sync_block();

    float top = -INFINITY, total = 0.0f;
    for (int i = 0; i < pieces; ++i) top = fmaxf(top, maximum[i]);
    const float origin = top == -INFINITY ? 0.0f : top;
    for (int i = 0; i < pieces; ++i) total += sum[i] * exp2f(maximum[i] - origin);

    // A thread sums one chunk over every parts-th piece
    const int chunks = call.head_dim / kChunk, parts = kThreads / chunks;
    const int c = thread % chunks * kChunk, part = thread / chunks;
    if (part < parts) {
        float out[kChunk] = {};
        for (int i = part; i < pieces; i += parts) {
            const float weight = exp2f(maximum[i] - origin);
            float partial[kChunk];
            load_chunk(partial, workspace.output(worker + i, piece_of(i), row) + c);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) out[e] += weight * partial[e];
        }
        store_chunk(joined + part * call.head_dim + c, out);
    }
    sync_block();
    if (part == 0) {
        const float factor = to.factor(row, origin, total);
        float out[kChunk] = {};
        for (int p = 0; p < parts; ++p) {
            float partial[kChunk];
            load_chunk(partial, joined + p * call.head_dim + c);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) out[e] += partial[e];
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) out[e] *= factor;
        store_chunk(static_cast<T*>(call.output) + to.row_offset(row) + c, out);
    }
}

/* Body of the kernel that joins what was cut: the item that worker block.x began, if others went on with it. Block
 * (worker, rows of a tile by plan.combine_rows). */
template <class T>
LORA_DROP_BODY void combine(const LoraDropAttention& call, const Plan& plan) {
    wait_for_kernel_before();
    const Cut cut = Workspace(call, plan).cuts[block_index().x];
    if (cut.item < 0) return;
    const int first_row = cut.item % plan.tiles * plan.tile_rows;
    const Destination to{call, plan, cut.item / plan.tiles, cut.g, first_row, true, Workspace::kBegan};
    const int rows = min(plan.tile_rows, plan.rows - first_row);
    for (int row = block_index().y; row < rows; row += plan.combine_rows) join_row<T>(call, plan, cut, row, to);
}

}  // namespace lora_drop

#endif
