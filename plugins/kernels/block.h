/* What one thread of a block may use: its place, barriers, shuffles, shared memory, asynchronous copies, tensor cores,
 * number types.
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

LORA_DROP_BODY int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

/* Lets the next kernel of the stream be launched, which waits before it reads what this one writes. */
LORA_DROP_BODY void next_kernel_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Until the kernel before has ended and all that it wrote is seen. */
LORA_DROP_BODY void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

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

/* Four 8 × 8 matrices of 16-bit elements, from rows of 16 bytes in shared memory: lane 8 · m + r points to row r of
 * matrix m. Of each, lane l gets row l / 4, columns 2 · (l % 4) and the next. */
LORA_DROP_BODY void load_matrices(uint32_t (&to)[4], const void* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

/* The same of the transposed matrices. */
LORA_DROP_BODY void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

/* Two numbers in 16 bits each, the first in the lower half. */
template <class T>
LORA_DROP_BODY uint32_t pack(float low, float high) {
    union {
        T element[2];
        uint32_t bits;
    } pair{};
    from_float(low, pair.element[0]);
    from_float(high, pair.element[1]);
    return pair.bits;
}

/* Of eight nibbles those i and i + 4, less a zero point, times a scale, rounded to T, as a pair. */
template <class T>
LORA_DROP_BODY uint32_t unpack_uint4(uint32_t nibbles, int i, T scale, T zero);

template <>
LORA_DROP_BODY uint32_t unpack_uint4<Half>(uint32_t nibbles, int i, Half scale, Half zero) {
    // A nibble in the last bits of 1024 adds itself
    union {
        uint32_t bits;
        __half2 pair;
    } x{((nibbles >> 4 * i) & 0x000f000fu) ^ 0x64006400u};
    x.pair = __hmul2(__hsub2(x.pair, __hadd2(__float2half2_rn(1024.0f), __half2half2(zero))), __half2half2(scale));
    return x.bits;
}

template <>
LORA_DROP_BODY uint32_t unpack_uint4<BFloat16>(uint32_t nibbles, int i, BFloat16 scale, BFloat16 zero) {
    union {
        uint32_t bits;
        __nv_bfloat162 pair;
    } x{((nibbles >> 4 * i) & 0x000f000fu) ^ 0x43004300u};  // 128
    x.pair = __hmul2(__hsub2(x.pair, __hadd2(__float2bfloat162_rn(128.0f), __bfloat162bfloat162(zero))), __bfloat162bfloat162(scale));
    return x.bits;
}

/* sum [16, 8] += a [16, 16] · b [16, 8] by a warp, in the layouts of mma.sync.m16n8k16. b: 2 registers. */
template <class T>
LORA_DROP_BODY void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b);

template <>
LORA_DROP_BODY void multiply_add<Half>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
LORA_DROP_BODY void multiply_add<BFloat16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lora_drop

#endif
#endif
