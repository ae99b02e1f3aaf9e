// Several matrices times one activation, as items of panels of rows: query, key and value projections (or gate and up) wake the
// helpers once. An item owns its columns of one result, so nothing depends on which thread takes what.

#include "matrices.h"

#include <algorithm>
#include <vector>

#include "team.h"

namespace experts {
namespace {

constexpr int64_t PANEL = MAX_ROWS;
constexpr int64_t TOKENS = 96;          // tokens between looks at the same panel, as in experts.cpp
constexpr int64_t LINE = 16;            // floats of a cache line
constexpr int64_t COPIED = 16;          // rows of x in an item
constexpr int64_t GRAIN = 1 << 19, READ = 8;  // a thread more for every so many multiply-adds; a weight read counts as READ of them

struct Run {
    const Isa* isa;
    const Product *begin, *end;
    const int64_t* items;  // before each product's first, and all of them
    int64_t N, K, stride;
    const float* x;
    float* copy;
    const float* const* inputs;
};

int64_t panels(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

void copy(const void* context, int64_t item) {
    const Run& run = *static_cast<const Run*>(context);
    for (int64_t row = item * COPIED; row < std::min(run.N, (item + 1) * COPIED); ++row)
        std::copy_n(run.x + row * run.K, run.K, run.copy + row * run.stride);
}

void multiply(const void* context, int64_t item) {
    const Run& run = *static_cast<const Run*>(context);
    const int64_t count = run.end - run.begin;
    const int64_t at = std::upper_bound(run.items, run.items + count, item) - run.items - 1;
    const Product& product = run.begin[at];
    const int64_t from = (item - run.items[at]) * PANEL, rows = std::min(PANEL, product.rows - from);
    const int64_t row_bytes = run.K * (product.format == F32 ? 4 : 2);
    const char* panel = static_cast<const char*>(product.data) + from * row_bytes;
    for (int64_t start = 0; start < run.N; start += TOKENS) {
        const int64_t n = std::min(TOKENS, run.N - start);
        const char* next = start + n < run.N ? panel : panel + PANEL * row_bytes;
        run.isa->product[product.format](panel, rows, run.K, run.inputs + start, n, product.out + start * product.rows + from,
                                         product.rows, next);
    }
}

}  // namespace

void run_products(const Isa& isa, const Product* products, int64_t count, int64_t N, int64_t K, const float* x, int64_t threads) {
    static thread_local std::vector<int64_t> items;
    static thread_local std::vector<const float*> inputs;
    static thread_local std::vector<float> scratch;
    const bool copied = N > 1;
    const int64_t stride = copied ? ((K + LINE - 1) / LINE | 1) * LINE : K;  // see experts.cpp: rows must not evict each other
    if (copied && static_cast<int64_t>(scratch.size()) < N * stride + LINE) scratch.resize(N * stride + LINE);
    float* own = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~static_cast<uintptr_t>(63));
    inputs.clear();
    for (int64_t row = 0; row < N; ++row) inputs.push_back((copied ? own : x) + row * stride);
    items.assign(1, 0);
    int64_t work = 0;
    for (const Product* product = products; product < products + count; ++product) {
        items.push_back(items.back() + panels(product->rows));
        work += product->rows * K * (READ + N);
    }
    const Run run = {&isa, products, products + count, items.data(), N, K, stride, x, own, inputs.data()};
    Phase phases[2] = {{copy, &run, copied ? (N + COPIED - 1) / COPIED : 0}, {multiply, &run, items.back()}};
    run_team(phases, 2, std::min(threads, 1 + work / GRAIN));
}

}  // namespace experts
