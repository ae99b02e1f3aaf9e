// Host expert kernels in C++: the C interface, and what its parts share.
//
// Shapes: N rows of x, n load of one expert, D model width, F expert width, m experts.
// An expert is down(silu(gate x) * (up x)); gate and up are [F, D], down is [D, F]. Formats and layouts: layout.h.
#pragma once

#include <cstdint>

#include "layout.h"

namespace experts {

// One expert's record: what a handle of the Python side points at (NativeKernel.prepare writes the same five fields).
struct Expert {
    const void* data;  // plain: gate and up [2F, D], gate rows first; packed: gate, up and down
    const void* down;  // plain
    int64_t width;     // D
    int64_t hidden;    // F
    int64_t format;
};

// At most so many tokens are quicker with Isa::few, which reads one stream where `quantised` may read two, but
// computes less at a time (AVX-512 with VNNI: int8 0.71 instead of 0.75 of the bandwidth at 3 tokens, 0.76 and 0.82
// at 4; int4 0.80 instead of 0.73 at 2).
EVERYWHERE int64_t few_of(Kind kind) { return kind == INT8 ? 3 : 1; }
constexpr int64_t FEW_TOKENS = 6;  // at most: plain weights are read once, by one tile
constexpr int64_t MAX_ROWS = 64;   // of weights that a product takes at once

// c[t * stride + r] for `rows` rows from row `from` on (a multiple of 8) and n tokens, each a row of floats, padded
// with zeros to the matrix's depth, or a record; as many columns of c as the rows' panels have are written.
using PackedProduct = void (*)(const Matrix&, int64_t from, int64_t rows, const void* const* x, int64_t n, float* c,
                               int64_t stride);

// The arithmetic on packed weights with quantised activations.
struct Quantised {
    // Writes x, `columns` of the matrix, as the record that `product` of the matrix's format takes.
    void (*quantise)(const Matrix&, const float* x, void* record);
    PackedProduct product[KINDS];
};

// The code of one instruction set.
struct Isa {
    const char* name;
    bool (*supported)();
    // c[t * stride + r] = sum over k of weights[r, k] * x[t][k], for `rows` <= MAX_ROWS rows of `depth` weights and n
    // tokens. `next`: the weights that will be wanted next, as many; they may be prefetched meanwhile (any address
    // will do).
    void (*product[PLAIN])(const void* weights, int64_t rows, int64_t depth, const void* const* x, int64_t n, float* c,
                           int64_t stride, const void* next);
    // out[i] = silu(gate[i]) * up[i]
    void (*silu_times)(const float* gate, const float* up, float* out, int64_t count);
    PackedProduct packed[KINDS];  // with float activations
    const Quantised* quantised;
    const Quantised* few;  // the same for few_of(kind) tokens
    // For the probes below: a sum of floats, and a number of multiply-adds, which is returned.
    float (*read_all)(const float* data, int64_t count, bool several);
    int64_t (*multiply_adds)(int64_t rounds, float* result);
    // For attention: c[t * stride + k] = sum over r of p[t * pitch + r] * weights[r * row + k] for n tokens and
    // `width` columns; the same for one token and `rows` packed rows from `from` on, multiples of 8, and all columns,
    // padding too; and x[i] = exp(scale * (x[i] - the greatest x)), of which it returns the sum.
    void (*mix_rows[PLAIN])(const void* weights, int64_t row, int64_t rows, int64_t width, const float* p,
                            int64_t pitch, int64_t n, float* c, int64_t stride);
    void (*mix_packed[KINDS])(const Matrix&, int64_t from, int64_t rows, const float* p, float* c);
    float (*exponents)(float* x, int64_t count, float scale);
};

extern const Isa avx512vnni, avx512, avxvnni, avx2, portable;
extern const Quantised quantised_avx2, quantised_avx512vl;

const Isa& isa_number(int64_t isa);

}  // namespace experts

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Adds every expert's weighted output to out [N, D].
//   isa      an index of experts_isa
//   records  m pointers to records, all of x's width
//   starts   [m + 1]: expert i computes rows[starts[i] .. starts[i + 1]], weighted by mix at the same places
//   threads  the calling thread included; fewer work where there is little to do
// Safe from several threads at once. The result does not depend on `threads`.
// Returns 0; 1 for records that do not fit x; 2 for a row outside x; 3 where memory for scratch is short.
EXPORTED int experts_run(int64_t isa, int64_t m, const experts::Expert* const* records, int64_t N, int64_t D,
                         const float* x, const int64_t* starts, const int64_t* rows, const float* mix, float* out,
                         int64_t threads);

// One token, each expert weighted by mix[i]: experts_run without row lists.
EXPORTED int experts_run_one(int64_t isa, int64_t m, const experts::Expert* const* records, int64_t D, const float* x,
                             const float* mix, float* out, int64_t threads);

// out [N, rows] = x [N, columns] times the transpose of a matrix [rows, columns] of any format. Returns as experts_run.
EXPORTED int matrix_run(int64_t isa, int64_t format, int64_t rows, int64_t columns, const void* data, int64_t N,
                        const float* x, float* out, int64_t threads);

// The same for `count` matrices of one format and number of columns, in one run: outs[i] [N, rows[i]].
EXPORTED int matrices_run(int64_t isa, int64_t format, int64_t count, const int64_t* rows, int64_t columns,
                          const void* const* data, int64_t N, const float* x, float* const* outs, int64_t threads);

// The bytes of a matrix, or -1 for a format that is none.
EXPORTED int64_t matrix_bytes(int64_t format, int64_t rows, int64_t columns);

// A router's decision in one call: out [N, D] = for each token the sum of its k experts, ids and mix [N, k], looked
// up in table [E]. Returns what experts_run does, 2 also for an id that the table does not hold.
EXPORTED int experts_run_routed(int64_t isa, int64_t E, const experts::Expert* const* table, int64_t N, int64_t D,
                                int64_t k, const float* x, const int32_t* ids, const float* mix, float* out,
                                int64_t threads);

// The name of instruction set `isa` (best first), "" where this processor lacks it, or null past the last.
EXPORTED const char* experts_isa(int64_t isa);

// The index of the best one.
EXPORTED int64_t experts_best_isa();

EXPORTED void experts_silu_times(int64_t isa, const float* gate, const float* up, float* out, int64_t count);

// What the machine can do at most: reads `bytes` of memory on `threads` threads; returns how many it read. Makes
// about `count` floating-point operations in registers on each thread; returns how many in all.
EXPORTED int64_t probe_read(int64_t isa, const void* data, int64_t bytes, int64_t threads, int64_t several);
EXPORTED int64_t probe_arithmetic(int64_t isa, int64_t count, int64_t threads);

// Ends and joins the helper threads; the next call starts new ones. No call may be under way.
EXPORTED void experts_shutdown();
}
