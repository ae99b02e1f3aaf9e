// x86 with AVX2 and FMA; compiled with those switched on, so nothing here may run before `supported` has said yes.
#if defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#include "kernels.inc"

namespace experts {
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
const Isa avx2 = {"avx2", has_avx2, {product<LoadF32>, product<LoadBf16>}, silu_times};
}  // namespace experts
#else
#include "experts.h"
namespace experts {
static bool never() { return false; }
const Isa avx2 = {"avx2", never, {}, nullptr};
}  // namespace experts
#endif
