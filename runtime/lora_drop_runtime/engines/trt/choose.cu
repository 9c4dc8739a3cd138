/* Chooses the next token of every row on the device, and moves the row on: what stands between two steps of a cycle.
 *
 * One block a row. Enters: what a step computed, `logits` float32 [rows, vocab] and `next_token` int64 [rows]. Leaves:
 * the token where the next steps read it, and the lengths before the next step. kernels.py compiles this file with
 * NVRTC for the GPU at hand; the tests compile it with a C++17 compiler, over plugins/kernels/block.h.
 *
 * The choice is that of decoding/sampling.py: repetition penalty, temperature, top-k with the ties of its last token,
 * top-p, and the place of a number in [0, 1) that the host drew, along the probabilities laid side by side: by token
 * id, or with top-p from the likeliest on. So a seed means the same tokens as on the host, but where rounding of expf
 * moves the border of two tokens over that number.
 *
 * Weights are integers in units of 2^-40 of the largest, so that their sums do not depend on the order of threads. What
 * weighs less than a unit is never drawn.
 */
#ifdef __CUDACC__

namespace lora_drop {

constexpr int kThreads = LORA_DROP_THREADS;
#define LORA_DROP_BODY __device__ __forceinline__

LORA_DROP_BODY int thread_index() { return threadIdx.x; }
LORA_DROP_BODY int row_index() { return blockIdx.x; }
LORA_DROP_BODY void sync_block() { __syncthreads(); }
LORA_DROP_BODY void add(unsigned long long* sum, unsigned long long mass) { atomicAdd(sum, mass); }
LORA_DROP_BODY unsigned bits_of(float x) { return __float_as_uint(x); }
LORA_DROP_BODY float infinity() { return __uint_as_float(0x7f800000u); }
LORA_DROP_BODY char* shared_memory() {
    extern __shared__ __align__(16) char shared[];
    return shared;
}

}  // namespace lora_drop

#else

#include "block.h"

namespace lora_drop {

inline int row_index() { return block_index().x; }
inline void add(unsigned long long* sum, unsigned long long mass) { *sum += mass; }
inline unsigned bits_of(float x) { return float_bits(x); }
inline float infinity() { return INFINITY; }

}  // namespace lora_drop

#endif

namespace lora_drop {

using Mass = unsigned long long;

/* What a launch works on; kernels.py has the same struct. */
struct Choice {
    const float* logits;          // [rows, vocab]
    const long long* next_token;  // [rows], the largest logit's index, −1 where they are no numbers
    const double* uniforms;       // [draws, rows], in [0, 1)
    const double* top_p;          // [rows]; 1 is off
    const long long* top_k;       // [rows]; 0 is off
    const float* temperature;     // [rows]; 0 takes the likeliest
    const float* penalty;         // [rows]; 1 is off
    const int* new_tokens;        // [rows]: the most that a row makes
    const unsigned char* stops;   // [rows, vocab], 1 at tokens that end a row
    unsigned char* seen;          // [rows, vocab], 1 at tokens that the repetition penalty lowers
    long long* ids;               // [rows]: the token, for a step of one
    long long* window;            // [rows, window_width]: the token in its place, for a step that runs several
    long long* len_kept;          // [rows]
    long long* len_dropped;       // [rows]
    long long* tokens;            // [rows]: the token, −1 where the logits are no numbers, for the host
    int* drawn;                   // [rows]: tokens chosen
    int* over;                    // [rows]: 1 after a stop token, −1 or the last of them; such a row stands still
    int rows, vocab, window_width, place;
    int kept, dropped;  // entries that the step has written in each row
    int back;           // of them, and those before, how many the next step writes again
    int next_width;     // tokens that the next step writes, for which a row that stands still needs room
    int most_kept, most_dropped;  // slots
};

constexpr int kBins = 256, kCopies = 8;  // copies of a bin: fewer threads meet at one

struct Shared {
    Mass bins[kBins][kCopies];
    Mass total;
    float best[kThreads];
    int at[kThreads];
};

/* Where a target falls when tokens lie side by side in ascending order of their keys, each as wide as its mass. */
struct Place {
    unsigned key;
    Mass begin;  // mass of all lower keys
};

/* The sum of the masses must be above `target`. The key's digits are found one after another, the highest first. */
template <class KeyOf, class MassOf>
LORA_DROP_BODY Place place_of(Shared& shared, Mass target, int vocab, KeyOf key_of, MassOf mass_of) {
    Place place{0, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = thread_index(); i < kBins * kCopies; i += kThreads) shared.bins[i / kCopies][i % kCopies] = 0;
        sync_block();
        Mass run = 0;  // of a thread's tokens that came one after another into one bin
        unsigned at = 0;
        for (int token = thread_index(); token < vocab; token += kThreads) {
            const unsigned key = key_of(token), bin = key >> shift & (kBins - 1);
            if (((key ^ place.key) >> shift) >= kBins) continue;  // the digits before are not those that were found
            if (bin != at) {
                if (run != 0) add(&shared.bins[at][thread_index() % kCopies], run);
                run = 0;
                at = bin;
            }
            run += mass_of(token);
        }
        if (run != 0) add(&shared.bins[at][thread_index() % kCopies], run);
        sync_block();
        for (int bin = thread_index(); bin < kBins; bin += kThreads) {
            for (int copy = 1; copy < kCopies; ++copy) shared.bins[bin][0] += shared.bins[bin][copy];
        }
        sync_block();
        int bin = 0;
        while (bin < kBins - 1 && place.begin + shared.bins[bin][0] <= target) place.begin += shared.bins[bin++][0];
        place.key |= static_cast<unsigned>(bin) << shift;
        sync_block();
    }
    return place;
}

