#include "rows.h"

#include <algorithm>

namespace experts {
namespace {

constexpr int64_t READIED = 16;  // rows of x in an item

// Rows an odd number of cache lines apart. At a power of two, as widths usually are, the rows of a tile would evict
// each other from the first-level cache (measured at width 1024, load 128: 70 instead of 80 GFLOP/s).
int64_t odd_lines(int64_t bytes) { return ((bytes + LINE - 1) / LINE | 1) * LINE; }

void ready_row(const Isa& isa, const Matrix& matrix, const float* x, char* to) {
    if (matrix.a8) return isa.quantised->quantise(matrix, x, to);
    float* row = reinterpret_cast<float*>(to);
    std::fill(std::copy_n(x, matrix.columns, row), row + padded(matrix.columns, PADDED), 0.0f);
}

}  // namespace

int64_t item_rows(const Matrix& matrix, int64_t n) { return matrix.packed() || n > FEW_TOKENS ? MAX_ROWS : FEW_ROWS; }
int64_t items_of(const Matrix& matrix, int64_t n) {
    return (matrix.rows + item_rows(matrix, n) - 1) / item_rows(matrix, n);
}

int64_t float_bytes(int64_t columns) { return odd_lines(padded(columns, PADDED) * 4); }
int64_t input_bytes(const Matrix& matrix) {
    return matrix.a8 ? odd_lines(record_bytes(matrix)) : float_bytes(matrix.columns);
}

void multiply(const Isa& isa, const Matrix& matrix, int64_t from, int64_t rows, const void* const* x, int64_t n,
              float* c, int64_t stride, const void* next) {
    if (!matrix.packed())
        isa.product[matrix.format](matrix.data + from * matrix.pitch, rows, matrix.depth, x, n, c, stride, next);
    else if (!matrix.a8)
        isa.packed[matrix.kind](matrix, from, rows, x, n, c, stride);
    else
        (n <= few_of(matrix.kind) ? isa.few : isa.quantised)->product[matrix.kind](matrix, from, rows, x, n, c, stride);
}

void ready_rows(const void* context, int64_t item) {
    const Readying& all = *static_cast<const Readying*>(context);
    for (int64_t row = item * READIED; row < std::min(all.count, (item + 1) * READIED); ++row)
        ready_row(*all.isa, *all.matrix, all.x + row * all.stride, all.to + row * all.step);
}

int64_t readying_items(const Readying& all) { return (all.count + READIED - 1) / READIED; }

bool is_ready(const Matrix& matrix, int64_t count) {
    return count == 1 && !matrix.a8 && (!matrix.packed() || matrix.columns == matrix.depth);
}

}  // namespace experts
