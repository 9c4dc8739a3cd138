/* engines/trt/choose.cu on the CPU, for tests: one row after another. Built by a plain C++17 compiler. */
// Its longjmp refuses to jump between stacks, which is how the fibers of host_block.h switch
#undef _FORTIFY_SOURCE

#include "choose.cu"

extern "C" void choose_tokens(const lora_drop::Choice* call, int order) {
    lora_drop::HostBlock& block = lora_drop::HostBlock::get();
    block.order = order;
    for (int row = 0; row < call->rows; ++row) {
        block.run({row, 0, 0}, sizeof(lora_drop::Shared), [&] { lora_drop::choose(*call); });
    }
}

extern "C" unsigned long choose_struct_bytes() { return sizeof(lora_drop::Choice); }
