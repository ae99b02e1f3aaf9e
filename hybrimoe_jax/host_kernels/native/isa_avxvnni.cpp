// x86 with AVX2 and its 256-bit dot products of bytes (AVX-VNNI), otherwise as isa_avx2.cpp.
#if defined(__AVXVNNI__)
#define LANES 8
#define EXPERTS_VNNI
#include <cpuid.h>

#include "kernels.inc"

namespace experts {
static bool has_avxvnni() {
    unsigned a, b, c, d;
    return avx2.supported() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
static const Quantised quantised = QUANTISED;
const Isa avxvnni = {"avxvnni", has_avxvnni, {product<LoadF32>, product<LoadBf16>}, silu_times, FLOATS,
                     &quantised, &quantised, PROBES, ATTENTION};
}  // namespace experts
#else
#include "experts.h"
namespace experts {
static bool never() { return false; }
const Isa avxvnni = {"avxvnni", never, {}, nullptr, {}, nullptr, nullptr, nullptr, nullptr};
}  // namespace experts
#endif
