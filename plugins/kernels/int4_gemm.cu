/* The C interface of products with int4 weights on CUDA. */
#include "int4_gemm.cuh"

#include <cuda_runtime_api.h>

namespace lora_drop {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 8) gemv_kernel(const __grid_constant__ LoraDropInt4Gemm call) {
    int4_gemv<T>(call);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(const __grid_constant__ LoraDropInt4Gemm call) {
    int4_gemm<T>(call);
}

struct CudaGemmLauncher {
    cudaStream_t stream;

    template <class T>
    int gemv(const LoraDropInt4Gemm& call, Index grid, size_t bytes) const {
        return run(gemv_kernel<T>, call, grid, bytes);
    }
    template <class T>
    int gemm(const LoraDropInt4Gemm& call, Index grid, size_t bytes) const {
        return run(gemm_kernel<T>, call, grid, bytes);
    }

private:
    int run(void (*kernel)(LoraDropInt4Gemm), const LoraDropInt4Gemm& call, Index grid, size_t bytes) const {
        static_assert(2 * kTokenTileBytes <= 48 * 1024, "more needs an attribute");
        void* arguments[] = {const_cast<LoraDropInt4Gemm*>(&call)};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(kThreads),
                                arguments, bytes, stream);
    }
};

}  // namespace
}  // namespace lora_drop

const char* lora_drop_int4_gemm_problem(const LoraDropInt4Gemm* call) { return lora_drop::problem(*call); }

int lora_drop_int4_gemm(const LoraDropInt4Gemm* call, void* stream) {
    using namespace lora_drop;
    const CudaGemmLauncher launcher{static_cast<cudaStream_t>(stream)};
    return call->dtype == LORA_DROP_F16 ? launch_int4_gemm<Half>(*call, launcher)
                                        : launch_int4_gemm<BFloat16>(*call, launcher);
}
