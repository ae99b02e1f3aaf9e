// A router's whole decision as one run: every token's experts, looked up by id in a layer's table of records.

#include <algorithm>
#include <new>
#include <vector>

#include "experts.h"

namespace {

// The tokens of each expert that has any, in the order of their rows.
struct Groups {
    std::vector<int64_t> starts, rows, place;
    std::vector<float> mix;
    std::vector<const experts::Expert*> records;
};

}  // namespace

extern "C" int experts_run_routed(int64_t isa, int64_t E, const experts::Expert* const* table, int64_t N, int64_t D,
                                  int64_t k, const float* x, const int32_t* ids, const float* mix, float* out,
                                  int64_t threads) {
    static thread_local Groups groups;
    for (int64_t i = 0; i < N * k; ++i)
        if (ids[i] < 0 || ids[i] >= E || table[ids[i]] == nullptr) return 2;
    std::fill_n(out, N * D, 0.0f);
    try {
        auto& [starts, rows, place, weights, records] = groups;
        records.clear();
        if (N == 1) {
            for (int64_t i = 0; i < k; ++i) records.push_back(table[ids[i]]);
            return experts_run_one(isa, k, records.data(), D, x, mix, out, threads);
        }
        place.assign(E + 1, 0);
        for (int64_t i = 0; i < N * k; ++i) ++place[ids[i] + 1];
        starts.assign(1, 0);
        for (int64_t e = 0; e < E; ++e) {
            if (place[e + 1]) {
                records.push_back(table[e]);
                starts.push_back(starts.back() + place[e + 1]);
            }
            place[e + 1] += place[e];
        }
        rows.resize(N * k);
        weights.resize(N * k);
        for (int64_t i = 0; i < N * k; ++i) {
            const int64_t at = place[ids[i]]++;
            rows[at] = i / k;
            weights[at] = mix[i];
        }
        return experts_run(isa, records.size(), records.data(), N, D, x, starts.data(), rows.data(), weights.data(),
                           out, threads);
    } catch (const std::bad_alloc&) {
        return 3;
    }
}
