// Stands alone, to be built with sanitizers: every instruction set here against a plain double-precision loop, on odd
// shapes and both formats, from several threads at once. Exits 0 if all agree.
#include "experts.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

using experts::Expert;

static uint16_t to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);  // cut off: what matters is that both sides see the same value
}

static float from_bf16(uint16_t h) {
    uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

struct Random {
    std::mt19937 engine;
    float real() { return std::normal_distribution<float>()(engine); }
    int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
};

static bool one_case(int64_t isa, Random& random, bool bf16) {
    const int64_t D = 1 + random.below(90), F = 1 + random.below(70), N = 1 + random.below(40), m = 1 + random.below(4);
    std::vector<std::vector<float>> gate_up(m), down(m);
    std::vector<std::vector<uint16_t>> short_gate_up(m), short_down(m);
    std::vector<Expert> experts(m);
    std::vector<const Expert*> records;
    for (int64_t i = 0; i < m; ++i) {
        auto fill = [&](std::vector<float>& to, std::vector<uint16_t>& halves, int64_t size) {
            for (int64_t j = 0; j < size; ++j) {
                to.push_back(random.real() * 0.3f);
                halves.push_back(to_bf16(to.back()));
                if (bf16) to.back() = from_bf16(halves.back());
            }
        };
        fill(gate_up[i], short_gate_up[i], 2 * F * D);
        fill(down[i], short_down[i], D * F);
        if (bf16) experts[i] = {short_gate_up[i].data(), short_down[i].data(), D, F, experts::BF16};
        else experts[i] = {gate_up[i].data(), down[i].data(), D, F, experts::F32};
        records.push_back(&experts[i]);
    }
    std::vector<float> x(N * D), out(N * D, 1.0f), mix;
    for (float& value : x) value = random.real();
    std::vector<int64_t> starts{0}, rows;
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t row = 0; row < N; ++row)
            if (random.below(3)) rows.push_back(row), mix.push_back(random.real());
        starts.push_back(static_cast<int64_t>(rows.size()));
    }
    std::vector<double> want(N * D, 1.0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = starts[i]; j < starts[i + 1]; ++j) {
            const float* token = x.data() + rows[j] * D;
            std::vector<double> act(F);
            for (int64_t f = 0; f < F; ++f) {
                double gate = 0, up = 0;
                for (int64_t d = 0; d < D; ++d) {
                    gate += double(gate_up[i][f * D + d]) * token[d];
                    up += double(gate_up[i][(F + f) * D + d]) * token[d];
                }
                act[f] = gate / (1 + std::exp(-gate)) * up;
            }
            for (int64_t d = 0; d < D; ++d) {
                double sum = 0;
                for (int64_t f = 0; f < F; ++f) sum += double(down[i][d * F + f]) * act[f];
                want[rows[j] * D + d] += mix[j] * sum;
            }
        }
    const int wrong = experts_run(isa, m, records.data(), N, D, x.data(), starts.data(), rows.data(), mix.data(), out.data(),
                                  1 + random.below(4));
    double scale = 1, error = 0;
    for (int64_t j = 0; j < N * D; ++j) {
        scale = std::fmax(scale, std::fabs(want[j]));
        error = std::fmax(error, std::fabs(want[j] - out[j]));
    }
    if (!wrong && error < 1e-5 * scale) return true;
    std::printf("isa %d D %d F %d N %d m %d bf16 %d: code %d, error %g of %g\n", int(isa), int(D), int(F), int(N), int(m),
                bf16, wrong, error, scale);
    return false;
}

int main() {
    bool good = true;
    for (int64_t isa = 0; const char* name = experts_isa(isa); ++isa) {
        if (!*name) continue;
        std::vector<std::thread> callers;
        bool fine[3] = {true, true, true};
        for (int caller = 0; caller < 3; ++caller)
            callers.emplace_back([&, caller] {
                Random random{std::mt19937(caller)};
                for (int i = 0; i < 60; ++i) fine[caller] &= one_case(isa, random, i % 2);
            });
        for (auto& caller : callers) caller.join();
        good &= fine[0] && fine[1] && fine[2];
        std::printf("%s %s\n", name, good ? "agrees" : "DIFFERS");
    }
    experts_shutdown();
    return good ? 0 : 1;
}
