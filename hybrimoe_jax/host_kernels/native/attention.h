// Attention of one token a row against a cache, which the token's own entry is written into first. All arrays are
// contiguous.
#pragma once

#include "experts.h"

namespace experts {

// Grouped-query attention. H query heads of `width`, K = kv_heads; `places` the cache's size, of which no position at
// or past `span` is read. A position at or past `places` is padding's: nothing is written, and what comes out is no
// one's.
struct GroupedAttention {
    int64_t rows, heads, kv_heads, width, places, span, window;  // window 0: none
    float scale;
    const float *q, *k, *v;   // [rows, H, width], [rows, K, width]
    const int32_t* positions;  // [rows]
    float *keys, *values;      // [rows, K, places, width]
    float* out;                // [rows, H, width]
};

// Multi-head latent attention with the up-projections absorbed (models/deepseek_v2.py). `up` is a matrix [H * (plain
// + value), latent], a head's key rows first; packed ones take float activations here, and `plain` and `value` are
// multiples of 8.
struct LatentAttention {
    int64_t rows, heads, plain, rotary, latent, value, places, span;
    float scale;
    const float *q, *q_rope;             // [rows, H, plain], [rows, H, rotary]
    const float *new_latent, *new_rope;  // [rows, latent], [rows, rotary]
    Matrix up;
    const int32_t* positions;
    float *latents, *ropes;  // [rows, places, latent], [rows, places, rotary]
    float* out;              // [rows, H, value]
};

// Both return 0, or 3 where memory for scratch is short.
int attend_grouped(int64_t isa, const GroupedAttention& call, int64_t threads);
int attend_latent(int64_t isa, const LatentAttention& call, int64_t threads);

}  // namespace experts
