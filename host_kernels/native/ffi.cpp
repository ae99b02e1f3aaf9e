// XLA FFI handlers: jitted CPU programs call the kernels with no Python in between. The headers come with jaxlib; where the
// build does not find them this file is empty, and ffi.py does without.
//
// Buffers are XLA's own and read where they lie. Handlers allocate nothing per call: what they need is of the calling thread,
// only grows, and is used again.
#if __has_include("xla/ffi/api/ffi.h")

#include <algorithm>
#include <new>
#include <vector>

#include "experts.h"
#include "matrices.h"
#include "xla/ffi/api/ffi.h"

namespace experts {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// acc [N, D] + the experts' outputs of x [N, D], each weighted by its row of mix [m, N]; a weight of zero skips the row.
ffi::Error run_experts(Floats acc, Floats x, Floats mix, ffi::RemainingArgs slots, ffi::Result<Floats> out, int64_t isa,
                       int64_t threads) {
    static thread_local std::vector<Expert> records;
    static thread_local std::vector<const Expert*> pointers;
    static thread_local std::vector<int64_t> starts, rows;
    static thread_local std::vector<float> weights;
    const auto shape = x.dimensions(), mixed = mix.dimensions();
    if (shape.size() != 2 || mixed.size() != 2 || mixed[1] != shape[0] || slots.size() != 2 * static_cast<size_t>(mixed[0]))
        return wrong("experts: x [N, D], mix [m, N] and two arrays an expert are needed");
    const int64_t N = shape[0], D = shape[1], m = mixed[0];
    records.clear();
    pointers.clear();
    rows.clear();
    weights.clear();
    starts.assign(1, 0);
    for (int64_t i = 0; i < m; ++i) {
        const auto gate_up = slots.get<Floats>(2 * i), down = slots.get<Floats>(2 * i + 1);
        if (!gate_up || !down) return wrong("experts: float32 weights are needed");
        const auto in = gate_up->dimensions(), back = down->dimensions();
        if (in.size() != 2 || back.size() != 2 || in[1] != D || back[0] != D || in[0] != 2 * back[1])
            return wrong("experts: gate_up [2F, D] and down [D, F] are needed");
        records.push_back({gate_up->typed_data(), down->typed_data(), D, back[1], F32});
        const float* of = mix.typed_data() + i * N;
        for (int64_t row = 0; row < N; ++row) {
            if (of[row] == 0) continue;
            rows.push_back(row);
            weights.push_back(of[row]);
        }
        starts.push_back(rows.size());
    }
    for (const Expert& record : records) pointers.push_back(&record);
    float* to = out->typed_data();
    if (to != acc.typed_data()) std::copy_n(acc.typed_data(), N * D, to);
    if (experts_run(isa, m, pointers.data(), N, D, x.typed_data(), starts.data(), rows.data(), weights.data(), to, threads))
        return ffi::Error::Internal("experts: scratch does not fit into memory");
    return ffi::Error::Success();
}

// For each matrix [R, K] one result [N, R]: x [N, K] times its transpose.
ffi::Error run_matmul(Floats x, ffi::RemainingArgs matrices, ffi::RemainingRets results, int64_t isa, int64_t threads) {
    static thread_local std::vector<Product> products;
    const auto shape = x.dimensions();
    if (shape.size() != 2 || matrices.size() != results.size()) return wrong("matmul: x [N, K] and a result a matrix are needed");
    products.clear();
    for (size_t i = 0; i < matrices.size(); ++i) {
        const auto matrix = matrices.get<Floats>(i);
        auto result = results.get<Floats>(i);
        if (!matrix || !result) return wrong("matmul: float32 matrices are needed");
        const auto size = matrix->dimensions(), made = (*result)->dimensions();
        if (size.size() != 2 || made.size() != 2 || size[1] != shape[1] || made[0] != shape[0] || made[1] != size[0])
            return wrong("matmul: x [N, K], matrices [R, K] and results [N, R] are needed");
        products.push_back({matrix->typed_data(), size[0], (*result)->typed_data(), F32});
    }
    try {
        run_products(isa_at(isa), products.data(), products.size(), shape[0], shape[1], x.typed_data(), threads);
    } catch (const std::bad_alloc&) {
        return ffi::Error::Internal("matmul: scratch does not fit into memory");
    }
    return ffi::Error::Success();
}

}  // namespace
}  // namespace experts

extern "C" {
EXPORTED XLA_FFI_Error* ffi_experts(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* ffi_matmul(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_experts, experts::run_experts,
                              xla::ffi::Ffi::Bind()
                                  .Arg<experts::Floats>()
                                  .Arg<experts::Floats>()
                                  .Arg<experts::Floats>()
                                  .RemainingArgs()
                                  .Ret<experts::Floats>()
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_matmul, experts::run_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Arg<experts::Floats>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("threads"));

#endif
