#include "simd_avx2.h"
// The kernels follow what they are made of.
#include "kernels.h"

namespace gq {

extern const Isa isa_avxvnni;
const Isa isa_avxvnni = make_isa<Simd>("avxvnni");

}  // namespace gq
