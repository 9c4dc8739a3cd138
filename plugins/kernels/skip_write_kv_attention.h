/* Skip-write KV attention: the C interface of the kernel. Raw pointers and a stream; no framework header.
 *
 * For each row b of a batch, in one call:
 *
 *     1. optional RMS norm of each query and key head (Qwen3):  x / sqrt(mean(x²) + epsilon) · weight
 *     2. optional RoPE of query and key with the tables of each token (the caller made them for its true position)
 *     3. keys and values of the row's first count[b] new tokens are appended to the cache, at slots
 *        length[b] … length[b] + count[b] − 1; nothing else in the cache is written
 *     4. attention of the row's new tokens over the valid slots: token s sees slot c iff c <= length[b] + s,
 *        and within a window W iff also c > length[b] + s − W. The cost follows the valid length, never the capacity,
 *        and no slot past it is read. A sink is one score more in a head's softmax, without a value.
 *
 * Norm, RoPE and attention are computed in float32, and a key is rounded once, after RoPE, to kv_dtype. In float16 and
 * bfloat16 the products run on tensor cores where a call has more than one new token or 8 and more query heads for each
 * key/value head: there the query is rounded to dtype after RoPE and the weights before they meet the values; sums stay
 * float32. Elsewhere the query stays float32 throughout. Which blocks sum what depends on the lengths of all rows, so
 * that all of them are busy for the same time: a row's last bit may differ with its neighbours.
 *
 * A quantized cache stores x / scale, to nearest with ties to even, saturating (±448; −128 … 127). New tokens attend to
 * one another as stored, however many there are, so what a token sees does not depend on how it was fed.
 *
 * Slot ≠ position: a cache with holes is compact, so a slot counts what was written and not where it stood.
 * Values of length and count out of their ranges are clamped to them, so that no content leads out of a buffer.
 * count[b] = 0 leaves the row's cache untouched. Outputs of tokens at or past count[b] are zeros.
 *
 * Shapes (S new tokens, N query heads, G key/value heads, D head_dim, C slots of capacity, R rotary_dim):
 *
 *     query            [B, S, N·D]     dtype
 *     key, value       [B, S, G·D]     dtype
 *     cos, sin         [B, S, R/2]     dtype     one table row per token; null without RoPE
 *     q_norm, k_norm   [D]             dtype     null without norm (both or neither)
 *     length           [B]             int64     valid slots before the call; length[b] + count[b] <= C
 *     count            [B]             int64     tokens to append, 0 … S; null means S in every row
 *     k_scale, v_scale [G]             float32   of a quantized cache: value = stored · scale; else null
 *     sinks            [N]             float32   a score of each head; null without
 *     key_cache        [B, G, C, D]    kv_dtype  updated in place
 *     value_cache      [B, G, C, D]    kv_dtype  updated in place
 *     output           [B, S, N·D]     dtype
 *
 * All tensors are dense and row-major; pointers are aligned to 16 bytes.
 */
#ifndef LORA_DROP_SKIP_WRITE_KV_ATTENTION_H
#define LORA_DROP_SKIP_WRITE_KV_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    LORA_DROP_F32 = 0,
    LORA_DROP_F16 = 1,
    LORA_DROP_BF16 = 2,
    LORA_DROP_F8_E4M3 = 3, /* cache only */
    LORA_DROP_I8 = 4       /* cache only */
} LoraDropDtype;

typedef struct {
    int32_t batch;       /* B */
    int32_t new_tokens;  /* S */
    int32_t heads;       /* N, a multiple of kv_heads */
    int32_t kv_heads;    /* G */
    int32_t head_dim;    /* D: a multiple of 8, of 16 with a quantized cache; at most 256 */
    int32_t slots;       /* C */
    int32_t rotary_dim;  /* R <= D, even; 0: no RoPE */
    int32_t interleaved; /* RoPE pairs (0,1), (2,3) … instead of (0,R/2), (1,R/2+1) … */
    int32_t window;      /* sliding window in tokens; 0: none */
    int32_t dtype;       /* LoraDropDtype: F32, F16, BF16 */
    int32_t kv_dtype;    /* dtype, or F8_E4M3 or I8 */
    float scale;         /* of the scores, before softcap */
    float softcap;       /* score -> softcap · tanh(score / softcap); 0: none */
    float norm_epsilon;
    const void* query;
    const void* key;
    const void* value;
    const void* cos;
    const void* sin;
    const void* q_norm;
    const void* k_norm;
    const float* k_scale;
    const float* v_scale;
    const float* sinks;
    const int64_t* length;
    const int64_t* count;
    void* key_cache;
    void* value_cache;
    void* output;
    void* workspace; /* at least lora_drop_workspace_bytes, aligned to 256 bytes, of any contents; null if 0 */
} LoraDropAttention;

/* Why a call would be refused, as a static string; null when it is fine. Reads sizes and which pointers are null,
 * never memory behind a pointer. */
const char* lora_drop_attention_problem(const LoraDropAttention* call);

/* Workspace for a call of these sizes on a device with `multiprocessors` SMs. Enough for every length and for every
 * device with so many. */
size_t lora_drop_workspace_bytes(const LoraDropAttention* call, int32_t multiprocessors);

/* Enqueue on a CUDA stream (cudaStream_t); returns a cudaError_t. Launch shapes depend on sizes alone, never on
 * lengths, so that a captured CUDA graph stays right as the lengths grow. `workspace_bytes` is what the caller gave;
 * too little, or a null workspace where one is needed, is refused. The call must have no problem (above). */
int lora_drop_attention(const LoraDropAttention* call, size_t workspace_bytes, int32_t multiprocessors, void* stream);

#ifdef __cplusplus
}
#endif
#endif
