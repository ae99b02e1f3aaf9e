// A run of experts as phases of independent items, so that one expert already occupies every core: x is made ready (copied to
// rows that suit the cache, or quantised), then gate and up by rows of the expert width, their product quantised where the
// format says so, then down by rows of the model width. An item of the last phase owns its columns of `out` and adds the
// experts in the order given: nothing depends on which thread takes what.
//
// What lies between the phases is in scratch of the calling thread that only grows. A run that needs more than
// SCRATCH_BYTES of it goes in several waves; so does one whose experts have different formats.

#include "experts.h"

#include <algorithm>
#include <new>
#include <vector>

#include "team.h"

namespace experts {
namespace {

constexpr int64_t PLAIN_ROWS = MAX_ROWS;  // rows of weights that an item takes: two cache lines of output
constexpr int64_t PACKED_ROWS = 64;
constexpr int64_t TOKENS = 96;  // tokens between looks at the same rows, which stay in the second-level cache
constexpr int64_t SCRATCH_BYTES = 16 << 20;
constexpr int64_t READIED = 16;  // rows of x in an item
// A thread more for every so many multiply-adds, where a weight read counts as READ of them: some 20 us of one core
// (measured: waking a helper costs 5 to 50 us).
#if !defined(EXPERTS_GRAIN)
#define EXPERTS_GRAIN (1 << 20)
#endif
constexpr int64_t GRAIN = EXPERTS_GRAIN, READ = 8;

const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &avx512vnni, &avx512, &avxvnni, &avx2,
#endif
    &portable};
constexpr int64_t COUNT = sizeof ISAS / sizeof *ISAS;

int64_t item_rows(const Matrix& matrix) { return matrix.packed() ? PACKED_ROWS : PLAIN_ROWS; }
int64_t items_of(const Matrix& matrix) { return (matrix.rows + item_rows(matrix) - 1) / item_rows(matrix); }

// Rows an odd number of cache lines apart. At a power of two, as widths usually are, the rows of a tile would evict each
// other from the first-level cache (measured at width 1024, load 128: 70 instead of 80 GFLOP/s).
int64_t odd_lines(int64_t bytes) { return ((bytes + LINE - 1) / LINE | 1) * LINE; }

// Bytes of a row of activations as the products with `matrix` take it.
int64_t input_bytes(const Matrix& matrix) {
    return odd_lines(matrix.a8 ? record_bytes(matrix) : padded(matrix.columns, PADDED) * 4);
}

// c[t * stride + r] for `rows` rows of any matrix; `next`: plain weights that will be wanted next.
void multiply(const Isa& isa, const Matrix& matrix, int64_t from, int64_t rows, const void* const* x, int64_t n, float* c,
              int64_t stride, const void* next) {
    if (!matrix.packed())
        isa.product[matrix.format](matrix.data + from * matrix.pitch, rows, matrix.depth, x, n, c, stride, next);
    else if (!matrix.a8)
        isa.packed[matrix.kind](matrix, from, rows, x, n, c, stride);
    else
        (n <= FEW ? isa.few : isa.quantised)->product[matrix.kind](matrix, from, rows, x, n, c, stride);
}

// Rows of floats made ready to be multiplied with `matrix`: count of them, stride floats apart, to `to`, step bytes apart.
struct Readying {
    const Isa* isa;
    const Matrix* matrix;
    int64_t count;
    const float* x;
    int64_t stride;
    char* to;
    int64_t step;
};

void ready_row(const Isa& isa, const Matrix& matrix, const float* x, char* to) {
    if (matrix.a8) return isa.quantised->quantise(matrix, x, to);
    float* row = reinterpret_cast<float*>(to);
    std::fill(std::copy_n(x, matrix.columns, row), row + padded(matrix.columns, PADDED), 0.0f);
}

void ready_rows(const void* context, int64_t item) {
    const Readying& all = *static_cast<const Readying*>(context);
    for (int64_t row = item * READIED; row < std::min(all.count, (item + 1) * READIED); ++row)
        ready_row(*all.isa, *all.matrix, all.x + row * all.stride, all.to + row * all.step);
}

int64_t readying_items(const Readying& all) { return (all.count + READIED - 1) / READIED; }

// Whether products can read x where it lies.
bool is_ready(const Matrix& matrix, int64_t count) {
    return count == 1 && !matrix.a8 && (!matrix.packed() || matrix.columns == matrix.depth);
}

// One expert with some of its tokens; token j is row rows[j] of x (all one token: rows is null).
struct Share {
    Matrix gate, up, down;
    const int64_t* rows;
    const float* mix;
    int64_t load;
    int64_t first;  // of its rows among the wave's pointers
    int64_t items;  // of the wave's first phase, before this one's
};

struct Wave {
    const Isa* isa;
    float* out;
    int64_t width;
    const Share *begin, *end;
    const void* const* inputs;  // per share and token, its row of x made ready
    float* const* acts;         // the same, [F] of activations
    void* const* records;       // the same, quantised where the format says so, else the activations
};

// Gate and up: some columns of one share's activations.
void inward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const Share& share = *(std::upper_bound(wave.begin, wave.end, item,
                                            [](int64_t at, const Share& other) { return at < other.items; }) -
                           1);
    const Matrix &gate = share.gate, &up = share.up;
    const int64_t step = item_rows(gate), from = (item - share.items) * step, rows = std::min(step, gate.rows - from);
    const char *gate_rows = gate.data + from * gate.pitch, *up_rows = up.data + from * gate.pitch;
    alignas(64) float g[TOKENS * PACKED_ROWS], u[TOKENS * PACKED_ROWS];
    for (int64_t start = 0; start < share.load; start += TOKENS) {
        const int64_t n = std::min(TOKENS, share.load - start);
        const void* const* x = wave.inputs + share.first + start;
        multiply(*wave.isa, gate, from, rows, x, n, g, step, up_rows);
        multiply(*wave.isa, up, from, rows, x, n, u, step,
                 start + n < share.load ? gate_rows : gate_rows + step * gate.pitch);
        for (int64_t t = 0; t < n; ++t) {
            float* act = wave.acts[share.first + start + t];
            wave.isa->silu_times(g + t * step, u + t * step, act + from, rows);
            if (from + rows == gate.rows) std::fill(act + gate.rows, act + padded(gate.rows, PADDED), 0.0f);
        }
    }
}

