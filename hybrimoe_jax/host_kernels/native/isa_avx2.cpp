// x86 with AVX2, FMA and F16C; compiled with those switched on, so nothing here may run before `supported` has said
// yes.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#include "kernels.inc"

namespace experts {
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
const Quantised quantised_avx2 = QUANTISED;
const Isa avx2 = {"avx2", has_avx2, {product<LoadF32>, product<LoadBf16>}, silu_times, FLOATS,
                  &quantised_avx2, &quantised_avx2, PROBES, ATTENTION};
}  // namespace experts
#else
#include "experts.h"
namespace experts {
static bool never() { return false; }
const Quantised quantised_avx2 = {};
const Isa avx2 = {"avx2", never, {}, nullptr, {}, nullptr, nullptr, nullptr, nullptr};
}  // namespace experts
#endif
