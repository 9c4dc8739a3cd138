/* Products with int4 weights: the C interface of the kernel. Raw pointers and a stream; no framework header.
 *
 *     y[m, n] = Σ over k of x[m, k] · w[n, k],    w[n, k] = (q[n, k] − zero[n, k / block]) · scale[n, k / block],
 *                                                 rounded to dtype
 *
 * That is what DequantizeLinear and MatMul compute, without weights of 16 bits in memory: q is read once for 8 rows of
 * x, or once for 64. Sums are float32, and rounded once. Both paths run on tensor cores.
 *
 * Shapes (M rows, K inputs, N outputs):
 *
 *     x            [M, K]                dtype
 *     weights      [N, K / 2]            bytes: nibbles q, 0 … 15, even k in the lower one (ONNX UINT4)
 *     scales       [N, K / block]        dtype
 *     zero_points  [N, K / block / 2]    bytes: nibbles as of weights; null where all are 8 (symmetric blocks)
 *     y            [M, N]                dtype
 *
 * All tensors are dense and row-major; pointers are aligned to 16 bytes.
 */
#ifndef LORA_DROP_INT4_GEMM_H
#define LORA_DROP_INT4_GEMM_H

#include <stdint.h>

#include "skip_write_kv_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t rows;    /* M */
    int32_t inputs;  /* K, a multiple of block and of 32 */
    int32_t outputs; /* N */
    int32_t block;   /* 16, 32, 64 or 128 weights that share a scale */
    int32_t dtype;   /* LoraDropDtype: F16, BF16 */
    const void* x;
    const void* weights;
    const void* scales;
    const void* zero_points;
    void* y;
} LoraDropInt4Gemm;

/* Why a call would be refused, as a static string; null when it is fine. Reads no memory behind a pointer. */
const char* lora_drop_int4_gemm_problem(const LoraDropInt4Gemm* call);

/* Enqueue on a CUDA stream (cudaStream_t); returns a cudaError_t. The call must have no problem (above). */
int lora_drop_int4_gemm(const LoraDropInt4Gemm* call, void* stream);

#ifdef __cplusplus
}
#endif
#endif
