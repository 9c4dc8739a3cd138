/* The C interface of products with int4 weights on the CPU, for tests; as skip_write_kv_attention_host.cpp is of
 * attention.
 */
// Its longjmp refuses to jump between stacks, which is how the fibers of host_block.h switch
#undef _FORTIFY_SOURCE

#include "int4_gemm.cuh"

namespace lora_drop {
namespace {

struct HostGemmLauncher {
    template <class T>
    int gemv(const LoraDropInt4Gemm& call, Index grid, size_t bytes) const {
        return run_on_host(grid, bytes, [&] { int4_gemv<T>(call); });
    }
    template <class T>
    int gemm(const LoraDropInt4Gemm& call, Index grid, size_t bytes) const {
        return run_on_host(grid, bytes, [&] { int4_gemm<T>(call); });
    }
};

}  // namespace
}  // namespace lora_drop

const char* lora_drop_int4_gemm_problem(const LoraDropInt4Gemm* call) { return lora_drop::problem(*call); }

int lora_drop_int4_gemm(const LoraDropInt4Gemm* call, void*) {
    using namespace lora_drop;
    return call->dtype == LORA_DROP_F16 ? launch_int4_gemm<Half>(*call, HostGemmLauncher{})
                                        : launch_int4_gemm<BFloat16>(*call, HostGemmLauncher{});
}
