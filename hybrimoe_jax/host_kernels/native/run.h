// A run of experts, and a matrix product: what the C interface calls once its arguments are checked. Both may throw
// std::bad_alloc.
#pragma once

#include "experts.h"

namespace experts {

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

void run(const Isa& isa, const Call& call, int64_t threads);

// outs[i] [N, rows] = x [N, columns] times the transpose of matrices[i], all of one format and number of columns.
void run_products(const Isa& isa, int64_t count, const Matrix* matrices, int64_t N, const float* x, float* const* outs,
                  int64_t threads);

}  // namespace experts
