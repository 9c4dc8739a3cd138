/* What the threads of one block do: append, attend, combine. plan.h says how blocks share the work.
 *
 * Everything here compiles for the device and, through host_block.h, for the CPU.
 */
#ifndef LORA_DROP_SKIP_WRITE_KV_ATTENTION_CUH
#define LORA_DROP_SKIP_WRITE_KV_ATTENTION_CUH

#include <math.h>

#include "plan.h"

namespace lora_drop {

constexpr float kLog2E = 1.4426950408889634f;

template <class T>
struct alignas(sizeof(T) * kChunk < 16 ? sizeof(T) * kChunk : 16) Chunk {
    T element[kChunk];
};

template <class T>
LORA_DROP_BODY void load_chunk(float* to, const T* from) {
    const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = to_float(chunk.element[i]);
}

template <class T>
LORA_DROP_BODY void store_chunk(T* to, const float* from) {
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) from_float(from[i], chunk.element[i]);
    *reinterpret_cast<Chunk<T>*>(to) = chunk;
}

LORA_DROP_BODY float warp_sum(float x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

LORA_DROP_BODY float warp_max(float x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

/* One row of the batch. */
struct Row {
    int length;  // valid slots before the call
    int count;   // new tokens

    LORA_DROP_BODY Row(const LoraDropAttention& call, int b)
        : length(clamped(call.length[b], call.slots)),
          count(clamped(call.count == nullptr ? call.new_tokens : call.count[b],
                        min(call.new_tokens, call.slots - length))) {}

    // An engine builder may time the kernel on whatever its buffers hold; no content must lead out of them
    LORA_DROP_BODY static int clamped(int64_t value, int largest) {
        return value < 0 ? 0 : value > largest ? largest : static_cast<int>(value);
    }
};

struct Slots {
    int begin, end;
};

/* The cached slots that one split attends to for a tile of query rows. All splits are empty or all tiles of keys are
 * dealt evenly over them, the last split never without one. */
LORA_DROP_BODY Slots split_slots(const LoraDropAttention& call, const Plan& plan, Row row, int tile, int split) {
    const int first_token = tile * plan.tile_rows / plan.group;
    const int last_row = min((tile + 1) * plan.tile_rows, plan.rows) - 1;
    const int last_token = min(last_row / plan.group, row.count - 1);
    if (first_token > last_token) return {0, 0};

    const int begin = call.window == 0 ? 0 : max(row.length + first_token - call.window + 1, 0);
    const int end = plan.fused ? row.length : row.length + last_token + 1;
    const int key_tiles = max(end - begin + plan.tile_keys - 1, 0) / plan.tile_keys;
    const int first = static_cast<int>(static_cast<int64_t>(key_tiles) * split / plan.splits);
    const int last = static_cast<int>(static_cast<int64_t>(key_tiles) * (split + 1) / plan.splits);
    return {begin + first * plan.tile_keys, min(begin + last * plan.tile_keys, end)};
}

/* Norm and RoPE of one head in float32, by one warp. x: [D]; norm: [D] or null; cos, sin: [R/2]; out: [D], shared. */
template <class T>
LORA_DROP_BODY void prepare_head(const LoraDropAttention& call, float* out, const T* x, const T* norm, const T* cos,
                                 const T* sin) {
    const int lane = thread_index() % kWarp;
    const bool active = lane < call.head_dim / kChunk;
    float v[kChunk] = {};
    if (active) load_chunk(v, x + lane * kChunk);
    if (norm != nullptr) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) square += v[i] * v[i];
        const float mean = warp_sum(square) / static_cast<float>(call.head_dim);
        const float factor = 1.0f / sqrtf(mean + call.norm_epsilon);
        float weight[kChunk] = {};
        if (active) load_chunk(weight, norm + lane * kChunk);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) v[i] *= factor * weight[i];
    }
    if (active) store_chunk(out + lane * kChunk, v);
    sync_warp();
    const int half = call.rotary_dim / 2;
    for (int pair = lane; pair < half; pair += kWarp) {
        const int i = call.interleaved ? 2 * pair : pair;
        const int j = call.interleaved ? 2 * pair + 1 : pair + half;
        const float c = to_float(cos[pair]), s = to_float(sin[pair]);
        const float a = out[i], b = out[j];
        out[i] = a * c - b * s;
        out[j] = b * c + a * s;
    }
    sync_warp();
}

