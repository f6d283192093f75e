#include "simd_neon.h"
// The kernels follow what they are made of.
#include "kernels.h"

namespace gq {

extern const Isa isa_neon;
const Isa isa_neon = make_isa<Simd>("neon");

}  // namespace gq
