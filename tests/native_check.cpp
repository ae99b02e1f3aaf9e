// Stands alone, to be built with sanitizers: every instruction set here against a plain double-precision loop, on odd
// shapes and every format, from several threads at once. Exits 0 if all agree.
#include "attention.h"
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
    const int64_t rows = 1 + random.below(150), columns = 1 + random.below(random.below(8) ? 300 : 1500), N = 1 + random.below(70);
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

static std::vector<float> normal(Random& random, int64_t count, float scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * random.real();
    return values;
}

static bool near(const char* what, int64_t isa, const std::vector<double>& want, const std::vector<float>& got, int wrong) {
    double scale = 1, error = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        scale = std::fmax(scale, std::fabs(want[i]));
        error = std::fmax(error, std::fabs(want[i] - got[i]));
    }
    if (!wrong && error < 1e-5 * scale) return true;
    std::printf("isa %d %s: code %d, error %g of %g\n", int(isa), what, wrong, error, scale);
    return false;
}

// Adds the values, weighted by the softmax of the logits, to `to`.
static void attend(std::vector<double> logits, const double* values, int64_t width, double* to) {
    double top = logits[0], sum = 0;
    for (double logit : logits) top = std::fmax(top, logit);
    for (double& logit : logits) sum += logit = std::exp(logit - top);
    for (size_t j = 0; j < logits.size(); ++j)
        for (int64_t i = 0; i < width; ++i) to[i] += logits[j] / sum * values[j * width + i];
}

static bool grouped_case(int64_t isa, Random& random) {
    const int64_t B = 1 + random.below(3), K = 1 + random.below(3), G = 1 + random.below(7), d = 1 + random.below(90);
    const int64_t S = 1 + random.below(80), window = random.below(2) ? 1 + random.below(S) : 0, H = K * G;
    auto q = normal(random, B * H * d), k = normal(random, B * K * d), v = normal(random, B * K * d);
    auto keys = normal(random, B * K * S * d), values = normal(random, B * K * S * d), old = keys;
    std::vector<int32_t> positions(B);
    for (int32_t& position : positions) position = static_cast<int32_t>(random.below(S));
    std::vector<float> out(B * H * d);
    std::vector<double> want(B * H * d);
    const experts::GroupedAttention call = {B,        H,        K,        d,        S,  S, window, 0.3f, q.data(), k.data(),
                                            v.data(), positions.data(), keys.data(), values.data(), out.data()};
    const int wrong = experts::attend_grouped(isa, call, 1 + random.below(3));
    bool good = true;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < H; ++h) {
            const int64_t at = b * K + h / G, last = positions[b], first = window ? std::max<int64_t>(0, last - window + 1) : 0;
            for (int64_t i = 0; i < d; ++i) good &= keys[(at * S + last) * d + i] == k[at * d + i];
            for (int64_t i = 0; i < last * d; ++i) good &= keys[at * S * d + i] == old[at * S * d + i];
            std::vector<double> logits, seen;
            for (int64_t j = first; j <= last; ++j) {
                double sum = 0;
                for (int64_t i = 0; i < d; ++i) sum += double(q[(b * H + h) * d + i]) * keys[(at * S + j) * d + i];
                logits.push_back(0.3f * sum);
                for (int64_t i = 0; i < d; ++i) seen.push_back(values[(at * S + j) * d + i]);
            }
            attend(logits, seen.data(), d, want.data() + (b * H + h) * d);
        }
    return near("grouped attention", isa, want, out, wrong) && good;
}

// `up` of a packed format, or (format 0) float32.
static bool latent_case(int64_t isa, Random& random, int64_t format) {
    const int64_t unit = format ? 8 : 1, B = 1 + random.below(2), H = 1 + random.below(6), n = unit * (1 + random.below(20));
    const int64_t v = unit * (1 + random.below(10)), R = 1 + random.below(20), r = 1 + random.below(150), S = 1 + random.below(50);
    const int64_t rows = H * (n + v);
    const Packed packed(random, format ? format : static_cast<int64_t>(experts::PACKED), rows, r);
    std::vector<float> plain = normal(random, rows * r, 0.1f);
    std::vector<double> up = format ? packed.values : std::vector<double>(plain.begin(), plain.end());
    auto q = normal(random, B * H * n, 0.1f), q_rope = normal(random, B * H * R), latent = normal(random, B * r), rope = normal(random, B * R);
    auto latents = normal(random, B * S * r), ropes = normal(random, B * S * R);
    std::vector<int32_t> positions(B);
    for (int32_t& position : positions) position = static_cast<int32_t>(random.below(S));
    std::vector<float> out(B * H * v);
    std::vector<double> want(B * H * v);
    experts::LatentAttention call = {};
    call.rows = B, call.heads = H, call.plain = n, call.rotary = R, call.latent = r, call.value = v, call.places = call.span = S;
    call.scale = 0.3f, call.q = q.data(), call.q_rope = q_rope.data(), call.new_latent = latent.data(), call.new_rope = rope.data();
    call.up = format ? packed.matrix : experts::make_matrix(plain.data(), experts::F32, rows, r);
    call.positions = positions.data(), call.latents = latents.data(), call.ropes = ropes.data(), call.out = out.data();
    const int wrong = experts::attend_latent(isa, call, 1 + random.below(3));
    bool good = true;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < H; ++h) {
            const double* own = up.data() + h * (n + v) * r;
            std::vector<double> logits, seen(latents.begin() + b * S * r, latents.begin() + (b * S + positions[b] + 1) * r), mixed(r);
            for (int64_t i = 0; i < r; ++i) good &= seen[positions[b] * r + i] == latent[b * r + i];
            for (int64_t j = 0; j <= positions[b]; ++j) {
                double sum = 0;
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t k = 0; k < r; ++k) sum += q[(b * H + h) * n + i] * own[i * r + k] * seen[j * r + k];
                for (int64_t i = 0; i < R; ++i) sum += double(q_rope[(b * H + h) * R + i]) * ropes[(b * S + j) * R + i];
                logits.push_back(0.3f * sum);
            }
            attend(logits, seen.data(), r, mixed.data());
            for (int64_t i = 0; i < v; ++i)
                for (int64_t k = 0; k < r; ++k) want[(b * H + h) * v + i] += own[(n + i) * r + k] * mixed[k];
        }
    return near("latent attention", isa, want, out, wrong) && good;
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
                for (int i = 0; i < 20; ++i) fine[caller] &= grouped_case(isa, random);
                for (int64_t kind = 0; kind < 3; ++kind)
                    for (int64_t format : {int64_t(0), experts::PACKED + kind, experts::PACKED + kind + experts::KINDS * 2})
                        fine[caller] &= latent_case(isa, random, format);
            });
        for (auto& caller : callers) caller.join();
        good &= fine[0] && fine[1] && fine[2];
        std::printf("%s %s\n", name, good ? "agrees" : "DIFFERS");
    }
    experts_shutdown();
    return good ? 0 : 1;
}
