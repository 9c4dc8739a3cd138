/* A tile of query rows on tensor cores: prompts, drafts to verify and groups of 8 and more, in float16 and bfloat16.
 *
 * A warp has 16 query rows and all keys of a tile. Scores, maxima, sums and outputs stay in its registers as float32,
 * in the layout of mma.sync.m16n8k16: lane l has row l / 4 and the one 8 below it, columns 2 · (l % 4) and the next, of
 * each 8 keys or 8 outputs. The weights are rounded to T for the product with the values, as the query is after RoPE.
 */
#ifndef LORA_DROP_TENSOR_TILE_CUH
#define LORA_DROP_TENSOR_TILE_CUH

#include "work.cuh"

namespace lora_drop {

/* kHeadDim: head_dim at most, and a multiple of 16. */
template <class T_, class KV_, int kHeadDim>
struct TensorTile {
    using T = T_;
    using KV = KV_;
    using Shared = T;  // a quantized cache is exact in float16 and bfloat16, and converted as it is loaded
    static constexpr Path kPath = kHeadDim == 64    ? Path::kTensor64
                                  : kHeadDim == 128 ? Path::kTensor128
                                                    : Path::kTensor256;
    static constexpr int kKeys = tensor_tile_keys(kHeadDim);
    static constexpr int kRows = 16;
    static constexpr int kStride = tensor_key_stride(kHeadDim);

    const LoraDropAttention& call;
    const Plan& plan;
    const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
    const int first_row = warp * kRows;  // of the tile
    const bool active;                   // the warp has rows

    // For loads: this thread's chunk of keys copied_key, copied_key + copied_keys, …
    const int copied_chunk, copied_key, copied_keys;

    char* queries;   // [rows, kStride] bytes of T, like keys and values
    char* keys;      // [kKeys, kStride]
    char* values;    // [kKeys, kStride]
    float* scratch;  // [kWarps, D]

    float scores[kKeys / 8][4];
    float outputs[kHeadDim / 8][4] = {};
    float maximum[2] = {-INFINITY, -INFINITY};  // of the lane's two rows, in powers of two
    float sum[2] = {};                          // of the lane's own weights
    int last_slot[2];                           // that the row may see; −1: none

    LORA_DROP_BODY TensorTile(const LoraDropAttention& call, const Plan& plan)
        : call(call),
          plan(plan),
          active(first_row < plan.tile_rows),
          copied_chunk(thread % (call.head_dim / kChunk)),
          copied_key(thread / (call.head_dim / kChunk)),
          copied_keys(kThreads / (call.head_dim / kChunk)) {
        queries = shared_memory();
        keys = queries + (plan.tile_rows + kRows - 1) / kRows * kRows * kStride;
        values = keys + kKeys * kStride;
        scratch = reinterpret_cast<float*>(values + kKeys * kStride);
        if (call.head_dim % 16 != 0) {  // zeros up to a multiple of 16, which no load writes
            for (int key = thread; key < kKeys; key += kThreads) clear(keys + key * kStride + 2 * call.head_dim);
        }
    }

    LORA_DROP_BODY static void clear(char* to) {
        const float zeros[kChunk] = {};
        store_chunk(reinterpret_cast<T*>(to), zeros);
    }

    LORA_DROP_BODY void load_queries(Row row, const Destination& of) {
        const int d = call.head_dim;
        for (int r = first_row; active && r < first_row + kRows; ++r) {
            const int query_row = of.first_row + r;
            const int token = query_row / plan.group;
            const bool valid = r < plan.tile_rows && query_row < plan.rows && token < row.count;
            float* head = scratch + warp * d;
            char* to = queries + r * kStride;
            // No index but constants, or the registers would be memory
            const int last = valid ? row.length + token : -1;
            if (r % kRows == lane / 4) last_slot[0] = last;
            if (r % kRows == lane / 4 + 8) last_slot[1] = last;
            if (valid) {
                const int64_t table = (static_cast<int64_t>(of.b) * call.new_tokens + token) * (call.rotary_dim / 2);
                prepare_head(call, head, static_cast<const T*>(call.query) + of.row_offset(r),
                             static_cast<const T*>(call.q_norm), static_cast<const T*>(call.cos) + table,
                             static_cast<const T*>(call.sin) + table);
            }
            const int c = lane * kChunk;
            if (c < (d + 15) / 16 * 16) {
                float x[kChunk] = {};
                if (valid && c < d) load_chunk(x, head + c);
                store_chunk(reinterpret_cast<T*>(to) + c, x);
            }
        }
    }

    LORA_DROP_BODY void load_keys(const KV* from, int n) { load_tile(keys, from, n, Type<KV>{}); }
    LORA_DROP_BODY void load_values(const KV* from, int n) {
        load_tile(values, from, n, Type<KV>{});
        clear_values(n);
    }

    /* No weight times what is not a number is not a number: rows past n of the last 16 become zeros. */
    LORA_DROP_BODY void clear_values(int n) {
        for (int key = n + copied_key; copied_key < copied_keys && key < (n + 15) / 16 * 16; key += copied_keys) {
            clear(values + key * kStride + copied_chunk * 16);
        }
    }

