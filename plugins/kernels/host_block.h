/* One thread block on the CPU: block.h for a plain C++17 compiler. For tests, not for speed.
 *
 * Each thread is a fiber. A fiber runs until a barrier or a shuffle, and goes on once all threads that take part have
 * arrived, so a block runs the very source that a GPU runs, on real memory. An order picks the interleaving:
 *
 *     0     first warp and thread first: they run ahead until a barrier holds them; copies land at the last moment
 *     −1    last warp and thread first; copies land at once
 *     n > 0 shuffled by a generator seeded with n, copies too
 *
 * A forgotten barrier thus shows as a different result under some order. Shared memory starts as NaN, a copy that
 * nobody waited for never lands under order 0, and a barrier or shuffle that not all threads reach ends the
 * process.
 */
#ifndef LORA_DROP_HOST_BLOCK_H
#define LORA_DROP_HOST_BLOCK_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <vector>

#define LORA_DROP_BODY inline

namespace lora_drop {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float8 {
    uint8_t bits;
};

inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* A float with `mantissa` stored mantissa bits and exponents from 1 − bias, as its bits without the sign; ties to
 * even. */
inline uint32_t round_to_small_float(float x, int mantissa, int bias) {
    const uint32_t bits = float_bits(x) & 0x7fffffff, dropped = 23 - static_cast<uint32_t>(mantissa);
    const uint32_t least = static_cast<uint32_t>(128 - bias) << 23;  // of the numbers that are not subnormal
    // A carry out of the mantissa moves into the exponent by itself
    if (bits >= least) {
        return ((bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1)) >> dropped) - ((127u - bias) << mantissa);
    }
    const float units = static_cast<float>(1u << (mantissa + bias - 1));
    return static_cast<uint32_t>(std::nearbyint(std::fabs(x) * units));
}

inline float small_float_value(uint32_t magnitude, int mantissa, int bias) {
    if (magnitude >> mantissa == 0) {
        return static_cast<float>(magnitude) / static_cast<float>(1u << (mantissa + bias - 1));
    }
    const uint32_t bits = (magnitude << (23 - mantissa)) + ((127u - bias) << 23);
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}
inline float to_float(Half x) {
    const uint32_t magnitude = x.bits & 0x7fff, bits = magnitude << 13;
    float y;
    memcpy(&y, &bits, sizeof y);
    y = magnitude > 0x7c00 ? NAN : magnitude == 0x7c00 ? INFINITY : y * 0x1p112f;  // the biases differ by 112
    return x.bits & 0x8000 ? -y : y;
}
inline float to_float(Float8 x) {
    const uint32_t magnitude = x.bits & 0x7f;
    const float y = magnitude == 0x7f ? NAN : small_float_value(magnitude, 3, 7);
    return x.bits & 0x80 ? -y : y;
}

inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, int8_t& y) {
    y = static_cast<int8_t>(std::nearbyint(std::fmin(std::fmax(x, -128.0f), 127.0f)));
}
inline void from_float(float x, BFloat16& y) {
    const uint32_t bits = float_bits(x);
    y.bits = static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half& y) {
    const uint32_t magnitude = std::isnan(x)                ? 0x7fff
                               : std::fabs(x) >= 65520.0f ? 0x7c00
                                                          : round_to_small_float(x, 10, 15);
    y.bits = static_cast<uint16_t>(magnitude | (float_bits(x) >> 31 << 15));
}
inline void from_float(float x, Float8& y) {
    const uint32_t magnitude = std::isnan(x) ? 0x7f : std::fabs(x) >= 448.0f ? 0x7e : round_to_small_float(x, 3, 7);
    y.bits = static_cast<uint8_t>(magnitude | (float_bits(x) >> 31 << 7));
}

class HostBlock {
public:
    static HostBlock& get() {
        static HostBlock block;
        return block;
    }

    /* Runs one block to its end. Not reentrant, and for one caller at a time. */
    void run(Index block, size_t shared_bytes, const std::function<void()>& body) {
        block_ = block;
        body_ = &body;
        copied_bytes = 0;
        shared_.reset(new (std::align_val_t(256)) char[shared_bytes]);
        memset(shared_.get(), 0xff, shared_bytes);
        random_.seed(static_cast<unsigned>(order));
        for (int i = 0; i < kThreads; ++i) {
            fibers_[i].shows = 0;
            fibers_[i].copies.clear();
            fibers_[i].groups.clear();
        }
        for (int warp = 0; warp < kWarps; ++warp) {
            ready_[warp] = live_[warp] = ~0u;
            at_warp_[warp] = at_block_[warp] = 0;
        }
        for (;;) {
            const int warp = next_warp();
            if (warp >= 0) {
                resume(warp * kWarp + next_lane(ready_[warp]));
                if (at_warp_[warp] == ~0u) {
                    ready_[warp] = at_warp_[warp];
                    at_warp_[warp] = 0;
                }
            } else if (!release_block()) {
                return;
            }
        }
    }

