/* What the threads of one block do for products with int4 weights.
 *
 * The weights are the left factor of mma.sync.m16n8k16, 16 rows of them, and x is the right one, 8 of its rows: so 8
 * tokens cost what one does. A lane loads 32 weights of a row at once, 16 bytes, in the order of memory; a product of
 * matrices may take its k in any order that both factors share, so x follows the order in which weights unpack.
 */
#ifndef LORA_DROP_INT4_GEMM_CUH
#define LORA_DROP_INT4_GEMM_CUH

#include "block.h"
#include "int4_gemm.h"

namespace lora_drop {

constexpr int kInt4Lane = 32;           // k of a lane at a time, of which 16 share a scale at least
constexpr int kInt4Chunk = 128;         // of a warp: 4 lanes have other k
constexpr int kFewRows = 8;             // of x, for which weights are read as fast as memory gives them
constexpr int kTokens = 64;             // of x in a block, where there are more
constexpr int kWarpOutputs = 32;        // of weights in a warp then
constexpr int kTokenStride = 256 + 64;  // bytes between them in shared memory: 4 lanes read 64 bytes, free of conflicts
constexpr size_t kTokenTileBytes = static_cast<size_t>(kTokens) * kTokenStride;

inline const char* problem(const LoraDropInt4Gemm& call) {
    if (call.rows < 1 || call.inputs < 1 || call.outputs < 1) return "rows, inputs and outputs must be positive";
    if (call.block != 16 && call.block != 32 && call.block != 64 && call.block != 128)
        return "block must be 16, 32, 64 or 128";
    if (call.inputs % call.block != 0 || call.inputs % kInt4Lane != 0)
        return "inputs must be a multiple of block and of 32";
    if (call.zero_points && call.inputs / call.block % 2 != 0) return "with zero points a row must have an even number of blocks";
    if (call.rows > 65535 * kTokens) return "rows must be at most 65535 · 64";
    if (call.dtype != LORA_DROP_F16 && call.dtype != LORA_DROP_BF16) return "dtype must be F16 or BF16";
    if (!call.x || !call.weights || !call.scales || !call.y) return "a required pointer is null";
    return nullptr;
}

struct alignas(16) Words {
    uint32_t word[4];
};

/* A lane's part of 16 rows of weights and 128 k: 32 of row lane / 4 and 32 of the one 8 below it. */
template <class T>
struct Weights {
    Words row[2];
    T scale[2][2], zero[2][2];  // of the first and the second 16 k

    LORA_DROP_BODY void load(const LoraDropInt4Gemm& call, int first_output, int k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output = first_output + thread_index() % kWarp / 4 + 8 * half;
            row[half] = Words{};
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                from_float(0.0f, scale[half][part]);
                from_float(8.0f, zero[half][part]);
            }
            if (output >= call.outputs || k >= call.inputs) continue;
            const int64_t at = static_cast<int64_t>(output) * call.inputs + k;
            row[half] = *reinterpret_cast<const Words*>(static_cast<const char*>(call.weights) + at / 2);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const int64_t block = (at + 16 * part) / call.block;
                scale[half][part] = static_cast<const T*>(call.scales)[block];
                if (!call.zero_points) continue;
                const int two = static_cast<const uint8_t*>(call.zero_points)[block / 2];
                from_float(static_cast<float>(block % 2 ? two >> 4 : two & 15), zero[half][part]);
            }
        }
    }

    /* The factor for k 8 · j + {2h, 2h + 4, 2h + 1, 2h + 5} of each lane. */
    LORA_DROP_BODY void factor(uint32_t (&a)[4], int j, int h) const {
        a[0] = unpack_uint4<T>(row[0].word[j], 2 * h, scale[0][j / 2], zero[0][j / 2]);
        a[1] = unpack_uint4<T>(row[1].word[j], 2 * h, scale[1][j / 2], zero[1][j / 2]);
        a[2] = unpack_uint4<T>(row[0].word[j], 2 * h + 1, scale[0][j / 2], zero[0][j / 2]);
        a[3] = unpack_uint4<T>(row[1].word[j], 2 * h + 1, scale[1][j / 2], zero[1][j / 2]);
    }
};

/* The other factor, from 8 consecutive elements of x. */
LORA_DROP_BODY void right_factor(uint32_t (&b)[2], const Words& x, int h) {
    const uint32_t first = x.word[h], second = x.word[h + 2];
    b[0] = (first & 0xffffu) | second << 16;
    b[1] = first >> 16 | (second & 0xffff0000u);
}

