/* What one thread of a block may use: its place, barriers, shuffles, shared memory, asynchronous copies, number types.
 *
 * The kernel bodies name only these. Under nvcc they are the device's own; a plain C++17 compiler gets the same from
 * host_block.h, where the threads of a block are fibers.
 */
#ifndef LORA_DROP_BLOCK_H
#define LORA_DROP_BLOCK_H

#include <stdint.h>

namespace lora_drop {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

struct Index {
    int x, y, z;
};

}  // namespace lora_drop

#ifndef __CUDACC__

#include "host_block.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define LORA_DROP_BODY __device__ __forceinline__

namespace lora_drop {

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Float8 = __nv_fp8_e4m3;

LORA_DROP_BODY float to_float(float x) { return x; }
LORA_DROP_BODY float to_float(Half x) { return __half2float(x); }
LORA_DROP_BODY float to_float(BFloat16 x) { return __bfloat162float(x); }
LORA_DROP_BODY float to_float(Float8 x) { return static_cast<float>(x); }
LORA_DROP_BODY float to_float(int8_t x) { return static_cast<float>(x); }

LORA_DROP_BODY void from_float(float x, float& y) { y = x; }
LORA_DROP_BODY void from_float(float x, Half& y) { y = __float2half_rn(x); }
LORA_DROP_BODY void from_float(float x, BFloat16& y) { y = __float2bfloat16_rn(x); }
LORA_DROP_BODY void from_float(float x, Float8& y) { y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
LORA_DROP_BODY void from_float(float x, int8_t& y) {
    y = static_cast<int8_t>(rintf(fminf(fmaxf(x, -128.0f), 127.0f)));
}

LORA_DROP_BODY int thread_index() { return threadIdx.x; }
LORA_DROP_BODY Index block_index() {
    return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
LORA_DROP_BODY void sync_block() { __syncthreads(); }
LORA_DROP_BODY void sync_warp() { __syncwarp(); }
LORA_DROP_BODY float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

LORA_DROP_BODY char* shared_memory() {
    extern __shared__ __align__(16) char shared[];
    return shared;
}

/* Copies 16 bytes from global to shared memory; they have landed after copy_wait of their group. */
LORA_DROP_BODY void copy_async(void* shared, const void* global) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

/* Ends a group of this thread's copies. */
LORA_DROP_BODY void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until all but this thread's latest kGroups groups have landed. Others see them after a barrier. */
template <int kGroups>
LORA_DROP_BODY void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace lora_drop

#endif
#endif
