// XLA FFI handlers: jitted CPU programs call the kernels with no Python in between. The headers come with jaxlib;
// where the build does not find them this file is empty, and ffi.py does without.
//
// Buffers are XLA's own and read where they lie. Handlers allocate nothing per call: what they need belongs to the
// calling thread, only grows, and is used again.
#if __has_include("xla/ffi/api/ffi.h")

#include <algorithm>
#include <vector>

#include "experts.h"
#include "xla/ffi/api/ffi.h"

namespace experts {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// The bytes of a weight matrix or expert as its format wants them, or null for a buffer of another type or size.
const void* weights_of(const ffi::AnyBuffer& buffer, int64_t format, int64_t bytes) {
    const ffi::DataType type = format == F32 ? ffi::F32 : format == BF16 ? ffi::BF16 : ffi::U8;
    return buffer.element_type() == type && static_cast<int64_t>(buffer.size_bytes()) == bytes ? buffer.untyped_data()
                                                                                               : nullptr;
}

// acc [N, D] + the experts' outputs of x [N, D], each weighted by its row of mix [m, N]; a weight of zero skips the
// row. Plain experts of `hidden` width are two arrays each, gate_up and down; packed ones are one.
ffi::Error run_experts(Floats acc, Floats x, Floats mix, ffi::RemainingArgs slots, ffi::Result<Floats> out,
                       int64_t format, int64_t hidden, int64_t isa, int64_t threads) {
    static thread_local std::vector<Expert> records;
    static thread_local std::vector<const Expert*> pointers;
    static thread_local std::vector<int64_t> starts, rows;
    static thread_local std::vector<float> weights;
    const auto shape = x.dimensions(), mixed = mix.dimensions();
    const int64_t arrays = format < PLAIN ? 2 : 1;
    if (shape.size() != 2 || mixed.size() != 2 || mixed[1] != shape[0] || acc.element_count() != x.element_count() ||
        static_cast<int64_t>(slots.size()) != arrays * mixed[0])
        return wrong("experts: acc and x [N, D], mix [m, N] and m experts are needed");
    const int64_t N = shape[0], D = shape[1], m = mixed[0];
    const int64_t inward = matrix_bytes(format, hidden, D), outward = matrix_bytes(format, D, hidden);
    records.clear();
    pointers.clear();
    rows.clear();
    weights.clear();
    starts.assign(1, 0);
    for (int64_t i = 0; i < m; ++i) {
        const auto first = slots.get<ffi::AnyBuffer>(i * arrays),
                   second = slots.get<ffi::AnyBuffer>(i * arrays + arrays - 1);
        if (!first || !second) return wrong("experts: a slot is no array");
        const void* data = weights_of(*first, format, 2 * inward + (arrays == 1 ? outward : 0));
        const void* down = arrays == 1 ? data : weights_of(*second, format, outward);
        if (!data || !down) return wrong("experts: a slot has not the type or size of its format");
        records.push_back({data, down, D, hidden, format});
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
    if (experts_run(isa, m, pointers.data(), N, D, x.typed_data(), starts.data(), rows.data(), weights.data(), to,
                    threads))
        return ffi::Error::Internal("experts: scratch does not fit into memory");
    return ffi::Error::Success();
}

// For each matrix [R, K] of the format one result [N, R]: x [N, K] times its transpose. `places`: of each matrix,
// where in a table of addresses [n, 2] (halves, lower one first) its own stands, or -1 where it is the next of
// `matrices`, of which the first is the table where there is one.
ffi::Error run_matmul(Floats x, ffi::RemainingArgs matrices, ffi::RemainingRets results, int64_t format,
                      ffi::Span<const int64_t> places, int64_t isa, int64_t threads) {
    static thread_local std::vector<int64_t> rows;
    static thread_local std::vector<const void*> read;
    static thread_local std::vector<float*> outs;
    const auto shape = x.dimensions();
    const int64_t addressed = std::count_if(places.begin(), places.end(), [](int64_t place) { return place >= 0; });
    if (shape.size() != 2 || places.size() != results.size() ||
        matrices.size() != results.size() - addressed + (addressed > 0))
        return wrong("matmul: x [N, K] and a result a matrix are needed");
    const void* const* table = nullptr;
    int64_t next = 0, known = 0;
    if (addressed) {
        const auto given = matrices.get<ffi::Buffer<ffi::U32>>(next++);
        if (!given) return wrong("matmul: a table of addresses [n, 2] is needed");
        table = reinterpret_cast<const void* const*>(given->typed_data()), known = given->element_count() / 2;
    }
    rows.clear();
    read.clear();
    outs.clear();
    for (size_t i = 0; i < results.size(); ++i) {
        auto result = results.get<Floats>(i);
        if (!result || (*result)->dimensions().size() != 2 || (*result)->dimensions()[0] != shape[0])
            return wrong("matmul: results [N, R] are needed");
        const auto made = (*result)->dimensions();
        const void* data = nullptr;
        if (places[i] >= 0) {
            data = places[i] < known ? table[places[i]] : nullptr;
        } else if (const auto matrix = matrices.get<ffi::AnyBuffer>(next++)) {
            data = weights_of(*matrix, format, matrix_bytes(format, made[1], shape[1]));
        }
        if (!data) return wrong("matmul: a matrix has not the type or size of its format");
        rows.push_back(made[1]);
        read.push_back(data);
        outs.push_back((*result)->typed_data());
    }
    if (matrices_run(isa, format, rows.size(), rows.data(), shape[1], read.data(), shape[0], x.typed_data(),
                     outs.data(), threads))
        return ffi::Error::Internal("matmul: scratch does not fit into memory");
    return ffi::Error::Success();
}

}  // namespace
}  // namespace experts

extern "C" {
EXPORTED XLA_FFI_Error* ffi_experts(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* ffi_products(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_experts, experts::run_experts,
                              xla::ffi::Ffi::Bind()
                                  .Arg<experts::Floats>()
                                  .Arg<experts::Floats>()
                                  .Arg<experts::Floats>()
                                  .RemainingArgs()
                                  .Ret<experts::Floats>()
                                  .Attr<int64_t>("format")
                                  .Attr<int64_t>("hidden")
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("threads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_products, experts::run_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Arg<experts::Floats>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("format")
                                  .Attr<xla::ffi::Span<const int64_t>>("places")
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("threads"));

#endif