    int thread() const { return current_; }
    Index block() const { return block_; }
    char* shared() const { return shared_.get(); }

    void meet_warp() { wait(at_warp_); }
    void meet_block() { wait(at_block_); }

    /* What a lane shows the others of its warp. */
    struct Shown {
        uint32_t word[6];
    };

    /* Shows it to the warp; returns what all lanes showed, [kWarp]. */
    const Shown* show(const Shown& mine) {
        // Two slots in turn: a thread that runs ahead writes its next value where nobody reads the last one
        const int slot = fibers_[current_].shows++ % 2;
        shown_[slot][current_] = mine;
        meet_warp();
        return shown_[slot] + current_ / kWarp * kWarp;
    }

    void copy(void* to, const void* from) {
        copied_bytes += kCopyBytes;
        const bool at_once = order < 0 || (order > 0 && random_() % 2 == 0);
        if (at_once) {
            memcpy(to, from, kCopyBytes);
        } else {
            fibers_[current_].copies.push_back({to, from});
        }
    }

    void commit() {
        Fiber& fiber = fibers_[current_];
        fiber.groups.push_back(fiber.copies.size());
    }

    void land_all_but(size_t latest) {
        Fiber& fiber = fibers_[current_];
        if (fiber.groups.size() <= latest) return;
        const size_t landing = fiber.groups[fiber.groups.size() - latest - 1];
        for (size_t i = 0; i < landing; ++i) {
            memcpy(fiber.copies[i].to, fiber.copies[i].from, kCopyBytes);
        }
        fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(landing));
        fiber.groups.erase(fiber.groups.begin(), fiber.groups.end() - static_cast<ptrdiff_t>(latest));
        for (size_t& end : fiber.groups) end -= landing;
    }

    [[noreturn]] static void fail(const char* what) {
        fprintf(stderr, "host block: %s\n", what);
        abort();
    }

    int order = 0;
    size_t copied_bytes = 0;  // asynchronously, by all threads of the latest block

private:
    static constexpr size_t kStackBytes = 64 * 1024;
    static constexpr size_t kCopyBytes = 16;
    struct Copy {
        void* to;
        const void* from;
    };
    struct Fiber {
        bool started = false;
        unsigned shows;
        std::vector<Copy> copies;
        std::vector<size_t> groups;  // where each committed group ends in copies
        ucontext_t context;
        jmp_buf place;
        std::unique_ptr<char[]> stack{new char[kStackBytes]};
    };
    struct Free {
        void operator()(char* p) const { operator delete[](p, std::align_val_t(256)); }
    };

    // swapcontext would make a system call at each switch; jumping between live contexts does not
    __attribute__((noinline)) void resume(int thread) {
        current_ = thread;
        ready_[thread / kWarp] &= ~(1u << thread % kWarp);
        Fiber& fiber = fibers_[thread];
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        setcontext(&fiber.context);
    }

    static void enter() {
        HostBlock& block = get();
        for (;;) {  // each round is another block's: to start a fiber takes system calls
            (*block.body_)();
            block.live_[block.current_ / kWarp] &= ~(1u << block.current_ % kWarp);
            if (_setjmp(block.fibers_[block.current_].place) == 0) _longjmp(block.scheduler_, 1);
        }
    }

    __attribute__((noinline)) void wait(uint32_t* arrived) {
        arrived[current_ / kWarp] |= 1u << current_ % kWarp;
        if (_setjmp(fibers_[current_].place) == 0) _longjmp(scheduler_, 1);
    }

    /* Lets all threads pass the block's barrier; false when none is left. */
    bool release_block() {
        bool any = false;
        for (int warp = 0; warp < kWarps; ++warp) any |= live_[warp] != 0;
        if (!any) return false;
        for (int warp = 0; warp < kWarps; ++warp) {
            if (at_block_[warp] != ~0u) fail("a barrier or shuffle that not all threads reach");
            ready_[warp] = at_block_[warp];
            at_block_[warp] = 0;
        }
        return true;
    }

    int next_warp() {
        const int first = order > 0 ? static_cast<int>(random_() % kWarps) : 0;
        for (int i = 0; i < kWarps; ++i) {
            const int warp = order < 0 ? kWarps - 1 - i : (first + i) % kWarps;
            if (ready_[warp] != 0) return warp;
        }
        return -1;
    }

    int next_lane(uint32_t ready) {
        if (order < 0) return 31 - __builtin_clz(ready);
        if (order == 0) return __builtin_ctz(ready);
        const unsigned start = random_() % kWarp;
        const uint32_t from = ready >> start;
        return from != 0 ? static_cast<int>(start) + __builtin_ctz(from) : __builtin_ctz(ready);
    }

    Index block_{};
    const std::function<void()>* body_ = nullptr;
    std::unique_ptr<char[], Free> shared_;
    std::minstd_rand random_;
    Fiber fibers_[kThreads];
    Shown shown_[2][kThreads];
    uint32_t ready_[kWarps], live_[kWarps], at_warp_[kWarps], at_block_[kWarps];
    int current_ = 0;
    jmp_buf scheduler_;
};

