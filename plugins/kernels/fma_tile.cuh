/* A tile of query rows on float32 FMAs: decode steps of small groups, and all of float32. */
#ifndef LORA_DROP_FMA_TILE_CUH
#define LORA_DROP_FMA_TILE_CUH

#include "work.cuh"

namespace lora_drop {

/* Shared memory, and what each thread holds. kRows query rows are worked on at once. */
template <class T_, class KV_, int kRows>
struct FmaTile {
    using T = T_;
    using KV = KV_;
    static constexpr Path kPath = kRows == 4 ? Path::kFma4 : Path::kFma8;
    using Shared = KV;  // in which keys and values lie in shared memory
    struct alignas(16) Weights {
        float row[kRows];
    };

    const LoraDropAttention& call;
    const Plan& plan;
    const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
    const int chunks;      // of a head
    const int tile_count;  // groups of kRows query rows in this block's tile
    const int score_stride;

    char* keys;         // [tile_keys, key_stride] bytes of KV
    char* values;       // [tile_keys, key_stride] bytes of KV
    float* queries;     // [rows, D]; at last the outputs
    float* scores;      // [tile_keys, score_stride]; then the weights
    float* maximum;     // [rows], of the scores so far, in powers of two
    float* sum;         // [rows], of the weights so far
    float* correction;  // [rows], to what was summed before this tile
    int* last_slot;     // [rows], that the row may see; −1: none
    float* scratch;     // [kWarps, D]

    // For copies: this thread's 16 bytes of keys copied_key, copied_key + copied_keys, …
    const int row_bytes;
    const int copied_piece, copied_key, copied_keys;

    // For the weighted sum: this thread's chunk of kRows outputs, over keys value_part, value_part + value_parts, …
    const int value_parts;
    const int value_chunk, value_tile, value_part;
    const bool sums_values;
    float accumulator[kRows][kChunk] = {};

    LORA_DROP_BODY FmaTile(const LoraDropAttention& call, const Plan& plan)
        : call(call),
          plan(plan),
          chunks(call.head_dim / kChunk),
          tile_count((plan.tile_rows + kRows - 1) / kRows),
          score_stride(tile_count * kRows + 4),
          row_bytes(call.head_dim * static_cast<int>(sizeof(KV))),
          copied_piece(thread % (row_bytes / 16)),
          copied_key(thread / (row_bytes / 16)),
          copied_keys(kThreads / (row_bytes / 16)),
          value_parts(kThreads / chunks / tile_count),
          value_chunk(thread % chunks),
          value_tile(thread / chunks / value_parts),
          value_part(thread / chunks % value_parts),
          sums_values(value_tile < tile_count) {
        const int rows = tile_count * kRows;
        keys = shared_memory();
        values = keys + plan.tile_keys * plan.key_stride;
        queries = reinterpret_cast<float*>(values + plan.tile_keys * plan.key_stride);
        scores = queries + rows * call.head_dim;
        maximum = scores + plan.tile_keys * score_stride;
        sum = maximum + rows;
        correction = sum + rows;
        last_slot = reinterpret_cast<int*>(correction + rows);
        scratch = reinterpret_cast<float*>(last_slot + rows);
    }

    /* Prepares the queries; rows past the tile or of tokens past the count become zeros that see nothing. */
    LORA_DROP_BODY void load_queries(Row row, const Destination& of) {
        const int d = call.head_dim;
        for (int r = warp; r < tile_count * kRows; r += kWarps) {
            const int query_row = of.first_row + r;
            const int token = query_row / plan.group;
            const bool valid = r < plan.tile_rows && query_row < plan.rows && token < row.count;
            if (lane == 0) {
                maximum[r] = -INFINITY;
                sum[r] = 0.0f;
                last_slot[r] = valid ? row.length + token : -1;
            }
            if (valid) {
                const int64_t table = (static_cast<int64_t>(of.b) * call.new_tokens + token) * (call.rotary_dim / 2);
                prepare_head(call, queries + r * d, static_cast<const T*>(call.query) + of.row_offset(r),
                             static_cast<const T*>(call.q_norm), static_cast<const T*>(call.cos) + table,
                             static_cast<const T*>(call.sin) + table);
            } else {
                for (int i = lane; i < d; i += kWarp) queries[r * d + i] = 0.0f;
            }
        }
    }

    LORA_DROP_BODY void load_keys(const KV* from, int n) { load_tile(keys, from, n); }
    LORA_DROP_BODY void load_values(const KV* from, int n) { load_tile(values, from, n); }
    LORA_DROP_BODY void clear_values(int) {}

    /* Starts copying n slots of a cache. from: [n, D] */
    LORA_DROP_BODY void load_tile(char* to, const KV* from, int n) {
        if (copied_key >= copied_keys) return;
        const char* source = reinterpret_cast<const char*>(from) + copied_piece * 16;
        for (int key = copied_key; key < n; key += copied_keys) {
            copy_async(to + key * plan.key_stride + copied_piece * 16, source + static_cast<int64_t>(key) * row_bytes);
        }
    }

