// The XLA FFI handlers of attention.h. Caches are donated: the result that holds one is the operand's own buffer.
#if __has_include("xla/ffi/api/ffi.h")

#include <algorithm>

#include "attention.h"
#include "xla/ffi/api/ffi.h"

namespace experts {
namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::Result<Floats>;

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// Where XLA could not give the donated buffer, it is copied.
float* in_place(const Floats& from, Result& to) {
    if (to->typed_data() != from.typed_data()) std::copy_n(from.typed_data(), from.element_count(), to->typed_data());
    return to->typed_data();
}

ffi::Error report(int result) {
    return result ? ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: scratch does not fit into memory")
                  : ffi::Error::Success();
}

// q [B, H, d], k and v [B, K, d], positions [B], keys and values [B, K, S, d]
ffi::Error grouped(Floats q, Floats k, Floats v, ffi::Buffer<ffi::S32> positions, Floats keys, Floats values,
                   Result out, Result new_keys, Result new_values, int64_t span, int64_t window, float scale,
                   int64_t isa, int64_t threads) {
    const auto asked = q.dimensions(), cached = keys.dimensions();
    if (asked.size() != 3 || cached.size() != 4 || asked[0] != cached[0] || asked[1] % cached[1] ||
        asked[2] != cached[3] || values.element_count() != keys.element_count() ||
        k.element_count() * cached[2] != keys.element_count() || v.element_count() != k.element_count() ||
        static_cast<int64_t>(positions.element_count()) != asked[0] || span < 1 || span > cached[2])
        return wrong("attention: q [B, H, d], k and v [B, K, d] and caches [B, K, S, d] are needed");
    const GroupedAttention call = {asked[0],       asked[1],       cached[1],      asked[2],
                                   cached[2],      span,           window,         scale,
                                   q.typed_data(), k.typed_data(), v.typed_data(), positions.typed_data(),
                                   in_place(keys, new_keys), in_place(values, new_values), out->typed_data()};
    return report(attend_grouped(isa, call, threads));
}

// q [B, H, n], q_rope [B, H, R], latent [B, r], rope [B, R], up [H * (n + v), r] of any format, positions [B],
// latents [B, S, r], ropes [B, S, R]
ffi::Error latent(Floats q, Floats q_rope, Floats latent, Floats rope, ffi::AnyBuffer up,
                  ffi::Buffer<ffi::S32> positions, Floats latents, Floats ropes, Result out, Result new_latents,
                  Result new_ropes, int64_t span, int64_t format, float scale, int64_t isa, int64_t threads) {
    const auto asked = q.dimensions(), cached = latents.dimensions(), made = out->dimensions(),
               turned = q_rope.dimensions();
    if (asked.size() != 3 || cached.size() != 3 || made.size() != 3 || turned.size() != 3 || asked[0] != cached[0] ||
        static_cast<int64_t>(latent.element_count()) != cached[0] * cached[2] ||
        static_cast<int64_t>(rope.element_count()) != cached[0] * turned[2] ||
        static_cast<int64_t>(ropes.element_count()) != cached[0] * cached[1] * turned[2] ||
        (format >= PACKED && (asked[2] % PANEL || made[2] % PANEL)) ||
        static_cast<int64_t>(positions.element_count()) != asked[0] || span < 1 || span > cached[1])
        return wrong("attention: queries [B, H, n], latents [B, S, r] and rotary parts are needed");
    const Matrix matrix = make_matrix(up.untyped_data(), format, asked[1] * (asked[2] + made[2]), cached[2]);
    if (static_cast<int64_t>(up.size_bytes()) != matrix.bytes)
        return wrong("attention: up has not the size of its format");
    const LatentAttention call = {asked[0],
                                  asked[1],
                                  asked[2],
                                  turned[2],
                                  cached[2],
                                  made[2],
                                  cached[1],
                                  span,
                                  scale,
                                  q.typed_data(),
                                  q_rope.typed_data(),
                                  latent.typed_data(),
                                  rope.typed_data(),
                                  matrix,
                                  positions.typed_data(),
                                  in_place(latents, new_latents),
                                  in_place(ropes, new_ropes),
                                  out->typed_data()};
    return report(attend_latent(isa, call, threads));
}

}  // namespace
}  // namespace experts

extern "C" {
EXPORTED XLA_FFI_Error* ffi_grouped_attention(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* ffi_latent_attention(XLA_FFI_CallFrame*);
}

#define FLOATS .Arg<experts::Floats>()
#define SETTINGS .Attr<float>("scale").Attr<int64_t>("isa").Attr<int64_t>("threads")

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_grouped_attention, experts::grouped,
                              xla::ffi::Ffi::Bind()
                                  FLOATS FLOATS FLOATS.Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                      FLOATS FLOATS.Ret<experts::Floats>()
                                          .Ret<experts::Floats>()
                                          .Ret<experts::Floats>()
                                          .Attr<int64_t>("span")
                                          .Attr<int64_t>("window") SETTINGS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(ffi_latent_attention, experts::latent,
                              xla::ffi::Ffi::Bind() FLOATS FLOATS FLOATS FLOATS.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>() FLOATS FLOATS
                                  .Ret<experts::Floats>()
                                  .Ret<experts::Floats>()
                                  .Ret<experts::Floats>()
                                  .Attr<int64_t>("span")
                                  .Attr<int64_t>("format") SETTINGS);

#endif
