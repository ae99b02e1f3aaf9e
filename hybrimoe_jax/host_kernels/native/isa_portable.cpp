// Any processor: four lanes, which compilers map to SSE2 or NEON.
#define LANES 4
#include "kernels.inc"

namespace experts {
static bool always() { return true; }
static const Quantised quantised = QUANTISED;
const Isa portable = {"portable", always, {product<LoadF32>, product<LoadBf16>}, silu_times, FLOATS,
                      &quantised, &quantised, PROBES, ATTENTION};
}  // namespace experts