    /* Scores of n keys, the first at slot first_slot, against all rows. A pair of keys is shared by neighbouring
     * threads, each with every parts-th chunk. */
    LORA_DROP_BODY void score(int first_slot, int n, float scale) {
        const int pairs = plan.tile_keys / 2, parts = kThreads / pairs;
        const int part = thread % parts;
        const int key[2] = {thread / parts, thread / parts + pairs};
        const int window = call.window == 0 ? INT32_MAX : call.window;
        for (int r = 0; r < tile_count * kRows; r += kRows) {
            float dot[2][kRows] = {};
            for (int c = part * kChunk; c < call.head_dim; c += parts * kChunk) {
                float k[2][kChunk];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    load_chunk(k[j], reinterpret_cast<const KV*>(keys + key[j] * plan.key_stride) + c);
                }
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    float q[kChunk];
                    load_chunk(q, queries + (r + i) * call.head_dim + c);
#pragma unroll
                    for (int e = 0; e < kChunk; ++e) {
                        dot[0][i] += q[e] * k[0][e];
                        dot[1][i] += q[e] * k[1][e];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int slot = first_slot + key[j];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    for (int mask = parts / 2; mask > 0; mask /= 2) dot[j][i] += shuffle_xor(dot[j][i], mask);
                    if (i % parts == part && key[j] < n) {
                        float x = dot[j][i] * scale;
                        if (call.softcap > 0.0f) x = call.softcap * tanhf(x / call.softcap);
                        const int last = last_slot[r + i];
                        const bool visible = slot <= last && slot > last - window;
                        scores[key[j] * score_stride + r + i] = visible ? x * kLog2E : -INFINITY;
                    }
                }
            }
        }
    }

    /* Scores of n keys to weights relative to the new maximum; a warp per row. */
    LORA_DROP_BODY void weigh(int n) {
        for (int r = warp; r < tile_count * kRows; r += kWarps) {
            const float before = maximum[r];
            float top = before;
            for (int key = lane; key < n; key += kWarp) top = fmaxf(top, scores[key * score_stride + r]);
            top = warp_max(top);
            // A row that has seen nothing yet: exp2(−∞ − 0) = 0, where −∞ − −∞ would be NaN
            const float origin = top == -INFINITY ? 0.0f : top;
            float weights = 0.0f;
            for (int key = lane; key < n; key += kWarp) {
                const float weight = exp2f(scores[key * score_stride + r] - origin);
                scores[key * score_stride + r] = weight;
                weights += weight;
            }
            weights = warp_sum(weights);
            if (lane == 0) {
                correction[r] = exp2f(before - origin);
                maximum[r] = top;
                sum[r] = sum[r] * correction[r] + weights;
            }
        }
    }

    LORA_DROP_BODY void add_values(int n) {
        if (!sums_values) return;
        const int r = value_tile * kRows;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int e = 0; e < kChunk; ++e) accumulator[i][e] *= correction[r + i];
        }
#pragma unroll 2
        for (int key = value_part; key < n; key += value_parts) {
            float value[kChunk];
            load_chunk(value, reinterpret_cast<const KV*>(values + key * plan.key_stride) + value_chunk * kChunk);
            const auto weights = *reinterpret_cast<const Weights*>(scores + key * score_stride + r);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int e = 0; e < kChunk; ++e) accumulator[i][e] += weights.row[i] * value[e];
            }
        }
    }

    /* Joins the threads' parts into `queries`, which is free by now. */
    LORA_DROP_BODY void join_parts() {
        for (int part = 0; part < value_parts; ++part) {
            if (sums_values && value_part == part) {
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    float* out = queries + (value_tile * kRows + i) * call.head_dim + value_chunk * kChunk;
                    float joined[kChunk] = {};
                    if (part > 0) load_chunk(joined, out);
#pragma unroll
                    for (int e = 0; e < kChunk; ++e) joined[e] += accumulator[i][e];
                    store_chunk(out, joined);
                }
            }
            sync_block();
        }
    }

    LORA_DROP_BODY void put(const Destination& to) {
        join_parts();
        const int rows = min(plan.tile_rows, plan.rows - to.first_row);
        for (int i = thread; i < rows * chunks; i += kThreads) {
            const int r = i / chunks, c = i % chunks * kChunk;
            float out[kChunk];
            load_chunk(out, queries + r * call.head_dim + c);
            if (to.whole) {
                const float factor = to.factor(r, maximum[r], sum[r]);
#pragma unroll
                for (int e = 0; e < kChunk; ++e) out[e] *= factor;
                store_chunk(static_cast<T*>(call.output) + to.row_offset(r) + c, out);
            } else {
                store_chunk(to.partial(r) + c, out);
                if (c == 0) to.put_statistics(r, maximum[r], sum[r]);
            }
        }
    }
};

}  // namespace lora_drop

#endif
