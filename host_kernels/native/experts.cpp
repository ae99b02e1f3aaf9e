// A run of experts as two phases of independent items, so that one expert already occupies every core:
// gate and up by panels of the expert width, then down by panels of the model width. An item of the second phase owns its
// columns of `out` and adds the experts in the order given: nothing depends on which thread takes which item.
//
// Activations between the phases live in a scratch buffer of the calling thread that only grows. A run that needs more than
// SCRATCH_FLOATS of it goes in several waves, each with its two phases.

#include "experts.h"

#include <algorithm>
#include <new>
#include <vector>

#include "team.h"

namespace experts {
namespace {

constexpr int64_t PANEL = 32;    // rows of weights an item takes: two cache lines of output
constexpr int64_t TOKENS = 96;   // tokens between looks at the same panel, which stays in the second-level cache
constexpr int64_t SCRATCH_FLOATS = 4 << 20;
constexpr int64_t ALIGN_FLOATS = 16;  // a cache line
// A thread more for every so many multiply-adds, where a weight read counts as READ of them: some 20 us of one core
// (measured: waking a helper costs 5 to 50 us).
constexpr int64_t GRAIN = 1 << 20, READ = 8;

const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &avx512, &avx2,
#endif
    &portable};
constexpr int64_t COUNT = sizeof ISAS / sizeof *ISAS;

// One expert with some of its tokens; token j is row rows[j] of x (all one token: rows is null).
struct Share {
    const Expert* expert;
    const int64_t* rows;
    const float* mix;
    int64_t load;
    int64_t first;  // of its rows among the wave's activations' pointers
    int64_t items;  // of the wave's first phase, before this one's
};

struct Wave {
    const Isa* isa;
    int64_t width, panels;
    float* out;
    const Share *begin, *end;
    const float* const* inputs;  // per share and token, the row of x
    float* const* acts;          // the same, [F] of activations
};

int64_t weight_bytes(const Expert& expert) { return expert.format == F32 ? 4 : 2; }

const void* row_of(const void* matrix, const Expert& expert, int64_t row, int64_t depth) {
    return static_cast<const char*>(matrix) + row * depth * weight_bytes(expert);
}

// Gate and up: PANEL columns of one share's activations.
void inward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const Share& share = *(std::upper_bound(wave.begin, wave.end, item,
                                            [](int64_t at, const Share& other) { return at < other.items; }) -
                           1);
    const Expert& expert = *share.expert;
    const int64_t from = (item - share.items) * PANEL, rows = std::min(PANEL, expert.hidden - from);
    const auto product = wave.isa->product[expert.format];
    alignas(64) float gate[TOKENS * PANEL], up[TOKENS * PANEL];
    for (int64_t start = 0; start < share.load; start += TOKENS) {
        const int64_t n = std::min(TOKENS, share.load - start);
        const float* const* x = wave.inputs + share.first + start;
        product(row_of(expert.gate_up, expert, from, wave.width), rows, wave.width, x, n, gate, PANEL);
        product(row_of(expert.gate_up, expert, expert.hidden + from, wave.width), rows, wave.width, x, n, up, PANEL);
        for (int64_t t = 0; t < n; ++t)
            wave.isa->silu_times(gate + t * PANEL, up + t * PANEL, wave.acts[share.first + start + t] + from, rows);
    }
}

// Down: PANEL columns of `out`, all shares.
void outward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const int64_t from = item * PANEL, rows = std::min(PANEL, wave.width - from);
    alignas(64) float y[TOKENS * PANEL];
    for (const Share* share = wave.begin; share < wave.end; ++share) {
        const Expert& expert = *share->expert;
        for (int64_t start = 0; start < share->load; start += TOKENS) {
            const int64_t n = std::min(TOKENS, share->load - start);
            wave.isa->product[expert.format](row_of(expert.down, expert, from, expert.hidden), rows, expert.hidden,
                                             wave.acts + share->first + start, n, y, PANEL);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t row = share->rows ? share->rows[start + t] : 0;
                const float mix = share->mix[start + t];
                float* to = wave.out + row * wave.width + from;
                for (int64_t d = 0; d < rows; ++d) to[d] += mix * y[t * PANEL + d];
            }
        }
    }
}

struct Scratch {
    std::vector<float> floats;
    std::vector<const float*> inputs;
    std::vector<float*> acts;
    std::vector<Share> shares;
};

