// The C interface: the instruction sets, and arguments checked before anything is written.

#include "experts.h"

#include <new>
#include <vector>

#include "run.h"
#include "team.h"

namespace experts {
namespace {

const Isa* const ISAS[] = {
#if defined(__x86_64__)
    &avx512vnni, &avx512, &avxvnni, &avx2,
#endif
    &portable};
constexpr int64_t COUNT = sizeof ISAS / sizeof *ISAS;

int check(const Call& call) {
    for (int64_t i = 0; i < call.m; ++i)
        if (call.records[i]->width != call.D || !known_format(call.records[i]->format)) return 1;
    for (int64_t j = 0; call.starts && j < call.starts[call.m]; ++j)
        if (call.rows[j] < 0 || call.rows[j] >= call.N) return 2;
    return 0;
}

int run_checked(int64_t isa, const Call& call, int64_t threads) {
    if (int wrong = check(call)) return wrong;
    try {
        run(*ISAS[isa], call, threads);
    } catch (const std::bad_alloc&) {
        return 3;
    }
    return 0;
}

}  // namespace

const Isa& isa_number(int64_t isa) { return *ISAS[isa]; }

}  // namespace experts

using namespace experts;

extern "C" {

int experts_run(int64_t isa, int64_t m, const Expert* const* records, int64_t N, int64_t D, const float* x,
                const int64_t* starts, const int64_t* rows, const float* mix, float* out, int64_t threads) {
    return run_checked(isa, {m, records, N, D, x, starts, rows, mix, out}, threads);
}

int experts_run_one(int64_t isa, int64_t m, const Expert* const* records, int64_t D, const float* x, const float* mix,
                    float* out, int64_t threads) {
    return run_checked(isa, {m, records, 1, D, x, nullptr, nullptr, mix, out}, threads);
}

int matrix_run(int64_t isa, int64_t format, int64_t rows, int64_t columns, const void* data, int64_t N, const float* x,
               float* out, int64_t threads) {
    return matrices_run(isa, format, 1, &rows, columns, &data, N, x, &out, threads);
}

int matrices_run(int64_t isa, int64_t format, int64_t count, const int64_t* rows, int64_t columns,
                 const void* const* data, int64_t N, const float* x, float* const* outs, int64_t threads) {
    if (!known_format(format) || count < 1) return 1;
    static thread_local std::vector<Matrix> matrices;
    try {
        matrices.clear();
        for (int64_t i = 0; i < count; ++i) matrices.push_back(make_matrix(data[i], format, rows[i], columns));
        run_products(*ISAS[isa], count, matrices.data(), N, x, outs, threads);
    } catch (const std::bad_alloc&) {
        return 3;
    }
    return 0;
}

int64_t matrix_bytes(int64_t format, int64_t rows, int64_t columns) {
    return known_format(format) ? make_matrix(nullptr, format, rows, columns).bytes : -1;
}

const char* experts_isa(int64_t isa) {
    if (isa < 0 || isa >= COUNT) return nullptr;
    return ISAS[isa]->supported() ? ISAS[isa]->name : "";
}

int64_t experts_best_isa() {
    int64_t isa = 0;
    while (!ISAS[isa]->supported()) ++isa;
    return isa;
}

void experts_silu_times(int64_t isa, const float* gate, const float* up, float* out, int64_t count) {
    ISAS[isa]->silu_times(gate, up, out, count);
}

void experts_shutdown() { end_helpers(); }
}
