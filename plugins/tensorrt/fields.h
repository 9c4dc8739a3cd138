/* The plugin's fields: read from TensorRT's collection, checked once, written back for a serialized engine.
 *
 * An ONNX node has them as attributes of the same names; all are required except has_sinks and alias:
 *
 *     heads N, kv_heads G, head_dim D, rotary_dim R, interleaved, window          int32
 *     has_count, has_norm, has_kv_scale                                           int32, 0 or 1
 *     has_sinks                                                                   int32, 0 or 1 (default 0)
 *     scale, softcap, norm_epsilon                                                float32
 *     alias                                                                       int32, 0 or 1 (default 1)
 *     multiprocessors    int32, only in serialized plugins: the SMs that the workspace was planned for
 *
 * Enters: a PluginFieldCollection, of the ONNX parser or of a serialized engine. Leave: Fields, which need no further
 * check, and PluginFields. Nothing here knows tensors, the kernel's own limits or the device.
 */
#ifndef LORA_DROP_PLUGIN_FIELDS_H
#define LORA_DROP_PLUGIN_FIELDS_H

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lora_drop {

struct Fields {
    int32_t heads{};
    int32_t kv_heads{};
    int32_t head_dim{};
    int32_t rotary_dim{};
    int32_t interleaved{};
    int32_t window{};
    int32_t has_count{};
    int32_t has_norm{};
    int32_t has_kv_scale{};
    int32_t has_sinks{};
    float scale{};
    float softcap{};
    float norm_epsilon{};
    int32_t alias{1};
    int32_t multiprocessors{0}; // 0: ask the device
};

/// Throws std::invalid_argument for a field that is missing, unknown, given twice, of another type or of another value.
Fields parseFields(nvinfer1::PluginFieldCollection const* collection);

/// All fields, as `name=value`.
std::string describe(Fields const& fields);

/// All fields for a serialized engine. They point into `fields`, which must outlive them where it is.
std::vector<nvinfer1::PluginField> serializedFields(Fields const& fields);

/// Names and types for the ONNX parser, without values.
std::vector<nvinfer1::PluginField> advertisedFields();

} // namespace lora_drop
#endif
