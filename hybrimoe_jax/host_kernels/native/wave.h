// The phases of a run of experts: x made ready, gate and up, the activations quantised where the format says so, down.
#pragma once

#include "rows.h"

namespace experts {

// One expert with some of its tokens; token j is row rows[j] of x (all one token: rows is null).
struct Share {
    Matrix gate, up, down;
    const int64_t* rows;
    const float* mix;
    int64_t load;
    int64_t first;  // of its rows among the wave's pointers
    int64_t items;  // of the wave's first phase, before this one's
};

// Shares of one format that go through the phases together.
struct Wave {
    const Isa* isa;
    float* out;
    int64_t width;
    int64_t down_rows;  // of an item of the last phase
    const Share *begin, *end;
    const void* const* inputs;  // per share and token, its row of x made ready
    float* const* acts;         // the same, [F] of activations
    void* const* records;       // the same, quantised where the format says so, else the activations
};

// Items of the phases after x is ready; contexts are waves.
void inward(const void* wave, int64_t item);      // of every share, its rows of gate and up
void requantise(const void* wave, int64_t item);  // a token of a share
void outward(const void* wave, int64_t item);     // rows of down

}  // namespace experts