// One token's activations of one share.
void requantise(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const Share* share = wave.begin;
    while (item >= share->first + share->load) ++share;
    wave.isa->quantised->quantise(share->down, wave.acts[item], wave.records[item]);
}

// Down: some columns of `out`, all shares.
void outward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const int64_t step = item_rows(wave.begin->down), from = item * step, rows = std::min(step, wave.width - from);
    alignas(64) float y[TOKENS * PACKED_ROWS];
    for (const Share* share = wave.begin; share < wave.end; ++share) {
        const Matrix &down = share->down, &after = (share + 1 < wave.end ? share + 1 : share)->down;
        for (int64_t start = 0; start < share->load; start += TOKENS) {
            const int64_t n = std::min(TOKENS, share->load - start);
            multiply(*wave.isa, down, from, rows, wave.records + share->first + start, n, y, step,
                     start + n < share->load ? down.data + from * down.pitch : after.data + from * after.pitch);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t row = share->rows ? share->rows[start + t] : 0;
                const float mix = share->mix[start + t];
                float* to = wave.out + row * wave.width + from;
                for (int64_t d = 0; d < rows; ++d) to[d] += mix * y[t * step + d];
            }
        }
    }
}

// Bytes that grow and are never given back, from a cache line's start.
class Bytes {
   public:
    char* get(int64_t count) {
        if (static_cast<int64_t>(held_.size()) < count + LINE) {
            held_.clear();
            held_.resize(count + LINE);
        }
        const uintptr_t at = reinterpret_cast<uintptr_t>(held_.data());
        return reinterpret_cast<char*>((at + LINE - 1) & ~static_cast<uintptr_t>(LINE - 1));
    }

   private:
    std::vector<char> held_;
};

