// A run of experts as phases of independent items, so that one expert already occupies every core: x is copied to rows that
// suit the cache, then gate and up by panels of the expert width, then down by panels of the model width. An item of the
// last phase owns its columns of `out` and adds the experts in the order given: nothing depends on which thread takes what.
//
// Activations between the phases live in a scratch buffer of the calling thread that only grows. A run that needs more than
// SCRATCH_FLOATS of it goes in several waves.

#include "experts.h"

#include <algorithm>
#include <new>
#include <vector>

#include "team.h"

namespace experts {
namespace {

constexpr int64_t PANEL = MAX_ROWS;  // rows of weights an item takes: two cache lines of output
constexpr int64_t TOKENS = 96;   // tokens between looks at the same panel, which stays in the second-level cache
constexpr int64_t SCRATCH_FLOATS = 4 << 20;
constexpr int64_t LINE = 16;           // floats of a cache line
constexpr int64_t COPIED = 16;         // rows of x in an item
// A thread more for every so many multiply-adds, where a weight read counts as READ of them: some 20 us of one core
// (measured: waking a helper costs 5 to 50 us).
#if !defined(EXPERTS_GRAIN)
#define EXPERTS_GRAIN (1 << 20)
#endif
constexpr int64_t GRAIN = EXPERTS_GRAIN, READ = 8;

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
    int64_t width, N, stride;
    const float* x;
    float *copy, *out;
    const Share *begin, *end;
    const float* const* inputs;  // per share and token, the row of x
    float* const* acts;          // the same, [F] of activations
};

int64_t panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

int64_t weight_bytes(const Expert& expert) { return expert.format == F32 ? 4 : 2; }

const void* row_of(const void* matrix, const Expert& expert, int64_t row, int64_t depth) {
    return static_cast<const char*>(matrix) + row * depth * weight_bytes(expert);
}

// Rows an odd number of cache lines apart. At a power of two, as widths usually are, the rows of a tile would evict each
// other from the first-level cache (measured at width 1024, load 128: 70 instead of 80 GFLOP/s).
int64_t stride_of(int64_t floats) { return ((floats + LINE - 1) / LINE | 1) * LINE; }

void copy(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    for (int64_t row = item * COPIED; row < std::min(wave.N, (item + 1) * COPIED); ++row)
        std::copy_n(wave.x + row * wave.width, wave.width, wave.copy + row * wave.stride);
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
    const void* gate_rows = row_of(expert.gate_up, expert, from, wave.width);
    const void* up_rows = row_of(expert.gate_up, expert, expert.hidden + from, wave.width);
    const void* next_rows = row_of(expert.gate_up, expert, from + PANEL, wave.width);
    alignas(64) float gate[TOKENS * PANEL], up[TOKENS * PANEL];
    for (int64_t start = 0; start < share.load; start += TOKENS) {
        const int64_t n = std::min(TOKENS, share.load - start);
        const float* const* x = wave.inputs + share.first + start;
        product(gate_rows, rows, wave.width, x, n, gate, PANEL, up_rows);
        product(up_rows, rows, wave.width, x, n, up, PANEL, start + n < share.load ? gate_rows : next_rows);
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
        const Expert& after = share + 1 < wave.end ? *share[1].expert : expert;
        const void* down_rows = row_of(expert.down, expert, from, expert.hidden);
        const void* next_rows = row_of(after.down, after, from, after.hidden);
        for (int64_t start = 0; start < share->load; start += TOKENS) {
            const int64_t n = std::min(TOKENS, share->load - start);
            wave.isa->product[expert.format](down_rows, rows, expert.hidden, wave.acts + share->first + start, n, y, PANEL,
                                             start + n < share->load ? down_rows : next_rows);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t row = share->rows ? share->rows[start + t] : 0;
                const float mix = share->mix[start + t];
                float* to = wave.out + row * wave.width + from;
                for (int64_t d = 0; d < rows; ++d) to[d] += mix * y[t * PANEL + d];
            }
        }
    }
}

// Floats that grow and are never given back, from a cache line's start.
class Floats {
   public:
    float* get(int64_t count) {
        if (static_cast<int64_t>(held_.size()) < count + LINE) {
            held_.clear();
            held_.resize(count + LINE);
        }
        const uintptr_t at = reinterpret_cast<uintptr_t>(held_.data());
        return reinterpret_cast<float*>((at + 63) & ~static_cast<uintptr_t>(63));
    }

   private:
    std::vector<float> held_;
};

struct Scratch {
    Floats copy, act;
    std::vector<const float*> inputs;
    std::vector<float*> acts;
    std::vector<Share> shares;
};

