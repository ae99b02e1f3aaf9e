// Decode attention: one token a row against its cache, written and read in place.
//
// XLA's CPU backend copies the part of a cache that it reads, for each product, and hands the products to a pool: of
// a step of a 466 M model in int4 on two cores those were 0.9 of 2.6 ms, against some 0.1 here.
//
// An item is a few query heads of one row: whatever they share of the cache is read once for them. A head's numbers
// do not depend on the others, so neither on `threads`.

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "team.h"

namespace experts {
namespace {

constexpr int64_t TOGETHER = 4;        // heads that share a latent cache in an item
constexpr int64_t GRAIN = 256 << 10;   // bytes read for each thread: some 10 us
constexpr int64_t ALIGNED = 16;        // floats

int64_t rounded(int64_t count) { return (count + ALIGNED - 1) / ALIGNED * ALIGNED; }

float* scratch(int64_t floats) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < floats) kept.resize(floats);
    return kept.data();
}

// logits[t * pitch + r] = the dot product of rows[r] and query t.
void score(const Isa& isa, const float* rows, int64_t depth, int64_t count, const void* const* queries, int64_t n,
           float* logits, int64_t pitch) {
    for (int64_t r = 0; r < count; r += MAX_ROWS) {
        const int64_t some = std::min(MAX_ROWS, count - r);
        isa.product[F32](rows + r * depth, some, depth, queries, n, logits + r, pitch, rows + (r + some) * depth);
    }
}

struct Span {
    int64_t first, count;
};

// The places of the cache that a token at `position` sees. Padding lies past the cache, and sees something all the
// same: what it makes of it is not used.
Span seen(int32_t position, int64_t span, int64_t window) {
    const int64_t last = std::min<int64_t>(position, span - 1),
                  first = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
    return {std::min(first, last), last - std::min(first, last) + 1};
}

// What an item may throw must not leave it: the team's other threads are still at work on what the caller's frame
// holds.
template <class Context, void (*attend)(const Context&, int64_t)>
void guarded(const void* context, int64_t item) {
    const Context& all = *static_cast<const Context*>(context);
    try {
        attend(all, item);
    } catch (const std::bad_alloc&) {
        all.failed->store(true);
    }
}

struct Grouped {
    const Isa* isa;
    const GroupedAttention* call;
    std::atomic<bool>* failed;
};

void attend_group(const Grouped& all, int64_t item) {
    const Isa& isa = *all.isa;
    const GroupedAttention& a = *all.call;
    const int64_t row = item / a.kv_heads, group = a.heads / a.kv_heads, width = a.width;
    float *keys = a.keys + item * a.places * width, *values = a.values + item * a.places * width;
    const int32_t position = a.positions[row];
    if (position < a.places) {
        std::copy_n(a.k + item * width, width, keys + position * width);
        std::copy_n(a.v + item * width, width, values + position * width);
    }
    const Span places = seen(position, a.span, a.window);
    const int64_t pitch = rounded(places.count);
    float* logits = scratch(group * pitch);
    static thread_local std::vector<const void*> queries;
    queries.resize(group);
    for (int64_t g = 0; g < group; ++g) queries[g] = a.q + (item * group + g) * width;
    score(isa, keys + places.first * width, width, places.count, queries.data(), group, logits, pitch);
    float* out = a.out + item * group * width;
    for (int64_t g = 0; g < group; ++g) {
        float* own = logits + g * pitch;
        const float share = 1 / isa.exponents(own, places.count, a.scale);
        for (int64_t i = 0; i < places.count; ++i) own[i] *= share;
    }
    isa.mix_rows[F32](values + places.first * width, width, places.count, width, logits, pitch, group, out, width);
}

struct Latent {
    const Isa* isa;
    const LatentAttention* call;
    int64_t together, groups;
    std::atomic<bool>* failed;
};

// to [latent, padded where packed] = the transpose of a head's key rows times q [plain]
void absorb(const Isa& isa, const LatentAttention& a, int64_t head, const float* q, float* to) {
    const int64_t from = head * (a.plain + a.value);
    if (a.up.packed()) return isa.mix_packed[a.up.kind](a.up, from, a.plain, q, to);
    isa.mix_rows[a.up.format](a.up.data + from * a.up.pitch, a.latent, a.plain, a.latent, q, a.plain, 1, to, a.latent);
}

