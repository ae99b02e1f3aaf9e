// The XLA FFI handler of `experts_run_routed`: a jitted CPU program runs a layer's routed experts with no Python in
// between.
#if __has_include("xla/ffi/api/ffi.h")

#include <chrono>

#include "experts.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// table [n, 2]: the addresses of experts' records, as halves, lower one first; the layer's E from `first` on. seconds
// [1]: how long the experts took.
static ffi::Error routed(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::F32> mix,
                         ffi::Buffer<ffi::U32> table, ffi::Buffer<ffi::S32> threads, ffi::ResultBuffer<ffi::F32> out,
                         ffi::ResultBuffer<ffi::F32> seconds, int64_t isa, int64_t first, int64_t E) {
    const auto begin = std::chrono::steady_clock::now();
    if (first < 0 || E < 0 || first + E > static_cast<int64_t>(table.element_count()) / 2)
        return ffi::Error(ffi::ErrorCode::kInvalidArgument, "native experts: the table is too short");
    const auto records = reinterpret_cast<const experts::Expert* const*>(table.typed_data()) + first;
    const auto shape = x.dimensions();
    const int wrong = experts_run_routed(isa, E, records, shape[0], shape[1], ids.dimensions()[1], x.typed_data(),
                                         ids.typed_data(), mix.typed_data(), out->typed_data(), *threads.typed_data());
    if (wrong == 3)
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, "native experts: scratch does not fit into memory");
    if (wrong)
        return ffi::Error(ffi::ErrorCode::kInvalidArgument, "native experts: the routing does not fit the experts");
    *seconds->typed_data() = std::chrono::duration<float>(std::chrono::steady_clock::now() - begin).count();
    return ffi::Error::Success();
}

extern "C" EXPORTED XLA_FFI_Error* experts_ffi_routed(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(experts_ffi_routed, routed,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("isa")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("experts"));

#endif