// What is asked of `run`; fields as the arguments of experts_run.
struct Call {
    int64_t m;
    const Expert* const* records;
    int64_t N, D;
    const float* x;
    const int64_t *starts, *rows;  // both null for one token
    const float* mix;
    float* out;

    int64_t start(int64_t i) const { return starts ? starts[i] : i; }
    int64_t load(int64_t i) const { return start(i + 1) - start(i); }
};

int check(const Call& call) {
    for (int64_t i = 0; i < call.m; ++i)
        if (call.records[i]->width != call.D || call.records[i]->format < 0 || call.records[i]->format >= FORMATS) return 1;
    for (int64_t j = 0; call.starts && j < call.starts[call.m]; ++j)
        if (call.rows[j] < 0 || call.rows[j] >= call.N) return 2;
    return 0;
}

// Fills scratch.shares with what one wave takes, from token `done` of expert i on, and moves both on. Returns the floats of
// its activations.
int64_t next_wave(const Call& call, Scratch& scratch, const float* x, int64_t stride, int64_t& i, int64_t& done) {
    scratch.shares.clear();
    scratch.inputs.clear();
    int64_t floats = 0, items = 0;
    for (; i < call.m; ++i, done = 0) {
        const int64_t left = call.load(i) - done, step = stride_of(call.records[i]->hidden);
        if (left == 0) continue;
        const int64_t room = std::max<int64_t>((SCRATCH_FLOATS - floats) / step, scratch.shares.empty());
        const int64_t take = std::min(left, room), at = call.start(i) + done, first = scratch.inputs.size();
        if (take == 0) break;
        const int64_t* rows = call.starts ? call.rows + at : nullptr;
        scratch.shares.push_back({call.records[i], rows, call.mix + at, take, first, items});
        for (int64_t t = 0; t < take; ++t) scratch.inputs.push_back(x + (rows ? rows[t] * stride : 0));
        items += panels(call.records[i]->hidden);
        floats += take * step;
        done += take;
        if (take < left) break;
    }
    return floats;
}

void run(const Isa& isa, const Call& call, int64_t threads) {
    static thread_local Scratch scratch;
    const bool copied = call.N > 1;
    const int64_t stride = copied ? stride_of(call.D) : call.D;
    float* own = copied ? scratch.copy.get(call.N * stride) : nullptr;
    for (int64_t i = 0, done = 0; i < call.m;) {
        const bool first = i == 0 && done == 0;
        const int64_t floats = next_wave(call, scratch, copied ? own : call.x, stride, i, done);
        if (scratch.shares.empty()) break;
        const Share *begin = scratch.shares.data(), *end = begin + scratch.shares.size(), &last = end[-1];
        float* act = scratch.act.get(floats);
        scratch.acts.clear();
        int64_t work = 0;
        for (const Share* share = begin; share < end; ++share) {
            for (int64_t t = 0; t < share->load; ++t, act += stride_of(share->expert->hidden)) scratch.acts.push_back(act);
            work += 3 * call.D * share->expert->hidden * (READ + share->load);
        }
        const Wave wave = {&isa,  call.D, call.N, stride, call.x, own, call.out, begin, end, scratch.inputs.data(),
                           scratch.acts.data()};
        Phase phases[3] = {{copy, &wave, copied && first ? (call.N + COPIED - 1) / COPIED : 0},
                           {inward, &wave, last.items + panels(last.expert->hidden)},
                           {outward, &wave, panels(call.D)}};
        run_team(phases, 3, std::min(threads, 1 + work / GRAIN));
    }
}

int run_checked(int64_t isa, const Call& call, int64_t threads) {
    if (int wrong = check(call)) return wrong;
    try {
        run(*ISAS[isa], call, threads);
    } catch (const std::bad_alloc&) {
        return 3;
    }
    return 0;
}

}  // namespace

const Isa& isa_at(int64_t number) { return *ISAS[number]; }

}  // namespace experts

using namespace experts;

extern "C" {

int experts_run(int64_t isa, int64_t m, const Expert* const* records, int64_t N, int64_t D, const float* x,
                const int64_t* starts, const int64_t* rows, const float* mix, float* out, int64_t threads) {
    return run_checked(isa, {m, records, N, D, x, starts, rows, mix, out}, threads);
}

int experts_run_one(int64_t isa, int64_t m, const Expert* const* records, int64_t D, const float* x, const float* mix,
                    float* out, int64_t threads) {
    return run_checked(isa, {m, records, 1, D, x, nullptr, nullptr, mix, out}, threads);
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
