// Stands alone, to be built with sanitizers: every instruction set here against a plain double-precision loop, on odd
// shapes and every format, from several threads at once. Exits 0 if all agree.
#include "experts.h"

#include <algorithm>
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

static float from_half(uint16_t h) {  // a normal number
    const uint32_t bits = (h & 0x8000u) << 16 | ((h >> 10 & 31u) + 112) << 23 | (h & 1023u) << 13;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// A packed matrix of random bytes at an address that is aligned to nothing, and what they stand for, from the layout's rule.
struct Packed {
    std::vector<char> held;
    experts::Matrix matrix;
    std::vector<double> values;

    Packed(Random& random, int64_t format, int64_t rows, int64_t columns) {
        matrix = experts::make_matrix(nullptr, format, rows, columns);
        held.resize(matrix.bytes + 1);
        char* data = held.data() + 1;
        matrix.data = data;
        for (int64_t i = 0; i < matrix.bytes; ++i) data[i] = static_cast<char>(random.below(256));
        const int64_t panels = (rows + 7) / 8;
        if (matrix.kind == experts::INT8)
            for (int64_t i = 0; i < matrix.scales_at; ++i)
                if (data[i] == -128) data[i] = 127;
        for (int64_t i = 0; i < panels * matrix.groups * 8; ++i) {
            const float scale = random.below(2) ? 0.0078125f : -0.00390625f;
            const uint16_t half = scale > 0 ? 8 << 10 : 0x8000 | 7 << 10;
            if (matrix.wide) std::memcpy(data + matrix.scales_at + 4 * i, &scale, 4);
            else std::memcpy(data + matrix.scales_at + 2 * i, &half, 2);
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t k = 0; k < columns; ++k) {
                const int64_t panel = r / 8, row = r % 8, group = k / matrix.group, at = (panel * matrix.groups + group) * 8 + row;
                const char* codes = data + panel * matrix.pitch;
                double code;
                if (matrix.kind == experts::INT8) {
                    code = static_cast<int8_t>(codes[k / 4 * 32 + row * 4 + k % 4]);
                } else {
                    const uint8_t both = codes[k / 8 * 32 + row * 4 + k % 4];
                    code = k % 8 < 4 ? both & 15 : both >> 4;
                    code -= matrix.kind == experts::INT4 ? 8 : static_cast<uint8_t>(data[matrix.zeros_at + at]);
                }
                float scale;
                uint16_t half;
                std::memcpy(&scale, data + matrix.scales_at + 4 * (matrix.wide ? at : 0), 4);
                std::memcpy(&half, data + matrix.scales_at + 2 * (matrix.wide ? 0 : at), 2);
                values.push_back(code * (matrix.wide ? scale : from_half(half)));
            }
    }
};

// A product with a packed matrix, and two experts of the format, whose results are only looked at for being numbers (what
// they should be depends on the rounding between; the Python tests say).
static bool packed_case(int64_t isa, Random& random, int64_t format) {
    const int64_t rows = 1 + random.below(150), columns = 1 + random.below(300), N = 1 + random.below(30);
    const Packed packed(random, format, rows, columns);
    const experts::Matrix& matrix = packed.matrix;
    std::vector<float> x(N * columns), out(N * rows);
    for (float& value : x) value = random.real();
    int wrong = matrix_run(isa, format, rows, columns, matrix.data, N, x.data(), out.data(), 1 + random.below(3));
    double scale = 1, error = 0;
    for (int64_t t = 0; t < N; ++t) {
        std::vector<double> seen(columns);
        for (int64_t from = 0; from < columns; from += matrix.group) {
            const int64_t stop = std::min(columns, from + matrix.group);
            float most = 0;
            for (int64_t k = from; k < stop; ++k) most = std::fmax(most, std::fabs(x[t * columns + k]));
            for (int64_t k = from; k < stop; ++k) {
                volatile float product = x[t * columns + k] * (127.0f / most);
                seen[k] = matrix.a8 ? std::nearbyint(product) * double(most / 127.0f) : x[t * columns + k];
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            double want = 0;
            for (int64_t k = 0; k < columns; ++k) want += packed.values[r * columns + k] * seen[k];
            scale = std::fmax(scale, std::fabs(want));
            error = std::fmax(error, std::fabs(want - out[t * rows + r]));
        }
    }
    const int64_t each = matrix.bytes, D = columns, F = rows;
    const Packed down(random, format, D, F);
    std::vector<char> expert(2 * each + down.matrix.bytes);
    std::memcpy(expert.data(), matrix.data, each);
    std::memcpy(expert.data() + each, matrix.data, each);
    std::memcpy(expert.data() + 2 * each, down.matrix.data, down.matrix.bytes);
    const Expert record = {expert.data(), nullptr, D, F, format};
    const Expert* records[] = {&record, &record};
    std::vector<int64_t> starts{0, N, N + 1}, chosen;
    for (int64_t t = 0; t < N; ++t) chosen.push_back(t);
    chosen.push_back(N - 1);
    std::vector<float> mix(N + 1, 0.5f), y(N * D);
    wrong |= experts_run(isa, 2, records, N, D, x.data(), starts.data(), chosen.data(), mix.data(), y.data(), 1 + random.below(3));
    bool numbers = true;
    for (float value : y) numbers &= std::isfinite(value);
    if (!wrong && numbers && error < 1e-5 * scale) return true;
    std::printf("isa %d format %d rows %d columns %d N %d: code %d, error %g of %g\n", int(isa), int(format), int(rows),
                int(columns), int(N), wrong, error, scale);
    return false;
}

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
                for (int64_t format = experts::PACKED + caller; format < experts::FORMATS; format += 3)
                    for (int i = 0; i < 3; ++i) fine[caller] &= packed_case(isa, random, format);
            });
        for (auto& caller : callers) caller.join();
        good &= fine[0] && fine[1] && fine[2];
        std::printf("%s %s\n", name, good ? "agrees" : "DIFFERS");
    }
    experts_shutdown();
    return good ? 0 : 1;
}