/* The blocks of a grid. Their order follows the order of threads: no block may depend on another either. */
inline int run_on_host(Index grid, size_t shared_bytes, const std::function<void()>& body) {
    const bool last_first = HostBlock::get().order < 0;
    const int blocks = grid.x * grid.y * grid.z;
    for (int i = 0; i < blocks; ++i) {
        const int at = last_first ? blocks - 1 - i : i;
        HostBlock::get().run({at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y}, shared_bytes, body);
    }
    return 0;
}

using std::max;
using std::min;

inline int thread_index() { return HostBlock::get().thread(); }
inline Index block_index() { return HostBlock::get().block(); }
inline void sync_block() { HostBlock::get().meet_block(); }
inline void sync_warp() { HostBlock::get().meet_warp(); }
inline float shuffle_xor(float x, int mask) {
    const uint32_t bits = HostBlock::get().show({{float_bits(x)}})[thread_index() % kWarp ^ mask].word[0];
    float other;
    memcpy(&other, &bits, sizeof other);
    return other;
}
inline int shuffle(int x, int lane) {
    return static_cast<int>(HostBlock::get().show({{static_cast<uint32_t>(x)}})[lane].word[0]);
}
inline void next_kernel_may_start() {}   // one kernel runs after the other
inline void wait_for_kernel_before() {}
inline char* shared_memory() { return HostBlock::get().shared(); }

inline void copy_async(void* shared, const void* global) { HostBlock::get().copy(shared, global); }
inline void copy_commit() { HostBlock::get().commit(); }
template <int kGroups>
void copy_wait() {
    HostBlock::get().land_all_but(kGroups);
}

/* Row r of the matrix m that ldmatrix was pointed to. */
inline const uint16_t* matrix_row(const HostBlock::Shown* shown, int m, int r) {
    const HostBlock::Shown& lane = shown[8 * m + r];
    const uint64_t address = lane.word[0] | static_cast<uint64_t>(lane.word[1]) << 32;
    return reinterpret_cast<const uint16_t*>(address);
}

inline const HostBlock::Shown* show_row(const void* row) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    if (address % 16 != 0) HostBlock::fail("ldmatrix: a row that is not aligned to 16 bytes");
    return HostBlock::get().show({{static_cast<uint32_t>(address), static_cast<uint32_t>(uint64_t{address} >> 32)}});
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const HostBlock::Shown* shown = show_row(row);
    const int lane = thread_index() % kWarp;
    for (int m = 0; m < 4; ++m) memcpy(&to[m], matrix_row(shown, m, lane / 4) + lane % 4 * 2, sizeof to[m]);
}

inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    const HostBlock::Shown* shown = show_row(row);
    const int lane = thread_index() % kWarp;
    for (int m = 0; m < 4; ++m) {
        to[m] = matrix_row(shown, m, lane % 4 * 2)[lane / 4] |
                static_cast<uint32_t>(matrix_row(shown, m, lane % 4 * 2 + 1)[lane / 4]) << 16;
    }
}

template <class T>
uint32_t pack(float low, float high) {
    T a, b;
    from_float(low, a);
    from_float(high, b);
    return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

template <class T>
float element(uint32_t pair, int i) {
    return to_float(T{static_cast<uint16_t>(pair >> 16 * i)});
}

template <class T>
uint32_t unpack_uint4(uint32_t nibbles, int i, T scale, T zero) {
    const auto value = [&](int at) {
        return (static_cast<float>(nibbles >> 4 * at & 15) - to_float(zero)) * to_float(scale);
    };
    return pack<T>(value(i), value(i + 4));
}

/* PTX ISA, «Matrix Fragments for mma.m16n8k16 with floating point type»: a lane's registers by row and column. */
template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
    const HostBlock::Shown* shown = HostBlock::get().show({{a[0], a[1], a[2], a[3], b[0], b[1]}});
    const int lane = thread_index() % kWarp;
    float rows[2][16], columns[2][16];
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 16; ++k) {
            rows[i][k] = element<T>(shown[lane / 4 * 4 + k % 8 / 2].word[i + k / 8 * 2], k % 2);
            columns[i][k] = element<T>(shown[(lane % 4 * 2 + i) * 4 + k % 8 / 2].word[4 + k / 8], k % 2);
        }
    }
    for (int e = 0; e < 4; ++e) {  // row lane / 4 + e / 2 * 8, column lane % 4 * 2 + e % 2
        for (int k = 0; k < 16; ++k) sum[e] += rows[e / 2][k] * columns[e % 2][k];
    }
}

}  // namespace lora_drop

/* 0, −1 or a seed; see above. */
extern "C" __attribute__((used)) inline void lora_drop_host_order(int order) {
    lora_drop::HostBlock::get().order = order;
}

#endif
