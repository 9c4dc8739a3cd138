/* Who does what: the units of work of a call, the share of each block, where its cut pieces lie in the workspace.
 *
 * An item is one tile of query rows of one batch row. For each key/value head it is cut into units of about equal cost:
 * one per tile of keys that it sees and, where the kernel appends the new tokens itself, one for those. All units of a
 * call stand in a row (by item, then head, then slot), and the blocks take equal, contiguous shares of it, whatever the
 * lengths are. So a block works on the end of one item, then on whole ones, then on the beginning of another.
 */
#ifndef LORA_DROP_WORK_CUH
#define LORA_DROP_WORK_CUH

#include "heads.cuh"

namespace lora_drop {

struct Item {
    int b, tile;
    Row row;
    int begin, end;  // cached slots that it sees
    int key_tiles;
    int units;  // at least one, which writes zeros where nothing is seen

    LORA_DROP_BODY Item(const LoraDropAttention& call, const Plan& plan, int index)
        : b(index / plan.tiles), tile(index % plan.tiles), row(call, b), begin(0), end(0) {
        const int first_token = tile * plan.tile_rows / plan.group;
        const int last_row = min((tile + 1) * plan.tile_rows, plan.rows) - 1;
        const int last_token = min(last_row / plan.group, row.count - 1);
        if (first_token <= last_token) {
            begin = call.window == 0 ? 0 : max(row.length + first_token - call.window + 1, 0);
            end = max(plan.fused ? row.length : row.length + last_token + 1, begin);
        }
        key_tiles = (end - begin + plan.tile_keys - 1) / plan.tile_keys;
        units = plan.fused ? key_tiles + 1 : max(key_tiles, 1);
    }
};

/* The share of one block. Blocks past the number of units have none. */
struct Share {
    int item, g, unit;  // where it starts
    int count;          // of units
    int units, workers;  // of all

    /* By all threads of a block. shared: [kWarps + 2] */
    LORA_DROP_BODY Share(const LoraDropAttention& call, const Plan& plan, int* shared) {
        // A thread counts the units of a few neighbouring items; their sums before it come through warps
        const int thread = thread_index(), warp = thread / kWarp, lane = thread % kWarp;
        const int items = call.batch * plan.tiles, each = (items + kThreads - 1) / kThreads;
        const int first = min(thread * each, items), last = min(first + each, items);
        int own = 0;
        for (int i = first; i < last; ++i) own += Item(call, plan, i).units;
        int upto = own;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const int before = shuffle(upto, max(lane - step, 0));
            if (lane >= step) upto += before;
        }
        if (lane == kWarp - 1) shared[warp] = upto;
        sync_block();
        int before = upto - own, total = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) before += shared[w];
            total += shared[w];
        }
        units = total * call.kv_heads;
        workers = min(plan.workers, units);
        count = 0;
        if (block_index().x >= workers) return;
        const int begin = begin_of(block_index().x);
        count = begin_of(block_index().x + 1) - begin;

        // The one thread that counted the first unit finds its item
        const auto starts_in = [&](int before, int n) {
            return before * call.kv_heads <= begin && begin < (before + n) * call.kv_heads;
        };
        if (starts_in(before, own)) {
            int i = first;
            for (int n; !starts_in(before, n = Item(call, plan, i).units); ++i) before += n;
            shared[kWarps] = i;
            shared[kWarps + 1] = before;
        }
        sync_block();
        item = shared[kWarps];
        const int within = begin - shared[kWarps + 1] * call.kv_heads;
        const int units_of_head = Item(call, plan, item).units;
        g = within / units_of_head;
        unit = within % units_of_head;
    }

    LORA_DROP_BODY int begin_of(int worker) const {
        return static_cast<int>(static_cast<int64_t>(units) * worker / workers);
    }

    /* The block that has the unit `ahead` of this block's last one. */
    LORA_DROP_BODY int worker_ahead(int ahead) const {
        const int64_t until = begin_of(block_index().x + 1) + ahead;
        return static_cast<int>((until * workers - 1) / units);
    }
};

/* An item of one head that the share of a block begins and does not end: the following blocks up to `last_worker` go on
 * with it. item: −1 if there is none. */
struct Cut {
    int item, g, last_worker, padding;
};

/* The workspace: per block its Cut; then room for what it found of two items, the one that it began and the one that it
 * went on with: outputs [tile_rows, D], not yet divided by the sum, and the maximum and the sum [tile_rows, 2], in
 * powers of two. */
struct Workspace {
    enum Piece { kWentOn, kBegan, kPieces };

    Cut* cuts;
    float* outputs;
    float* statistics;
    int64_t rows, d;

    LORA_DROP_BODY Workspace(const LoraDropAttention& call, const Plan& plan)
        : cuts(static_cast<Cut*>(call.workspace)), rows(plan.tile_rows), d(call.head_dim) {
        outputs = reinterpret_cast<float*>(cuts + plan.workers);
        statistics = outputs + plan.workers * kPieces * rows * d;
    }
    LORA_DROP_BODY float* output(int worker, Piece piece, int row) const {
        return outputs + ((static_cast<int64_t>(worker) * kPieces + piece) * rows + row) * d;
    }
    LORA_DROP_BODY float* statistic(int worker, Piece piece, int row) const {
        return statistics + ((static_cast<int64_t>(worker) * kPieces + piece) * rows + row) * 2;
    }
};

/* Where a tile puts its results: the output of the call, or, of a part of an item, the workspace. */
struct Destination {
    const LoraDropAttention& call;
    const Plan& plan;
    int b, g, first_row;
    bool whole;
    Workspace::Piece piece;

    /* Where a query row begins in query and output. [B, S, G, group, D] */
    LORA_DROP_BODY int64_t row_offset(int row) const {
        const int query_row = first_row + row;
        const int64_t token = static_cast<int64_t>(b) * call.new_tokens + query_row / plan.group;
        return ((token * call.kv_heads + g) * plan.group + query_row % plan.group) * call.head_dim;
    }
    LORA_DROP_BODY float* partial(int row) const {
        return Workspace(call, plan).output(block_index().x, piece, row);
    }
    LORA_DROP_BODY void put_statistics(int row, float maximum, float sum) const {
        float* statistic = Workspace(call, plan).statistic(block_index().x, piece, row);
        statistic[0] = maximum;
        statistic[1] = sum;
    }
    /* What the output of a row is multiplied by at last; its weights, whose sum is given, are relative to 2^maximum. */
    LORA_DROP_BODY float factor(int row, float maximum, float sum) const {
        if (sum == 0.0f) return 0.0f;  // it sees nothing
        if (call.sinks != nullptr) {
            sum += exp2f(call.sinks[g * plan.group + (first_row + row) % plan.group] * kLog2E - maximum);
        }
        return (call.v_scale == nullptr ? 1.0f : call.v_scale[g]) / sum;
    }
};

}  // namespace lora_drop

#endif