/* Body for up to 8 rows of x. Block: 16 outputs; its warps take every fourth chunk of k. Shared: [kWarps, 16, 8]. */
template <class T>
LORA_DROP_BODY void int4_gemv(const LoraDropInt4Gemm& call) {
    const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
    const int first_output = block_index().x * 16, token = lane / 4;
    float sum[4] = {};
#pragma unroll 2
    for (int chunk = warp * kInt4Chunk; chunk < call.inputs; chunk += kWarps * kInt4Chunk) {
        const int k = chunk + lane % 4 * kInt4Lane;
        Weights<T> weights;
        weights.load(call, first_output, k);
        const T* x = static_cast<const T*>(call.x) + static_cast<int64_t>(token) * call.inputs + k;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            Words eight{};
            if (token < call.rows && k < call.inputs) eight = *reinterpret_cast<const Words*>(x + 8 * j);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t a[4], b[2];
                weights.factor(a, j, h);
                right_factor(b, eight, h);
                multiply_add<T>(sum, a, b);
            }
        }
    }
    float* parts = reinterpret_cast<float*>(shared_memory());  // [kWarps, 16, 8]
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        parts[(warp * 16 + lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
    }
    sync_block();
    const int output = first_output + thread % 16, row = thread / 16;
    if (output >= call.outputs || row >= call.rows) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += parts[(w * 16 + thread % 16) * 8 + row];
    from_float(total, static_cast<T*>(call.y)[static_cast<int64_t>(row) * call.outputs + output]);
}

/* Starts copying 64 rows of x, 128 k of each. Of each 4 times 4 pieces of 16 bytes the first of each 4 come first, as 4
 * neighbouring lanes read them. */
template <class T>
LORA_DROP_BODY void load_tokens(const LoraDropInt4Gemm& call, char* to, int first_token, int chunk) {
    for (int i = thread_index(); i < kTokens * 16; i += kThreads) {
        const int token = i / 16, piece = i % 16, k = chunk + piece * 8;
        char* place = to + token * kTokenStride + (piece % 4 * 4 + piece / 4) * 16;
        if (first_token + token < call.rows && k < call.inputs) {
            const int64_t at = static_cast<int64_t>(first_token + token) * call.inputs + k;
            copy_async(place, static_cast<const T*>(call.x) + at);
        } else {
            *reinterpret_cast<Words*>(place) = Words{};
        }
    }
}

/* Body for more rows of x. Block (128 outputs, 64 rows of x). Shared: two tiles of x. */
template <class T>
LORA_DROP_BODY void int4_gemm(const LoraDropInt4Gemm& call) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int first_output = (block_index().x * kWarps + warp) * kWarpOutputs, first_token = block_index().y * kTokens;
    char* const tiles = shared_memory();
    float sum[kWarpOutputs / 16][kTokens / 8][4] = {};
    load_tokens<T>(call, tiles, first_token, 0);
    copy_commit();
#pragma unroll 1
    for (int chunk = 0, turn = 0; chunk < call.inputs; chunk += kInt4Chunk, turn ^= 1) {
        Weights<T> weights[kWarpOutputs / 16];
#pragma unroll
        for (int i = 0; i < kWarpOutputs / 16; ++i) {
            weights[i].load(call, first_output + 16 * i, chunk + lane % 4 * kInt4Lane);
        }
        load_tokens<T>(call, tiles + (turn ^ 1) * kTokenTileBytes, first_token, chunk + kInt4Chunk);
        copy_commit();
        copy_wait<1>();
        sync_block();
        const char* x = tiles + turn * kTokenTileBytes + lane / 4 * kTokenStride + lane % 4 * 16;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t a[kWarpOutputs / 16][4];
#pragma unroll
                for (int i = 0; i < kWarpOutputs / 16; ++i) weights[i].factor(a[i], j, h);
#pragma unroll
                for (int t = 0; t < kTokens / 8; ++t) {
                    const Words eight = *reinterpret_cast<const Words*>(x + 8 * t * kTokenStride + j * 64);
                    uint32_t b[2];
                    right_factor(b, eight, h);
#pragma unroll
                    for (int i = 0; i < kWarpOutputs / 16; ++i) multiply_add<T>(sum[i][t], a[i], b);
                }
            }
        }
        sync_block();
    }
#pragma unroll
    for (int i = 0; i < kWarpOutputs / 16; ++i) {
#pragma unroll
        for (int t = 0; t < kTokens / 8; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int output = first_output + 16 * i + lane / 4 + e / 2 * 8;
                const int64_t row = first_token + 8 * t + lane % 4 * 2 + e % 2;
                if (output >= call.outputs || row >= call.rows) continue;
                from_float(sum[i][t][e], static_cast<T*>(call.y)[row * call.outputs + output]);
            }
        }
    }
}

/* A launcher has gemv<T> and gemm<T>: (call, grid, shared_bytes) -> error, 0 if none. */
template <class T, class Launcher>
int launch_int4_gemm(const LoraDropInt4Gemm& call, const Launcher& launcher) {
    if (call.rows <= kFewRows) {
        const size_t bytes = static_cast<size_t>(kWarps) * 16 * 8 * sizeof(float);
        return launcher.template gemv<T>(call, {(call.outputs + 15) / 16, 1, 1}, bytes);
    }
    constexpr int kOutputs = kWarps * kWarpOutputs;
    const Index grid{(call.outputs + kOutputs - 1) / kOutputs, (call.rows + kTokens - 1) / kTokens, 1};
    return launcher.template gemm<T>(call, grid, 2 * kTokenTileBytes);
}

}  // namespace lora_drop

#endif