template <class MassOf>
LORA_DROP_BODY Mass total_of(Shared& shared, int vocab, MassOf mass_of) {
    if (thread_index() == 0) shared.total = 0;
    sync_block();
    Mass mine = 0;
    for (int token = thread_index(); token < vocab; token += kThreads) mine += mass_of(token);
    add(&shared.total, mine);
    sync_block();
    return shared.total;
}

struct Largest {
    float score;
    int token;  // the lowest with this score; −1 where a score is NaN or +∞, or all are −∞
};

template <class ScoreOf>
LORA_DROP_BODY Largest largest_of(Shared& shared, int vocab, ScoreOf score_of) {
    const int thread = thread_index();
    float best = -infinity();
    int at = vocab;
    for (int token = thread; token < vocab; token += kThreads) {
        const float score = score_of(token);
        if (!(score < infinity())) {
            best = infinity();
        } else if (score > best) {
            best = score;
            at = token;
        }
    }
    shared.best[thread] = best;
    shared.at[thread] = at;
    sync_block();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (thread < half) {
            const float other = shared.best[thread + half];
            const int other_at = shared.at[thread + half];
            if (other > shared.best[thread] || (other == shared.best[thread] && other_at < shared.at[thread])) {
                shared.best[thread] = other;
                shared.at[thread] = other_at;
            }
        }
        sync_block();
    }
    const bool are_numbers = shared.best[0] < infinity() && shared.at[0] < vocab;
    return {shared.best[0], are_numbers ? shared.at[0] : -1};
}

/* Higher scores have lower numbers. */
LORA_DROP_BODY unsigned descending(float score) {
    const unsigned bits = bits_of(score == 0.0f ? 0.0f : score);  // −0 is 0
    return bits >> 31 != 0 ? bits : ~(bits | 0x80000000u);
}

/* The weight exp(−key · 2^-26) in units of 2^-40. */
LORA_DROP_BODY Mass weight_of(unsigned key) {
    return key == ~0u ? 0 : static_cast<Mass>(expf(-static_cast<float>(key) * 0x1p-26f) * 0x1p40f);
}

LORA_DROP_BODY Mass at_most(Mass target, Mass end) { return target < end ? target : end - 1; }

