/* One head of one token, and the row of the batch that it belongs to: loads and stores, norm and RoPE, the append.
 *
 * Everything here compiles for the device and, through host_block.h, for the CPU.
 */
#ifndef LORA_DROP_HEADS_CUH
#define LORA_DROP_HEADS_CUH

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

/* Eight numbers as KV stores them, in the type of shared memory: exact, since that holds every KV. */
template <class KV, class Shared>
LORA_DROP_BODY void share_chunk(Shared* to, const float* from) {
    float stored[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
        KV x;
        from_float(from[i], x);
        stored[i] = to_float(x);
    }
    store_chunk(to, stored);
}

/* Stores a new token's key and value of one head, by one warp, in the cache and, if not null, in shared memory too.
 * scratch: [D], shared. */
template <class T, class KV, class Shared>
LORA_DROP_BODY void append_token(const LoraDropAttention& call, Row row, int b, int g, int token, float* scratch,
                                 Shared* shared_key, Shared* shared_value) {
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
            share_chunk<KV>(shared_key + at_lane, key);
            share_chunk<KV>(shared_value + at_lane, value);
        }
    }
}

}  // namespace lora_drop

#endif
