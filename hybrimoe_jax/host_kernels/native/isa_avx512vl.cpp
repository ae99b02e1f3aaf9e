// x86 with AVX-512 and VNNI again, at half the width: a vector is one panel, so that a few tokens read weights as one
// stream where isa_avx512vnni.cpp, whose vectors are two panels, reads two. Its sums are the same to the bit.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define LANES 8
#define MANY_REGISTERS
#define EXPERTS_VNNI
#include "kernels.inc"

namespace experts {
const Quantised quantised_avx512vl = QUANTISED;
}  // namespace experts
#else
#include "experts.h"
namespace experts {
const Quantised quantised_avx512vl = {};
}  // namespace experts
#endif
