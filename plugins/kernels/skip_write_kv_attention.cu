/* The C interface on CUDA. */
#include <cuda_runtime_api.h>

#include "skip_write_kv_attention.cuh"

namespace lora_drop {
namespace {

template <class T, class KV>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    append<T, KV>(call, plan);
}

template <class T, class KV, int kRows>
__global__ void __launch_bounds__(kThreads, max_resident(kRows))
    attend_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    attend<T, KV, kRows>(call, plan);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ LoraDropAttention call, const __grid_constant__ Plan plan) {
    combine<T>(call, plan);
}

struct CudaLauncher {
    cudaStream_t stream;

    template <class T, class KV>
    int append(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(append_kernel<T, KV>, call, plan, grid, bytes);
    }
    template <class T, class KV, int kRows>
    int attend(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(attend_kernel<T, KV, kRows>, call, plan, grid, bytes);
    }
    template <class T>
    int combine(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run(combine_kernel<T>, call, plan, grid, bytes);
    }

private:
    using Kernel = void (*)(LoraDropAttention, Plan);

    int run(Kernel kernel, const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        constexpr size_t kDefaultBytes = 48 * 1024;
        if (bytes > kDefaultBytes) {
            // Not a stream operation: allowed while a graph is captured
            const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                           static_cast<int>(bytes));
            if (error != cudaSuccess) return error;
        }
        void* arguments[] = {const_cast<LoraDropAttention*>(&call), const_cast<Plan*>(&plan)};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(kThreads),
                                arguments, bytes, stream);
    }
};

}  // namespace
}  // namespace lora_drop

const char* lora_drop_attention_problem(const LoraDropAttention* call) { return lora_drop::problem(*call); }

size_t lora_drop_workspace_bytes(const LoraDropAttention* call, int32_t multiprocessors) {
    return lora_drop::plan_of(*call, multiprocessors).workspace_bytes;
}

int lora_drop_attention(const LoraDropAttention* call, size_t workspace_bytes, int32_t multiprocessors, void* stream) {
    return lora_drop::launch(*call, workspace_bytes, multiprocessors,
                             lora_drop::CudaLauncher{static_cast<cudaStream_t>(stream)});
}
