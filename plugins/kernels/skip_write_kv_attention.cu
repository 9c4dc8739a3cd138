/* The C interface on CUDA. */
#include <cuda_runtime_api.h>

#include <atomic>

#include "launch.cuh"

namespace lora_drop {
namespace {

template <class T, class KV>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    append<T, KV>(call, plan);
}

template <class Tile>
__global__ void __launch_bounds__(kThreads, max_resident(Tile::kPath))
    attend_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    attend<Tile>(call, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    combine<T>(call, plan);
}

/* Lets a kernel have as much shared memory as a plan may ask for: once per device, for all sizes. Not a stream
 * operation: allowed while a graph is captured. */
cudaError_t allow_shared_memory(const void* kernel, std::atomic<uint64_t>& allowed, int device) {
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && (allowed.load() & bit) != 0) return cudaSuccess;
    constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, kAttribute, kMaxSharedBytes);
    if (error == cudaSuccess) allowed.fetch_or(bit);
    return error;
}

/* Whether the kernels that run on a device wait for the one before by themselves: those compiled for 9.0 and later do.
 * Code for an older architecture runs on newer devices too, compiled there, and does not. */
bool kernels_wait(int device) {
    static std::atomic<uint64_t> known{0}, waiting{0};
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && (known.load() & bit) != 0) return (waiting.load() & bit) != 0;
    cudaFuncAttributes attributes{};
    const auto kernel = reinterpret_cast<const void*>(combine_kernel<float>);
    const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    const bool wait = found && attributes.ptxVersion >= 90;
    if (wait) waiting.fetch_or(bit);
    if (found) known.fetch_or(bit);
    return wait;
}

struct CudaLauncher {
    cudaStream_t stream;
    int device = 0;
    bool overlaps = false;  // a kernel may be launched before the one that it waits for has ended

    explicit CudaLauncher(cudaStream_t stream) : stream(stream) {
        cudaGetDevice(&device);
        overlaps = kernels_wait(device);
    }

    template <class Tile>
    int resident(size_t bytes) const {
        static std::atomic<uint64_t> allowed{0};
        const auto kernel = reinterpret_cast<const void*>(attend_kernel<Tile>);
        int blocks = 0;
        // An error is not lost: the launch meets it again
        if (allow_shared_memory(kernel, allowed, device) != cudaSuccess) return 1;
        if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes) != cudaSuccess) return 1;
        return blocks;
    }
    template <class T, class KV>
    int append(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(append_kernel<T, KV>, call, plan, grid, bytes, false);
    }
    template <class Tile>
    int attend(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(attend_kernel<Tile>, call, plan, grid, bytes, !plan.fused);
    }
    template <class T>
    int combine(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(combine_kernel<T>, call, plan, grid, bytes, true);
    }

private:
    using Kernel = void (*)(LoraDropAttention, Plan);

    /* follows: the kernel before is of this call too, and this one waits for it by itself. */
    int run(Kernel kernel, const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes,
            bool follows) const {
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(grid.x, grid.y, grid.z);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = bytes;
        config.stream = stream;
        config.attrs = &overlap;
        config.numAttrs = follows && overlaps ? 1 : 0;
        void* arguments[] = {const_cast<LoraDropAttention*>(&call), const_cast<Plan*>(&plan)};
        return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
    }
};

}  // namespace
}  // namespace lora_drop

const char* lora_drop_attention_problem(const LoraDropAttention* call) { return lora_drop::problem(*call); }

size_t lora_drop_workspace_bytes(const LoraDropAttention* call, int32_t multiprocessors) {
    return lora_drop::largest_plan_of(*call, multiprocessors).workspace_bytes;
}

int lora_drop_attention(const LoraDropAttention* call, size_t workspace_bytes, int32_t multiprocessors, void* stream) {
    return lora_drop::launch(*call, workspace_bytes, multiprocessors,
                             lora_drop::CudaLauncher(static_cast<cudaStream_t>(stream)));
}
