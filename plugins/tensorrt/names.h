/* What TensorRT knows the plugins by: name, version and namespace, as ONNX nodes and serialized engines have them. */
#ifndef LORA_DROP_PLUGIN_NAMES_H
#define LORA_DROP_PLUGIN_NAMES_H

namespace lora_drop {

constexpr char const* kPLUGIN_NAME = "SkipWriteKVAttention";
constexpr char const* kGEMM_NAME = "Int4Gemm";
constexpr char const* kPLUGIN_VERSION = "1";
constexpr char const* kPLUGIN_NAMESPACE = "lora_drop";

} // namespace lora_drop
#endif