void run_wave(const Isa& isa, Scratch& scratch, int64_t width, float* out, int64_t threads) {
    const Share *begin = scratch.shares.data(), *end = begin + scratch.shares.size();
    int64_t work = 0;
    for (const Share* share = begin; share < end; ++share)
        work += 3 * width * share->expert->hidden * (READ + share->load);
    const int64_t panels = (width + PANEL - 1) / PANEL;
    Wave wave = {&isa, width, panels, out, begin, end, scratch.inputs.data(), scratch.acts.data()};
    const Share& last = end[-1];
    Phase phases[2] = {{inward, &wave, last.items + (last.expert->hidden + PANEL - 1) / PANEL},
                       {outward, &wave, panels}};
    run_team(phases, 2, std::min(threads, 1 + work / GRAIN));
}

int run(int64_t isa, int64_t m, const Expert* const* records, int64_t N, int64_t D, const float* x, const int64_t* starts,
        const int64_t* rows, const float* mix, float* out, int64_t threads) {
    for (int64_t i = 0; i < m; ++i)
        if (records[i]->width != D || records[i]->format < 0 || records[i]->format >= FORMATS) return 1;
    if (rows)
        for (int64_t j = starts[0]; j < starts[m]; ++j)
            if (rows[j] < 0 || rows[j] >= N) return 2;
    static thread_local Scratch scratch;
    try {
        int64_t i = 0, done = 0;  // the next expert, and how many of its tokens are done
        while (i < m) {
            scratch.shares.clear();
            scratch.inputs.clear();
            int64_t floats = 0, items = 0;
            for (; i < m; ++i, done = 0) {
                const int64_t start = rows ? starts[i] : i, load = rows ? starts[i + 1] - start : 1;
                if (done == load) continue;
                const int64_t hidden = records[i]->hidden, step = (hidden + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
                const int64_t room = std::max<int64_t>((SCRATCH_FLOATS - floats) / step, scratch.shares.empty());
                const int64_t take = std::min(load - done, room);
                if (take == 0) break;
                const int64_t at = start + done, first = scratch.inputs.size();
                scratch.shares.push_back({records[i], rows ? rows + at : nullptr, mix + at, take, first, items});
                for (int64_t t = 0; t < take; ++t) scratch.inputs.push_back(x + (rows ? rows[at + t] * D : 0));
                items += (hidden + PANEL - 1) / PANEL;
                floats += take * step;
                if ((done += take) < load) break;
            }
            if (scratch.shares.empty()) break;
            if (static_cast<int64_t>(scratch.floats.size()) < floats + ALIGN_FLOATS) scratch.floats.resize(floats + ALIGN_FLOATS);
            scratch.acts.resize(scratch.inputs.size());
            const uintptr_t base = reinterpret_cast<uintptr_t>(scratch.floats.data());
            float* act = reinterpret_cast<float*>((base + 63) & ~static_cast<uintptr_t>(63));
            for (const Share& share : scratch.shares) {
                const int64_t step = (share.expert->hidden + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
                for (int64_t t = 0; t < share.load; ++t, act += step) scratch.acts[share.first + t] = act;
            }
            run_wave(*ISAS[isa], scratch, D, out, threads);
        }
    } catch (const std::bad_alloc&) {
        return 3;
    }
    return 0;
}

}  // namespace
}  // namespace experts

using namespace experts;

extern "C" {

int experts_run(int64_t isa, int64_t m, const Expert* const* records, int64_t N, int64_t D, const float* x,
                const int64_t* starts, const int64_t* rows, const float* mix, float* out, int64_t threads) {
    return run(isa, m, records, N, D, x, starts, rows, mix, out, threads);
}

int experts_run_one(int64_t isa, int64_t m, const Expert* const* records, int64_t D, const float* x, const float* mix,
                    float* out, int64_t threads) {
    return run(isa, m, records, 1, D, x, nullptr, nullptr, mix, out, threads);
}

const char* experts_isa(int64_t isa) {
    if (isa < 0 || isa >= COUNT) return nullptr;
    return ISAS[isa]->supported() ? ISAS[isa]->name : "";
}

void experts_silu_times(int64_t isa, const float* gate, const float* up, float* out, int64_t count) {
    ISAS[isa]->silu_times(gate, up, out, count);
}

void experts_shutdown() { end_helpers(); }
}