    /* Starts copying n slots of a cache. from: [n, D] */
    LORA_DROP_BODY void load_tile(char* to, const T* from, int n, Type<T>) {
#pragma unroll 1
        for (int key = copied_key; copied_key < copied_keys && key < n; key += copied_keys) {
            copy_async(to + key * kStride + copied_chunk * 16, from + key * call.head_dim + copied_chunk * kChunk);
        }
    }
    template <class Quantized>
    LORA_DROP_BODY void load_tile(char* to, const Quantized* from, int n, Type<Quantized>) {
#pragma unroll 1
        for (int key = copied_key; copied_key < copied_keys && key < n; key += copied_keys) {
            float x[kChunk];
            load_chunk(x, from + key * call.head_dim + copied_chunk * kChunk);
            store_chunk(reinterpret_cast<T*>(to + key * kStride) + copied_chunk * kChunk, x);
        }
    }

    /* Scores of n keys, the first at slot first_slot, in powers of two; −∞ where a row does not see a key. */
    LORA_DROP_BODY void score(int first_slot, int n, float scale) {
        if (!active) return;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[j][e] = 0.0f;
        }
        // Which row and which 8 columns of 16 × 16 elements this lane points ldmatrix to
        const char* query = queries + (first_row + lane % 16) * kStride + lane / 16 * 16;
        const char* key = keys + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 16;
#pragma unroll 1
        for (int c = 0; c < call.head_dim; c += 16) {
            uint32_t q[4];
            load_matrices(q, query + 2 * c);
#pragma unroll
            for (int j = 0; j < kKeys / 8; j += 2) {
                if (8 * j >= n) break;
                uint32_t k[4];
                load_matrices(k, key + 8 * j * kStride + 2 * c);
                multiply_add<T>(scores[j], q, k);
                multiply_add<T>(scores[j + 1], q, k + 2);
            }
        }
        const int window = call.window == 0 ? INT32_MAX : call.window;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = 8 * j + lane % 4 * 2 + e % 2, slot = first_slot + i, last = last_slot[e / 2];
                float x = scores[j][e] * scale;
                if (call.softcap > 0.0f) x = call.softcap * tanhf(x / call.softcap);
                const bool visible = i < n && slot <= last && slot > last - window;
                scores[j][e] = visible ? x * kLog2E : -INFINITY;
            }
        }
    }

    /* Scores to weights relative to the new maximum, to which what was summed before is brought. */
    LORA_DROP_BODY void weigh(int) {
        if (!active) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = maximum[half];
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
                top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
            }
            top = fmaxf(top, shuffle_xor(top, 1));
            top = fmaxf(top, shuffle_xor(top, 2));
            // A row that has seen nothing yet: exp2(−∞ − 0) = 0, where −∞ − −∞ would be NaN
            const float origin = top == -INFINITY ? 0.0f : top;
            const float correction = exp2f(maximum[half] - origin);
            maximum[half] = top;
            sum[half] *= correction;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) {
                    scores[j][e] = exp2f(scores[j][e] - origin);
                    sum[half] += scores[j][e];
                }
            }
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                outputs[j][2 * half] *= correction;
                outputs[j][2 * half + 1] *= correction;
            }
        }
    }

    LORA_DROP_BODY void add_values(int n) {
        if (!active) return;
        const char* value = values + (lane % 16) * kStride + lane / 16 * 16;
#pragma unroll
        for (int j = 0; j < kKeys / 8; j += 2) {
            if (8 * j >= n) break;
            // Scores of two times 8 keys lie where a 16 × 16 factor wants them
            const uint32_t weights[4] = {pack<T>(scores[j][0], scores[j][1]), pack<T>(scores[j][2], scores[j][3]),
                                         pack<T>(scores[j + 1][0], scores[j + 1][1]),
                                         pack<T>(scores[j + 1][2], scores[j + 1][3])};
#pragma unroll
            for (int c = 0; c < kHeadDim; c += 16) {
                if (c >= call.head_dim) break;
                uint32_t v[4];
                load_matrices_transposed(v, value + 8 * j * kStride + 2 * c);
                multiply_add<T>(outputs[c / 8], weights, v);
                if (c + 8 < call.head_dim) multiply_add<T>(outputs[c / 8 + 1], weights, v + 2);
            }
        }
    }

    LORA_DROP_BODY void put(const Destination& to) {
        if (!active) return;
        const int rows = min(plan.tile_rows, plan.rows - to.first_row);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = first_row + lane / 4 + 8 * half;
            float total = sum[half] + shuffle_xor(sum[half], 1);
            total += shuffle_xor(total, 2);
            if (r >= rows) continue;
            const float factor = to.whole ? to.factor(r, maximum[half], total) : 1.0f;
            if (!to.whole && lane % 4 == 0) to.put_statistics(r, maximum[half], total);
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                const int c = 8 * j + lane % 4 * 2;
                if (c >= call.head_dim) break;
                const float a = outputs[j][2 * half] * factor, b = outputs[j][2 * half + 1] * factor;
                if (to.whole) {
                    T* out = static_cast<T*>(call.output) + to.row_offset(r) + c;
                    *reinterpret_cast<uint32_t*>(out) = pack<T>(a, b);
                } else {
                    to.partial(r)[c] = a;
                    to.partial(r)[c + 1] = b;
                }
            }
        }
    }
};

}  // namespace lora_drop

#endif