// out [value] = a head's value rows times x [latent, padded with zeros]; `whole` has room for the rows of whole
// vectors.
void expand(const Isa& isa, const LatentAttention& a, int64_t head, const void* x, float* whole, float* out) {
    const int64_t from = head * (a.plain + a.value) + a.plain;
    if (a.up.packed()) {
        isa.packed[a.up.kind](a.up, from, a.value, &x, 1, whole, a.value);
        std::copy_n(whole, a.value, out);
        return;
    }
    const char* weights = a.up.data + from * a.up.pitch;
    for (int64_t r = 0; r < a.value; r += MAX_ROWS) {
        const int64_t some = std::min(MAX_ROWS, a.value - r);
        isa.product[a.up.format](weights + r * a.up.pitch, some, a.latent, &x, 1, out + r, a.value,
                                 weights + (r + some) * a.up.pitch);
    }
}

void attend_heads(const Latent& all, int64_t item) {
    const Isa& isa = *all.isa;
    const LatentAttention& a = *all.call;
    const int64_t row = item / all.groups, head = item % all.groups * all.together,
                  n = std::min(all.together, a.heads - head);
    const float *latents = a.latents + row * a.places * a.latent, *ropes = a.ropes + row * a.places * a.rotary;
    const Span places = seen(a.positions[row], a.span, 0);
    const int64_t pitch = rounded(places.count), deep = padded(a.latent, PADDED);
    float* logits = scratch(2 * n * pitch + n * deep + rounded(a.value));
    // Of n heads: rotary logits, and vectors as long as a latent.
    float *turned = logits + n * pitch, *vectors = turned + n * pitch;
    float* made = vectors + n * deep;
    const void *queries[TOGETHER], *rotary[TOGETHER];
    for (int64_t i = 0; i < n; ++i) {
        const int64_t at = row * a.heads + head + i;
        absorb(isa, a, head + i, a.q + at * a.plain, vectors + i * deep);
        queries[i] = vectors + i * deep;
        rotary[i] = a.q_rope + at * a.rotary;
    }
    score(isa, latents, a.latent, places.count, queries, n, logits, pitch);
    score(isa, ropes, a.rotary, places.count, rotary, n, turned, pitch);
    for (int64_t i = 0; i < n; ++i) {
        float* own = logits + i * pitch;
        for (int64_t j = 0; j < places.count; ++j) own[j] += turned[i * pitch + j];
        const float share = 1 / isa.exponents(own, places.count, a.scale);
        for (int64_t j = 0; j < places.count; ++j) own[j] *= share;
    }
    isa.mix_rows[F32](latents, a.latent, places.count, a.latent, logits, pitch, n, vectors, deep);
    for (int64_t i = 0; i < n; ++i) {
        std::fill(vectors + i * deep + a.latent, vectors + (i + 1) * deep, 0.0f);
        expand(isa, a, head + i, vectors + i * deep, made, a.out + (row * a.heads + head + i) * a.value);
    }
}

int64_t team(int64_t bytes, int64_t threads) { return std::max<int64_t>(1, std::min(threads, 1 + bytes / GRAIN)); }

}  // namespace

int attend_grouped(int64_t isa, const GroupedAttention& call, int64_t threads) {
    std::atomic<bool> failed{false};
    const Grouped grouped = {&isa_number(isa), &call, &failed};
    const int64_t items = call.rows * call.kv_heads;
    Phase phase = {guarded<Grouped, attend_group>, &grouped, items};
    run_team(&phase, 1, team(items * call.span * call.width * 8, threads));
    return failed ? 3 : 0;
}

int attend_latent(int64_t isa, const LatentAttention& call, int64_t threads) {
    for (int64_t row = 0; row < call.rows; ++row) {
        const int32_t position = call.positions[row];
        if (position >= call.places) continue;
        const int64_t at = row * call.places + position;
        std::copy_n(call.new_latent + row * call.latent, call.latent, call.latents + at * call.latent);
        std::copy_n(call.new_rope + row * call.rotary, call.rotary, call.ropes + at * call.rotary);
    }
    std::atomic<bool> failed{false};
    const int64_t shared = call.heads * call.rows / std::max<int64_t>(1, threads);
    const int64_t together = std::min(TOGETHER, std::max<int64_t>(1, shared)),
                  groups = (call.heads + together - 1) / together;
    const Latent latent = {&isa_number(isa), &call, together, groups, &failed};
    Phase phase = {guarded<Latent, attend_heads>, &latent, call.rows * groups};
    run_team(&phase, 1, team(call.rows * (call.up.bytes + call.span * (call.latent + call.rotary) * 4), threads));
    return failed ? 3 : 0;
}

}  // namespace experts
