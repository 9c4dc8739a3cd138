/* The tensors of a node: what each is, and where it stands.
 *
 * Inputs, in this order; an optional one takes no place when its field says that it is absent:
 *
 *     query         [B, S, N·D]    T
 *     key           [B, S, G·D]    T
 *     value         [B, S, G·D]    T
 *     past_key      [B, G, C, D]   K        written in place, is output present_key
 *     past_value    [B, G, C, D]   K        written in place, is output present_value
 *     length        [B]            int64
 *     count         [B]            int64    has_count = 1
 *     cos, sin      [B, S, R/2]    T        rotary_dim > 0
 *     q_norm        [D]            T        has_norm = 1
 *     k_norm        [D]            T        has_norm = 1
 *     k_scale       [G]            float32  has_kv_scale = 1
 *     v_scale       [G]            float32  has_kv_scale = 1
 *     sinks         [N]            float32  has_sinks = 1
 *
 * Outputs:
 *
 *     attention      [B, S, N·D]   T
 *     present_key    [B, G, C, D]  K        the memory of past_key
 *     present_value  [B, G, C, D]  K        the memory of past_value
 *
 * T is float32, float16 or bfloat16; K is T, or fp8 or int8 with has_kv_scale = 1. All formats are linear.
 *
 * Enter: Fields; TensorRT's descriptors by where they stand. Leave: positions; descriptors by what they are. That types
 * and shapes are those of this table is checked in types_and_shapes.h.
 */
#ifndef LORA_DROP_PLUGIN_TENSORS_H
#define LORA_DROP_PLUGIN_TENSORS_H

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>

#include "fields.h"

namespace lora_drop {

/// What an input is. Where it stands among a node's inputs: Positions.
enum Input : int32_t {
    kIN_QUERY,
    kIN_KEY,
    kIN_VALUE,
    kIN_PAST_KEY,
    kIN_PAST_VALUE,
    kIN_LENGTH,
    kIN_COUNT,
    kIN_COS,
    kIN_SIN,
    kIN_Q_NORM,
    kIN_K_NORM,
    kIN_K_SCALE,
    kIN_V_SCALE,
    kIN_SINKS,
    kNB_INPUTS
};

enum Output : int32_t { kOUT_ATTENTION, kOUT_PRESENT_KEY, kOUT_PRESENT_VALUE, kNB_OUTPUTS };

/// Any tensor of a node: an Input, or kNB_INPUTS + an Output.
using Tensor = int32_t;

/// Where each input stands among the inputs of a node with these fields.
class Positions {
  public:
    explicit Positions(Fields const& fields);
    int32_t operator[](Input input) const { return mPositions[input]; } // −1: absent
    int32_t nbInputs() const { return mNbInputs; }
    /// The tensor at `pos` of all inputs and outputs in a row.
    Tensor tensorAt(int32_t pos) const;
    /// Throws std::invalid_argument when a node has another number of tensors.
    void requireNumbers(int32_t nb_inputs, int32_t nb_outputs, Fields const& fields) const;

  private:
    std::array<int32_t, kNB_INPUTS> mPositions{};
    int32_t mNbInputs{0};
};

/// Descriptors by what they describe; null: absent.
using Descs = std::array<nvinfer1::PluginTensorDesc const*, kNB_INPUTS + kNB_OUTPUTS>;

inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::PluginTensorDesc const& desc) { return desc; }
inline nvinfer1::PluginTensorDesc const& plain(nvinfer1::DynamicPluginTensorDesc const& desc) { return desc.desc; }

/// Descriptors by what they describe, from as many as there are positions.
template <typename Desc>
Descs arrange(Positions const& positions, Desc const* in, Desc const* out) {
    Descs descs{};
    for (int32_t input = 0; input < kNB_INPUTS; ++input) {
        int32_t const position = positions[static_cast<Input>(input)];
        descs[input] = position < 0 ? nullptr : &plain(in[position]);
    }
    for (int32_t output = 0; output < kNB_OUTPUTS; ++output)
        descs[kNB_INPUTS + output] = &plain(out[output]);
    return descs;
}

} // namespace lora_drop
#endif
