// What a run of experts and a matrix product share: items of rows of weights, rows of activations made ready for
// them, and memory between the phases.
#pragma once

#include <vector>

#include "experts.h"

namespace experts {

// Of plain weights in an item, where a few tokens read each once, in one tile: two cache lines of output.
constexpr int64_t FEW_ROWS = 32;
constexpr int64_t TOKENS = 128;   // between looks at the same rows, which stay in the second-level cache
constexpr int64_t SCRATCH_BYTES = 16 << 20;
// A thread more for every so many multiply-adds, where a weight read counts as READ of them: some 20 us of one core
// (measured: waking a helper costs 5 to 50 us).
#if !defined(EXPERTS_GRAIN)
#define EXPERTS_GRAIN (1 << 20)
#endif
constexpr int64_t GRAIN = EXPERTS_GRAIN, READ = 8;

// Rows of an item, and how many there are, for n tokens.
int64_t item_rows(const Matrix& matrix, int64_t n);
int64_t items_of(const Matrix& matrix, int64_t n);

// Bytes to a row of floats of activations, and to one as the products with `matrix` take it.
int64_t float_bytes(int64_t columns);
int64_t input_bytes(const Matrix& matrix);

// c[t * stride + r] for `rows` rows of any matrix; `next`: plain weights that will be wanted next.
void multiply(const Isa& isa, const Matrix& matrix, int64_t from, int64_t rows, const void* const* x, int64_t n,
              float* c, int64_t stride, const void* next);

// Rows of floats made ready to be multiplied with `matrix`: count of them, stride floats apart, to `to`, step bytes
// apart.
struct Readying {
    const Isa* isa;
    const Matrix* matrix;
    int64_t count;
    const float* x;
    int64_t stride;
    char* to;
    int64_t step;
};
void ready_rows(const void* readying, int64_t item);
int64_t readying_items(const Readying& all);

// Whether products can read x where it lies.
bool is_ready(const Matrix& matrix, int64_t count);

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

}  // namespace experts
