#include "simd_avx2.h"
// The kernels follow what they are made of.
#include "kernels.h"

namespace gq {

extern const Isa isa_avx2;
const Isa isa_avx2 = make_isa<Simd>("avx2");

}  // namespace gq
