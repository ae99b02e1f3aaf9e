// x86 with AVX-512F; compiled with it switched on, so nothing here may run before `supported` has said yes. It has no
// arithmetic on bytes: quantised activations go the way of AVX2.
// EXPERTS_EMULATE: the same code for any processor, to be tested where there is no AVX-512.
#if defined(__AVX512F__) || defined(EXPERTS_EMULATE)
#define LANES 16
#define MANY_REGISTERS
#include "kernels.inc"

namespace experts {
#if defined(EXPERTS_EMULATE)
static bool has_avx512() { return true; }
static const Quantised quantised = QUANTISED;
#else
static bool has_avx512() { return __builtin_cpu_supports("avx512f") && avx2.supported(); }
static const Quantised& quantised = quantised_avx2;
#endif
const Isa avx512 = {"avx512", has_avx512, {product<LoadF32>, product<LoadBf16>}, silu_times, FLOATS,
                    &quantised, &quantised, PROBES, ATTENTION};
}  // namespace experts
#else
#include "experts.h"
namespace experts {
static bool never() { return false; }
const Isa avx512 = {"avx512", never, {}, nullptr, {}, nullptr, nullptr, nullptr, nullptr};
}  // namespace experts
#endif
