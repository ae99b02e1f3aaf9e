// A product of rows of x with one matrix, as two phases: x made ready, then items of rows of the matrix.

#include <algorithm>
#include <vector>

#include "rows.h"
#include "run.h"
#include "team.h"

namespace experts {
namespace {

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
    const int64_t step = item_rows(matrix, all.N), from = item * step, rows = std::min(step, matrix.rows - from);
    alignas(64) float y[TOKENS * MAX_ROWS];
    const char* here = matrix.data + from * matrix.pitch;
    for (int64_t start = 0; start < all.N; start += TOKENS) {
        const int64_t n = std::min(TOKENS, all.N - start);
        multiply(*all.isa, matrix, from, rows, all.inputs + start, n, y, step,
                 start + n < all.N ? here : here + step * matrix.pitch);
        for (int64_t t = 0; t < n; ++t) std::copy_n(y + t * step, rows, all.out + (start + t) * matrix.rows + from);
    }
}

}  // namespace

void run_product(const Isa& isa, const Matrix& matrix, int64_t N, const float* x, float* out, int64_t threads) {
    static thread_local Bytes held;
    static thread_local std::vector<const void*> inputs;
    const bool as_is = is_ready(matrix, N);
    const int64_t step = input_bytes(matrix);
    const int64_t most = std::max<int64_t>(1, SCRATCH_BYTES / step);
    for (int64_t start = 0; start < N; start += most) {
        const int64_t n = std::min(most, N - start);
        const float* rows = x + start * matrix.columns;
        char* ready = as_is ? nullptr : held.get(n * step);
        const Readying readying = {&isa, &matrix, as_is ? 0 : n, rows, matrix.columns, ready, step};
        inputs.resize(n);
        for (int64_t t = 0; t < n; ++t) inputs[t] = as_is ? static_cast<const void*>(rows) : ready + t * step;
        const Product product = {&isa, &matrix, n, inputs.data(), out + start * matrix.rows};
        Phase phases[2] = {{ready_rows, &readying, readying_items(readying)}, {product_rows, &product, items_of(matrix, n)}};
        run_team(phases, 2, std::min(threads, 1 + matrix.rows * matrix.columns * (READ + n) / GRAIN));
    }
}

}  // namespace experts
