/* The C interface on the CPU, for tests: pointers of the host, blocks one after another, the stream is ignored. Built
 * by a plain C++17 compiler. Not thread-safe.
 */
// Its longjmp refuses to jump between stacks, which is how the fibers of host_block.h switch
#undef _FORTIFY_SOURCE

#include "launch.cuh"

namespace lora_drop {
namespace {

std::vector<int64_t> copied_by_block;  // by each block of the latest attend
int resident_blocks = 9;               // more than any plan asks for

struct HostLauncher {
    template <class Tile>
    int resident(size_t) const {
        return resident_blocks;
    }
    template <class T, class KV>
    int append(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run_on_host(grid, bytes, [&] { lora_drop::append<T, KV>(call, plan); });
    }
    template <class Tile>
    int attend(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        copied_by_block.assign(static_cast<size_t>(grid.x), 0);
        return run_on_host(grid, bytes, [&] {
            lora_drop::attend<Tile>(call, plan);
            copied_by_block[static_cast<size_t>(block_index().x)] = static_cast<int64_t>(HostBlock::get().copied_bytes);
        });
    }
    template <class T>
    int combine(const LoraDropAttention& call, const Plan& plan, Index grid, size_t bytes) const {
        return run_on_host(grid, bytes, [&] { lora_drop::combine<T>(call, plan); });
    }
};

}  // namespace
}  // namespace lora_drop

const char* lora_drop_attention_problem(const LoraDropAttention* call) { return lora_drop::problem(*call); }

size_t lora_drop_workspace_bytes(const LoraDropAttention* call, int32_t multiprocessors) {
    return lora_drop::largest_plan_of(*call, multiprocessors).workspace_bytes;
}

int lora_drop_attention(const LoraDropAttention* call, size_t workspace_bytes, int32_t multiprocessors, void*) {
    return lora_drop::launch(*call, workspace_bytes, multiprocessors, lora_drop::HostLauncher{});
}

/* Bytes of the cache that each block of the latest attend read, into `bytes` [n] as far as there are blocks; how many
 * blocks there were. */
extern "C" int lora_drop_host_shares(int64_t* bytes, int n) {
    const auto& copied = lora_drop::copied_by_block;
    std::copy_n(copied.begin(), std::min<size_t>(copied.size(), static_cast<size_t>(n)), bytes);
    return static_cast<int>(copied.size());
}

/* How many blocks of `attend` a multiprocessor takes, as its occupancy would say. */
extern "C" void lora_drop_host_resident(int blocks) { lora_drop::resident_blocks = blocks; }