/* A token by the scores, whose largest is given. */
template <class ScoreOf>
LORA_DROP_BODY int draw(Shared& shared, const Choice& call, int row, double uniform, float largest, ScoreOf score_of) {
    const int vocab = call.vocab;
    const long long top_k = call.top_k[row];
    const double top_p = call.top_p[row];
    unsigned lowest = ~0u;  // of the scores that top-k leaves
    if (top_k > 0 && top_k < vocab) {
        lowest = place_of(shared, static_cast<Mass>(top_k - 1), vocab,
                          [&](int token) { return descending(score_of(token)); }, [](int) { return Mass{1}; })
                     .key;
    }
    const float temperature = call.temperature[row] > 1e-30f ? call.temperature[row] : 1e-30f;
    const auto key_of = [&](int token) {  // lower the likelier: how far below the largest, in units of 2^-26
        const float score = score_of(token), below = (largest - score) / temperature;
        return descending(score) > lowest || !(below < 63.0f) ? ~0u : static_cast<unsigned>(below * 0x1p26f);
    };
    const auto mass_of = [&](int token) { return weight_of(key_of(token)); };
    const auto id_of = [](int token) { return static_cast<unsigned>(token); };
    Mass total = total_of(shared, vocab, mass_of);
    if (top_p >= 1.0) {
        const Mass target = at_most(static_cast<Mass>(uniform * static_cast<double>(total)), total);
        return static_cast<int>(place_of(shared, target, vocab, id_of, mass_of).key);
    }
    // The fewest of the likeliest tokens that hold top_p; of equally likely ones the lowest ids
    const Mass needed = static_cast<Mass>(ceil(top_p * static_cast<double>(total)));
    const Mass last_mass = at_most(needed > 0 ? needed - 1 : 0, total);
    const Place last = place_of(shared, last_mass, vocab, key_of, mass_of);
    const Mass each = weight_of(last.key);
    total = last.begin + ((last_mass - last.begin) / each + 1) * each;
    const Mass target = at_most(static_cast<Mass>(uniform * static_cast<double>(total)), total);
    const Place drawn = place_of(shared, target, vocab, key_of, mass_of);
    const Mass rank = (target - drawn.begin) / weight_of(drawn.key);
    const auto is_drawn = [&](int token) { return Mass{key_of(token) == drawn.key}; };
    return static_cast<int>(place_of(shared, rank, vocab, id_of, is_drawn).key);
}

LORA_DROP_BODY int chosen(Shared& shared, const Choice& call, int row) {
    const float temperature = call.temperature[row], penalty = call.penalty[row];
    if (temperature == 0.0f && penalty == 1.0f) return static_cast<int>(call.next_token[row]);
    const float* logits = call.logits + static_cast<long long>(row) * call.vocab;
    const unsigned char* seen = call.seen + static_cast<long long>(row) * call.vocab;
    const auto score_of = [&](int token) {
        const float logit = logits[token];
        if (penalty == 1.0f || seen[token] == 0) return logit;
        return logit < 0.0f ? logit * penalty : logit / penalty;
    };
    const Largest largest = largest_of(shared, call.vocab, score_of);
    if (temperature == 0.0f || largest.token < 0) return largest.token;
    const double uniform = call.uniforms[static_cast<long long>(call.drawn[row]) * call.rows + row];
    return draw(shared, call, row, uniform, largest.score, score_of);
}

/* Lengths and ids of a row before the next step. */
LORA_DROP_BODY void move_on(const Choice& call, int row, int token) {
    const bool was_over = call.over[row] != 0;
    const bool is_last = call.drawn[row] + 1 >= call.new_tokens[row];
    const bool stops = token < 0 || call.stops[static_cast<long long>(row) * call.vocab + token] != 0;
    const bool is_over = was_over || stops || is_last;
    long long kept = call.len_kept[row] + (was_over ? 0 : call.kept);
    long long dropped = call.len_dropped[row] + (was_over ? 0 : call.dropped);
    if (is_over) {  // what it writes all the same lies within its slots
        const long long room_kept = call.most_kept - call.next_width;
        const long long room_dropped = call.most_dropped - call.next_width;
        kept = kept < room_kept ? kept : room_kept;
        dropped = dropped < room_dropped ? dropped : room_dropped;
    } else {
        kept -= call.back;
        call.seen[static_cast<long long>(row) * call.vocab + token] = 1;
    }
    call.len_kept[row] = kept;
    call.len_dropped[row] = dropped;
    call.over[row] = is_over;
    call.drawn[row] += 1;
    call.tokens[row] = token;
    call.ids[row] = call.window[static_cast<long long>(row) * call.window_width + call.place] = token < 0 ? 0 : token;
}

LORA_DROP_BODY void choose(const Choice& call) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const int row = row_index(), token = chosen(shared, call, row);
    if (thread_index() == 0) move_on(call, row, token);
}

}  // namespace lora_drop

#ifdef __CUDACC__
static_assert(sizeof(lora_drop::Shared) <= LORA_DROP_SHARED_BYTES, "what a launch asks for");

extern "C" __global__ void __launch_bounds__(lora_drop::kThreads)
    choose_tokens(const __grid_constant__ lora_drop::Choice call) {
    lora_drop::choose(call);
}
#endif