struct Scratch {
    Bytes ready, acts_at, records_at;
    std::vector<const void*> inputs;
    std::vector<float*> acts;
    std::vector<void*> records;
    std::vector<Share> shares;
};

Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

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
        if (call.records[i]->width != call.D || !known_format(call.records[i]->format)) return 1;
    for (int64_t j = 0; call.starts && j < call.starts[call.m]; ++j)
        if (call.rows[j] < 0 || call.rows[j] >= call.N) return 2;
    return 0;
}

Share share_of(const Expert& expert) {
    Share made = {};
    made.gate = make_matrix(expert.data, expert.format, expert.hidden, expert.width);
    made.up = make_matrix(made.gate.data + made.gate.bytes, expert.format, expert.hidden, expert.width);
    made.down = make_matrix(made.gate.packed() ? made.up.data + made.up.bytes : expert.down, expert.format, expert.width,
                            expert.hidden);
    return made;
}

// Fills scratch.shares with what one wave takes, from token `done` of expert i on, and moves both on.
void next_wave(const Call& call, Scratch& scratch, int64_t& i, int64_t& done) {
    scratch.shares.clear();
    int64_t bytes = 0, items = 0, tokens = 0;
    for (; i < call.m; ++i, done = 0) {
        const int64_t left = call.load(i) - done;
        if (left == 0) continue;
        const Expert& expert = *call.records[i];
        if (!scratch.shares.empty() && scratch.shares.back().gate.format != expert.format) break;
        Share share = share_of(expert);
        const int64_t each = odd_lines(padded(expert.hidden, PADDED) * 4) + input_bytes(share.down);
        const int64_t room = std::max<int64_t>((SCRATCH_BYTES - bytes) / each, scratch.shares.empty());
        const int64_t take = std::min(left, room), at = call.start(i) + done;
        if (take == 0) break;
        share.rows = call.starts ? call.rows + at : nullptr;
        share.mix = call.mix + at;
        share.load = take;
        share.first = tokens;
        share.items = items;
        scratch.shares.push_back(share);
        items += items_of(share.gate);
        bytes += take * each;
        tokens += take;
        done += take;
        if (take < left) break;
    }
}

// Points every token of the wave's shares at its input, its activations and what they are quantised to.
void place(const Call& call, Scratch& scratch, const char* ready, int64_t step) {
    int64_t act_bytes = 0, record_bytes = 0, tokens = 0;
    for (const Share& share : scratch.shares) {
        act_bytes += share.load * odd_lines(padded(share.down.columns, PADDED) * 4);
        record_bytes += share.down.a8 ? share.load * input_bytes(share.down) : 0;
        tokens += share.load;
    }
    char *act = scratch.acts_at.get(act_bytes), *record = scratch.records_at.get(record_bytes);
    scratch.inputs.resize(tokens);
    scratch.acts.resize(tokens);
    scratch.records.resize(tokens);
    int64_t j = 0;
    for (const Share& share : scratch.shares)
        for (int64_t t = 0; t < share.load; ++t, ++j) {
            scratch.inputs[j] = ready + (share.rows ? share.rows[t] * step : 0);
            scratch.acts[j] = reinterpret_cast<float*>(act);
            scratch.records[j] = share.down.a8 ? record : act;
            act += odd_lines(padded(share.down.columns, PADDED) * 4);
            record += share.down.a8 ? input_bytes(share.down) : 0;
        }
}

void run(const Isa& isa, const Call& call, int64_t threads) {
    Scratch& scratch = own_scratch();
    int64_t held = -1;  // the format for which x lies ready
    for (int64_t i = 0, done = 0; i < call.m;) {
        next_wave(call, scratch, i, done);
        if (scratch.shares.empty()) break;
        const Share *begin = scratch.shares.data(), *end = begin + scratch.shares.size(), &last = end[-1];
        const Matrix& first = begin->gate;
        const bool as_is = is_ready(first, call.N);
        const int64_t step = as_is ? 0 : input_bytes(first);
        char* ready = as_is ? nullptr : scratch.ready.get(call.N * step);
        const Readying readying = {&isa, &first, as_is || held == first.format ? 0 : call.N, call.x, call.D, ready, step};
        if (!as_is) held = first.format;
        place(call, scratch, as_is ? reinterpret_cast<const char*>(call.x) : ready, step);
        int64_t work = 0;
        for (const Share* share = begin; share < end; ++share)
            work += 3 * call.D * share->gate.rows * (READ + share->load);
        const Wave wave = {&isa, call.out, call.D, begin, end, scratch.inputs.data(), scratch.acts.data(), scratch.records.data()};
        const int64_t tokens = scratch.inputs.size();
        Phase phases[4] = {{ready_rows, &readying, readying_items(readying)},
                           {inward, &wave, last.items + items_of(last.gate)},
                           {requantise, &wave, first.a8 ? tokens : 0},
                           {outward, &wave, items_of(last.down)}};
        run_team(phases, 4, std::min(threads, 1 + work / GRAIN));
    }
}

