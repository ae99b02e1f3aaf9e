// x86 with AVX-512 and its dot products of bytes (VNNI), otherwise as isa_avx512.cpp.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LANES 16
#define MANY_REGISTERS
#define EXPERTS_VNNI
#include "kernels.inc"

namespace experts {
static bool has_avx512vnni() {
    return avx2.supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
static const Quantised quantised = QUANTISED;
const Isa avx512vnni = {"avx512vnni", has_avx512vnni, {product<LoadF32>, product<LoadBf16>}, silu_times, FLOATS,
                        &quantised, &quantised_avx512vl, PROBES, ATTENTION};
}  // namespace experts
#else
#include "experts.h"
namespace experts {
static bool never() { return false; }
const Isa avx512vnni = {"avx512vnni", never, {}, nullptr, {}, nullptr, nullptr, nullptr, nullptr};
}  // namespace experts
#endif
