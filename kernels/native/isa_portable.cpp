#include "simd_portable.h"
// The kernels follow what they are made of.
#include "kernels.h"

namespace gq {

extern const Isa isa_portable;
const Isa isa_portable = make_isa<Simd>("portable");

}  // namespace gq
