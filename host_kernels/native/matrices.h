// Products of one activation with several matrices in one call of the team: x W^T for each. Shapes: N rows of x, K inputs, R outputs.
#pragma once

#include "experts.h"

namespace experts {

// One product: out [N, rows] = x [N, K] times data [rows, K] transposed.
struct Product {
    const void* data;
    int64_t rows;
    float* out;
    int64_t format;
};

// Computes all of them on up to `threads` threads. Throws std::bad_alloc where memory for scratch is short.
void run_products(const Isa& isa, const Product* products, int64_t count, int64_t N, int64_t K, const float* x, int64_t threads);

}  // namespace experts