/* Stores a new token's key and value of one head, by one warp, in the cache and, if not null, in shared memory too.
 * scratch: [D], shared. */
template <class T, class KV>
LORA_DROP_BODY void append_token(const LoraDropAttention& call, Row row, int b, int g, int token, float* scratch,
                                 KV* shared_key, KV* shared_value) {
    const int d = call.head_dim;
    const int64_t at = static_cast<int64_t>(b) * call.new_tokens + token;
    const int64_t from = (at * call.kv_heads + g) * d;
    const int64_t table = at * (call.rotary_dim / 2);
    const int64_t to = ((static_cast<int64_t>(b) * call.kv_heads + g) * call.slots + row.length + token) * d;
    prepare_head(call, scratch, static_cast<const T*>(call.key) + from, static_cast<const T*>(call.k_norm),
                 static_cast<const T*>(call.cos) + table, static_cast<const T*>(call.sin) + table);

    const int at_lane = thread_index() % kWarp * kChunk;
    if (at_lane < d) {
        float key[kChunk], value[kChunk];
        load_chunk(key, scratch + at_lane);
        load_chunk(value, static_cast<const T*>(call.value) + from + at_lane);
        if (call.k_scale != nullptr) {
            const float k_scale = call.k_scale[g], v_scale = call.v_scale[g];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) {
                key[i] /= k_scale;
                value[i] /= v_scale;
            }
        }
        store_chunk(static_cast<KV*>(call.key_cache) + to + at_lane, key);
        store_chunk(static_cast<KV*>(call.value_cache) + to + at_lane, value);
        if (shared_key != nullptr) {
            store_chunk(shared_key + at_lane, key);
            store_chunk(shared_value + at_lane, value);
        }
    }
}

/* Body of the append kernel: a warp per new token. Block (tokens by kWarps, kv head, batch row). Shared: [kWarps, D]. */
template <class T, class KV>
LORA_DROP_BODY void append(const LoraDropAttention& call, const Plan&) {
    const Index block = block_index();
    const int warp = thread_index() / kWarp;
    const Row row(call, block.z);
    const int token = block.x * kWarps + warp;
    float* scratch = reinterpret_cast<float*>(shared_memory()) + warp * call.head_dim;
    if (token < row.count) {
        append_token<T, KV>(call, row, block.z, block.y, token, scratch, nullptr, nullptr);
    }
}

/* Where the partial results of a split lie in the workspace: outputs [B, G, splits, rows, D], not yet divided by the sum;
 * then, from `statistics`, the maximum and the sum [B, G, splits, rows, 2], in powers of two. */
struct Partials {
    float* output;
    float* statistics;

    LORA_DROP_BODY Partials(const LoraDropAttention& call, const Plan& plan, int b, int g, int split, int row) {
        const int64_t head = static_cast<int64_t>(b) * call.kv_heads + g;
        const int64_t heads = static_cast<int64_t>(call.batch) * call.kv_heads;
        const int64_t at = (head * plan.splits + split) * plan.rows + row;
        float* workspace = static_cast<float*>(call.workspace);
        output = workspace + at * call.head_dim;
        statistics = workspace + heads * plan.splits * plan.rows * call.head_dim + at * 2;
    }
};

/* Where a query row begins in query and output. [B, S, G, group, D] */
LORA_DROP_BODY int64_t row_offset(const LoraDropAttention& call, const Plan& plan, int b, int g, int row) {
    const int64_t token = static_cast<int64_t>(b) * call.new_tokens + row / plan.group;
    return ((token * call.kv_heads + g) * plan.group + row % plan.group) * call.head_dim;
}

/* A block of `attend`: shared memory, and what each thread holds. kRows query rows are worked on at once. */
template <class T, class KV, int kRows>
struct Attention {
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

