/* The checker of types, formats and shapes: one for the builder, a change of shapes and each call.
 *
 * Enter: Fields; descriptors by what they describe (tensors.h has the table that they must fit). Leave: the sizes of a
 * call, or a refusal. Nothing here knows pointers, the kernel's own limits or where a tensor stands.
 */
#ifndef LORA_DROP_PLUGIN_TYPES_AND_SHAPES_H
#define LORA_DROP_PLUGIN_TYPES_AND_SHAPES_H

#include <NvInferRuntime.h>

#include <cstdint>

#include "fields.h"
#include "tensors.h"

namespace lora_drop {

/// What the tensors of a call decide; the fields decide the rest.
struct Sizes {
    int32_t batch;
    int32_t new_tokens;
    int32_t slots;
    nvinfer1::DataType type;       // T
    nvinfer1::DataType cache_type; // K
};

char const* typeName(nvinfer1::DataType type);

/// Whether `type` is possible for a tensor, given the types of query (T) and past_key (K), which come before it.
bool typeFits(Tensor tensor, nvinfer1::DataType type, nvinfer1::DataType query, nvinfer1::DataType past_key,
              Fields const& fields);

/// Throws std::invalid_argument for another type, format or shape than the table's. `may_be_dynamic`: −1 fits any size;
/// a size that is unknown everywhere stays −1.
Sizes checkedSizes(Descs const& descs, Fields const& fields, bool may_be_dynamic);

/// `sizes` with those of a profile's largest call. Throws std::invalid_argument when one is not positive.
Sizes largestSizes(Sizes sizes, nvinfer1::DynamicPluginTensorDesc const& query,
                   nvinfer1::DynamicPluginTensorDesc const& past_key);

} // namespace lora_drop
#endif
