// Products of rows of x with matrices of one format and depth, as two phases: x made ready, then items of rows of
// each matrix.

#include <algorithm>
#include <vector>

#include "rows.h"
#include "run.h"
#include "team.h"

namespace experts {
namespace {

// outs[i] = x times the transpose of matrices[i], N rows of all the tokens.
struct Product {
    const Isa* isa;
    const Matrix* matrices;
    int64_t count, N;
    const void* const* inputs;
    float* const* outs;
    int64_t first;  // of the N rows among those of outs
};

void product_rows(const void* context, int64_t item) {
    const Product& all = *static_cast<const Product*>(context);
    int64_t i = 0;
    for (int64_t items; item >= (items = items_of(all.matrices[i], all.N)); ++i) item -= items;
    const Matrix& matrix = all.matrices[i];
    const int64_t step = item_rows(matrix, all.N), from = item * step, rows = std::min(step, matrix.rows - from);
    float* out = all.outs[i] + all.first * matrix.rows + from;
    alignas(64) float y[TOKENS * MAX_ROWS];
    const char* here = matrix.data + from * matrix.pitch;
    for (int64_t start = 0; start < all.N; start += TOKENS) {
        const int64_t n = std::min(TOKENS, all.N - start);
        multiply(*all.isa, matrix, from, rows, all.inputs + start, n, y, step,
                 start + n < all.N ? here : here + step * matrix.pitch);
        for (int64_t t = 0; t < n; ++t) std::copy_n(y + t * step, rows, out + (start + t) * matrix.rows);
    }
}

}  // namespace

void run_products(const Isa& isa, int64_t count, const Matrix* matrices, int64_t N, const float* x, float* const* outs,
                  int64_t threads) {
    static thread_local Bytes held;
    static thread_local std::vector<const void*> inputs;
    const Matrix& any = matrices[0];
    const bool as_is = is_ready(any, N);
    const int64_t step = input_bytes(any);
    const int64_t most = std::max<int64_t>(1, SCRATCH_BYTES / step);
    int64_t weights = 0;
    for (int64_t i = 0; i < count; ++i) weights += matrices[i].rows * matrices[i].columns;
    for (int64_t start = 0; start < N; start += most) {
        const int64_t n = std::min(most, N - start);
        const float* rows = x + start * any.columns;
        char* ready = as_is ? nullptr : held.get(n * step);
        const Readying readying = {&isa, &any, as_is ? 0 : n, rows, any.columns, ready, step};
        inputs.resize(n);
        for (int64_t t = 0; t < n; ++t) inputs[t] = as_is ? static_cast<const void*>(rows) : ready + t * step;
        const Product product = {&isa, matrices, count, n, inputs.data(), outs, start};
        int64_t items = 0;
        for (int64_t i = 0; i < count; ++i) items += items_of(matrices[i], n);
        Phase phases[2] = {{ready_rows, &readying, readying_items(readying)}, {product_rows, &product, items}};
        run_team(phases, 2, std::min(threads, 1 + weights * (READ + n) / GRAIN));
    }
}

}  // namespace experts
