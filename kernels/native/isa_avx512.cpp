#include "simd_avx512.h"
// The kernels follow what they are made of.
#include "kernels.h"

namespace gq {

extern const Isa isa_avx512;
const Isa isa_avx512 = make_isa<Simd>("avx512");

}  // namespace gq