// out = x times a matrix's transpose.
struct Product {
    const Isa* isa;
    const Matrix* matrix;
    int64_t N;
    const void* const* inputs;
    float* out;
};

void product_rows(const void* context, int64_t item) {
    const Product& all = *static_cast<const Product*>(context);
    const Matrix& matrix = *all.matrix;
    const int64_t step = item_rows(matrix), from = item * step, rows = std::min(step, matrix.rows - from);
    alignas(64) float y[TOKENS * PACKED_ROWS];
    const char* here = matrix.data + from * matrix.pitch;
    for (int64_t start = 0; start < all.N; start += TOKENS) {
        const int64_t n = std::min(TOKENS, all.N - start);
        multiply(*all.isa, matrix, from, rows, all.inputs + start, n, y, step,
                 start + n < all.N ? here : here + step * matrix.pitch);
        for (int64_t t = 0; t < n; ++t) std::copy_n(y + t * step, rows, all.out + (start + t) * matrix.rows + from);
    }
}

void run_product(const Isa& isa, const Matrix& matrix, int64_t N, const float* x, float* out, int64_t threads) {
    Scratch& scratch = own_scratch();
    const bool as_is = is_ready(matrix, N);
    const int64_t step = input_bytes(matrix);
    const int64_t most = std::max<int64_t>(1, SCRATCH_BYTES / step);
    for (int64_t start = 0; start < N; start += most) {
        const int64_t n = std::min(most, N - start);
        const float* rows = x + start * matrix.columns;
        char* ready = as_is ? nullptr : scratch.ready.get(n * step);
        const Readying readying = {&isa, &matrix, as_is ? 0 : n, rows, matrix.columns, ready, step};
        scratch.inputs.resize(n);
        for (int64_t t = 0; t < n; ++t) scratch.inputs[t] = as_is ? static_cast<const void*>(rows) : ready + t * step;
        const Product product = {&isa, &matrix, n, scratch.inputs.data(), out + start * matrix.rows};
        Phase phases[2] = {{ready_rows, &readying, readying_items(readying)}, {product_rows, &product, items_of(matrix)}};
        run_team(phases, 2, std::min(threads, 1 + matrix.rows * matrix.columns * (READ + n) / GRAIN));
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

const Isa& isa_number(int64_t isa) { return *ISAS[isa]; }

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

int matrix_run(int64_t isa, int64_t format, int64_t rows, int64_t columns, const void* data, int64_t N, const float* x,
               float* out, int64_t threads) {
    if (!known_format(format)) return 1;
    try {
        run_product(*ISAS[isa], make_matrix(data, format, rows, columns), N, x, out, threads);
    } catch (const std::bad_alloc&) {
        return 3;
    }
    return 0;
}

int64_t matrix_bytes(int64_t format, int64_t rows, int64_t columns) {
    return known_format(format) ? make_matrix(nullptr, format, rows, columns).bytes : -1;
}

const char* experts_isa(int64_t isa) {
    if (isa < 0 || isa >= COUNT) return nullptr;
    return ISAS[isa]->supported() ? ISAS[isa]->name : "";
}

int64_t experts_best_isa() {
    int64_t isa = 0;
    while (!ISAS[isa]->supported()) ++isa;
    return isa;
}

void experts_silu_times(int64_t isa, const float* gate, const float* up, float* out, int64_t count) {
    ISAS[isa]->silu_times(gate, up, out, count);
}

void experts_shutdown() { end_helpers(); }
}
