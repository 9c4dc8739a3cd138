/* The way to the kernel: what it is told of a call, whether it takes it, how much workspace it needs, its launch.
 *
 * Enter: Fields, the Sizes of a call, its pointers. Leave: the multiprocessors of the device, bytes of workspace, work
 * on a stream; or a refusal. Nothing here knows TensorRT's descriptors or where a tensor stands among a node's.
 */
#ifndef LORA_DROP_PLUGIN_DEVICE_H
#define LORA_DROP_PLUGIN_DEVICE_H

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../kernels/skip_write_kv_attention.h"
#include "fields.h"
#include "types_and_shapes.h"

namespace lora_drop {

constexpr int32_t kFALLBACK_MULTIPROCESSORS = 132;

/// SMs of the current device. Without a GPU or driver: the fallback, and no CUDA error left behind.
int32_t deviceMultiprocessors() noexcept;

/// A call without pointers.
LoraDropAttention callOf(Fields const& fields, Sizes const& sizes);

/// Throws std::invalid_argument for fields that the kernel refuses whatever the sizes.
void requireKernelTakes(Fields const& fields);

/// Throws std::invalid_argument when the kernel refuses the largest call of a profile.
void requireKernelTakes(Fields const& fields, Sizes const& largest);

/// The most that a call up to these sizes needs, on fields.multiprocessors.
size_t largestWorkspaceBytes(Fields const& fields, Sizes const& largest);

/// Puts a call with its pointers on a stream. Throws std::invalid_argument when the kernel or CUDA refuses it.
void launch(LoraDropAttention const& call, Fields const& fields, cudaStream_t stream);

} // namespace lora_drop
#endif