    LORA_DROP_BODY Attention(const LoraDropAttention& call, const Plan& plan)
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
    LORA_DROP_BODY void load_queries(Row row, int b, int g, int first_row) {
        const int d = call.head_dim;
        for (int r = warp; r < tile_count * kRows; r += kWarps) {
            const int query_row = first_row + r;
            const int token = query_row / plan.group;
            const bool valid = r < plan.tile_rows && query_row < plan.rows && token < row.count;
            if (lane == 0) {
                maximum[r] = -INFINITY;
                sum[r] = 0.0f;
                last_slot[r] = valid ? row.length + token : -1;
            }
            if (valid) {
                const int64_t table = (static_cast<int64_t>(b) * call.new_tokens + token) * (call.rotary_dim / 2);
                prepare_head(call, queries + r * d,
                             static_cast<const T*>(call.query) + row_offset(call, plan, b, g, query_row),
                             static_cast<const T*>(call.q_norm), static_cast<const T*>(call.cos) + table,
                             static_cast<const T*>(call.sin) + table);
            } else {
                for (int i = lane; i < d; i += kWarp) queries[r * d + i] = 0.0f;
            }
        }
    }

    /* Starts copying n slots of a cache. from: [n, D] */
    LORA_DROP_BODY void load_tile(char* to, const KV* from, int n) {
        if (copied_key >= copied_keys) return;
        const char* source = reinterpret_cast<const char*>(from) + copied_piece * 16;
        for (int key = copied_key; key < n; key += copied_keys) {
            copy_async(to + key * plan.key_stride + copied_piece * 16, source + static_cast<int64_t>(key) * row_bytes);
        }
    }

    /* Scores of n keys, the first at slot first_slot, against all rows. A pair of keys is shared by neighbouring threads,
     * each with every parts-th chunk. */
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
};

/* Body of the attention kernel. Block (tile · splits + split, kv head, batch row). Shared: plan.shared_bytes. */
template <class T, class KV, int kRows>
LORA_DROP_BODY void attend(const LoraDropAttention& call, const Plan& plan) {
    const Index block = block_index();
    const int b = block.z, g = block.y;
    const int tile = plan.tiles - 1 - block.x / plan.splits;  // the last tile sees the most: it goes first
    const int split = block.x % plan.splits;
    const int d = call.head_dim;
    const Row row(call, b);
    const Slots slots = split_slots(call, plan, row, tile, split);
    const int appended = plan.fused && split == plan.splits - 1 ? row.count : 0;
    if (plan.splits > 1 && slots.begin >= slots.end && appended == 0) return;  // combine skips it too

    Attention<T, KV, kRows> attention(call, plan);
    const int64_t head = (static_cast<int64_t>(b) * call.kv_heads + g) * call.slots * d;
    const KV* key_cache = static_cast<const KV*>(call.key_cache) + head;
    const KV* value_cache = static_cast<const KV*>(call.value_cache) + head;
    const float scale = call.k_scale == nullptr ? call.scale : call.scale * call.k_scale[g];

    // While keys are scored the values arrive, while values are summed the next keys arrive
    const auto slots_at = [&](int slot) { return max(min(plan.tile_keys, slots.end - slot), 0); };
    attention.load_tile(attention.keys, key_cache + static_cast<int64_t>(slots.begin) * d, slots_at(slots.begin));
    copy_commit();
    attention.load_queries(row, b, g, tile * plan.tile_rows);
    for (int slot = slots.begin; slot < slots.end; slot += plan.tile_keys) {
        const int n = slots_at(slot), next = slot + plan.tile_keys;
        attention.load_tile(attention.values, value_cache + static_cast<int64_t>(slot) * d, n);
        copy_commit();
        copy_wait<1>();
        sync_block();
        attention.score(slot, n, scale);
        sync_block();
        attention.load_tile(attention.keys, key_cache + static_cast<int64_t>(next) * d, slots_at(next));
        copy_commit();
        attention.weigh(n);
        copy_wait<1>();
        sync_block();
        attention.add_values(n);
        sync_block();
    }
    if (appended > 0) {
        for (int token = attention.warp; token < appended; token += kWarps) {
            append_token<T, KV>(call, row, b, g, token, attention.scratch + attention.warp * d,
                                reinterpret_cast<KV*>(attention.keys + token * plan.key_stride),
                                reinterpret_cast<KV*>(attention.values + token * plan.key_stride));
        }
        sync_block();
        attention.score(row.length, appended, scale);
        sync_block();
        attention.weigh(appended);
        sync_block();
        attention.add_values(appended);
    }
    sync_block();  // without any slot this is the first
    attention.join_parts();

    const int rows = min(plan.tile_rows, plan.rows - tile * plan.tile_rows);
    const float v_scale = call.v_scale == nullptr ? 1.0f : call.v_scale[g];
    for (int i = attention.thread; i < rows * attention.chunks; i += kThreads) {
        const int r = i / attention.chunks, c = i % attention.chunks * kChunk;
        const int query_row = tile * plan.tile_rows + r;
        float out[kChunk];
        load_chunk(out, attention.queries + r * d + c);
        if (plan.splits == 1) {
            const float factor = attention.sum[r] == 0.0f ? 0.0f : v_scale / attention.sum[r];
#pragma unroll
            for (int e = 0; e < kChunk; ++e) out[e] *= factor;
            store_chunk(static_cast<T*>(call.output) + row_offset(call, plan, b, g, query_row) + c, out);
        } else {
            const Partials partials(call, plan, b, g, split, query_row);
            store_chunk(partials.output + c, out);
            if (c == 0) {
                partials.statistics[0] = attention.maximum[r];
                partials.statistics[1] = attention.sum[r];
            }
        }
    }
}

