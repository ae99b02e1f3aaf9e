// Where a matrix's bytes lie: the rules of layout.py, which documents them, in C++.
//
// A format is one integer: 0 float32, 1 bfloat16 (row-major), or a packed one, PACKED + the mixed-radix number of its
// parts (group, activations, scales, codes), which library.py writes the same way.
#pragma once

#include <cstdint>

namespace experts {

enum Plain : int64_t { F32 = 0, BF16 = 1, PLAIN = 2 };
enum Kind : int64_t { INT8 = 0, INT4 = 1, INT4Z = 2, KINDS = 3 };

constexpr int64_t PACKED = 16, FORMATS = PACKED + 3 * 2 * 2 * KINDS;
constexpr int64_t PANEL = 8;    // rows of packed weights that lie together
constexpr int64_t PADDED = 32;  // inputs
constexpr int64_t LINE = 64;    // bytes of a cache line, of which every part begins at a multiple

// Inlined always: files compiled for other instruction sets must leave no copy that the linker could choose for all.
#define EVERYWHERE inline __attribute__((always_inline))

EVERYWHERE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A weight matrix [rows, columns] of any format.
struct Matrix {
    const char* data;
    int64_t format, rows, columns;
    int64_t bytes;
    int64_t pitch;  // bytes of a row; of a panel's codes where packed
    int64_t depth;  // columns, padded where packed
    // packed:
    Kind kind;
    bool wide;      // scales are float32, not float16
    bool a8;        // activations are int8
    int64_t group;  // inputs
    int64_t groups;
    int64_t scales_at, zeros_at;
    int64_t scale_pitch, zero_pitch;  // bytes of a panel's

    EVERYWHERE bool packed() const { return format >= PACKED; }
};

bool known_format(int64_t format);
Matrix make_matrix(const void* data, int64_t format, int64_t rows, int64_t columns);

// One token's quantised activations are a record: codes [depth] int8, scales [groups] float32, biases [groups] int32.
// A bias is what a group's integer dot product begins with, see packed.inc.
EVERYWHERE int64_t record_bytes(const Matrix& matrix) { return matrix.depth + 8 * matrix.groups; }

}  // namespace experts
