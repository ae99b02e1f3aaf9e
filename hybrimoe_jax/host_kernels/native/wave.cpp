#include "wave.h"

#include <algorithm>

namespace experts {

// Gate and up: some columns of one share's activations.
void inward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const Share& share = *(std::upper_bound(wave.begin, wave.end, item,
                                            [](int64_t at, const Share& other) { return at < other.items; }) -
                           1);
    const Matrix &gate = share.gate, &up = share.up;
    const int64_t step = item_rows(gate, share.load), from = (item - share.items) * step,
                  rows = std::min(step, gate.rows - from);
    const char *gate_rows = gate.data + from * gate.pitch, *up_rows = up.data + from * gate.pitch;
    alignas(64) float g[TOKENS * MAX_ROWS], u[TOKENS * MAX_ROWS];
    for (int64_t start = 0; start < share.load; start += TOKENS) {
        const int64_t n = std::min(TOKENS, share.load - start);
        const void* const* x = wave.inputs + share.first + start;
        multiply(*wave.isa, gate, from, rows, x, n, g, step, up_rows);
        multiply(*wave.isa, up, from, rows, x, n, u, step,
                 start + n < share.load ? gate_rows : gate_rows + step * gate.pitch);
        for (int64_t t = 0; t < n; ++t) {
            float* act = wave.acts[share.first + start + t];
            wave.isa->silu_times(g + t * step, u + t * step, act + from, rows);
            if (from + rows == gate.rows) std::fill(act + gate.rows, act + padded(gate.rows, PADDED), 0.0f);
        }
    }
}

// One token's activations of one share.
void requantise(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const Share* share = wave.begin;
    while (item >= share->first + share->load) ++share;
    wave.isa->quantised->quantise(share->down, wave.acts[item], wave.records[item]);
}

// Down: some columns of `out`, all shares.
void outward(const void* context, int64_t item) {
    const Wave& wave = *static_cast<const Wave*>(context);
    const int64_t step = wave.down_rows, from = item * step, rows = std::min(step, wave.width - from);
    alignas(64) float y[TOKENS * MAX_ROWS];
    for (const Share* share = wave.begin; share < wave.end; ++share) {
        const Matrix &down = share->down, &after = (share + 1 < wave.end ? share + 1 : share)->down;
        for (int64_t start = 0; start < share->load; start += TOKENS) {
            const int64_t n = std::min(TOKENS, share->load - start);
            multiply(*wave.isa, down, from, rows, wave.records + share->first + start, n, y, step,
                     start + n < share->load ? down.data + from * down.pitch : after.data + from * after.pitch);
            for (int64_t t = 0; t < n; ++t) {
                const int64_t row = share->rows ? share->rows[start + t] : 0;
                const float mix = share->mix[start + t];
                float* to = wave.out + row * wave.width + from;
                for (int64_t d = 0; d < rows; ++d) to[d] += mix * y[t * step + d];
            }
        }
    }
}

}  // namespace experts