/* Body of the kernel that joins the splits. Block (query row, kv head, batch row). Shared: [2, splits] and
 * [kThreads, kChunk]. */
template <class T>
LORA_DROP_BODY void combine(const LoraDropAttention& call, const Plan& plan) {
    const Index block = block_index();
    const int b = block.z, g = block.y, query_row = block.x;
    const int thread = thread_index();
    const Row row(call, b);
    float* maximum = reinterpret_cast<float*>(shared_memory() + kThreads * kChunk * sizeof(float));
    float* sum = maximum + plan.splits;
    for (int split = thread; split < plan.splits; split += kThreads) {
        const Slots slots = split_slots(call, plan, row, query_row / plan.tile_rows, split);
        const bool written = slots.begin < slots.end || (plan.fused && split == plan.splits - 1 && row.count > 0);
        const float* statistics = Partials(call, plan, b, g, split, query_row).statistics;
        maximum[split] = written ? statistics[0] : -INFINITY;
        sum[split] = written ? statistics[1] : 0.0f;
    }
    sync_block();

    float top = -INFINITY, total = 0.0f;
    for (int split = 0; split < plan.splits; ++split) top = fmaxf(top, maximum[split]);
    const float origin = top == -INFINITY ? 0.0f : top;
    for (int split = 0; split < plan.splits; ++split) total += sum[split] * exp2f(maximum[split] - origin);

    // A thread sums one chunk over every parts-th split
    const int chunks = call.head_dim / kChunk, parts = kThreads / chunks;
    const int c = thread % chunks * kChunk, part = thread / chunks;
    float* joined = reinterpret_cast<float*>(shared_memory());  // [parts, D]
    if (part < parts) {
        float out[kChunk] = {};
        for (int split = part; split < plan.splits; split += parts) {
            // Nothing was written where nothing was seen
            if (maximum[split] == -INFINITY) continue;
            const float weight = exp2f(maximum[split] - origin);
            float partial[kChunk];
            load_chunk(partial, Partials(call, plan, b, g, split, query_row).output + c);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) out[e] += weight * partial[e];
        }
        store_chunk(joined + part * call.head_dim + c, out);
    }
    sync_block();
    if (part == 0) {
        const float v_scale = call.v_scale == nullptr ? 1.0f : call.v_scale[g];
        const float factor = total == 0.0f ? 0.0f : v_scale / total;
        float out[kChunk] = {};
        for (int p = 0; p < parts; ++p) {
            float partial[kChunk];
            load_chunk(partial, joined + p * call.head_dim + c);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) out[e] += partial[e];
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) out[e] *= factor;
        store_chunk(static_cast<T*>(call.output) + row_offset(call, plan, b, g, query_row) + c, out);
    }
}

}  // namespace lora_drop

#endif
