// Layer normalization: gq_layer_norm.

#include "checks.h"
#include "gq_native.h"
#include "isa.h"

int32_t gq_layer_norm(const float* x, int64_t x_count, const float* weight, int64_t weight_count, const float* bias,
                      int64_t bias_count, float epsilon, float* y, int64_t y_count) {
    using namespace gq;
    return guarded([&] {
        check_between("weight_count", weight_count, 1, INT64_MAX);
        check_array("weight", weight, weight_count, weight_count);
        check_array("bias", bias, bias_count, weight_count);
        check_array("x", x, x_count, x_count / weight_count * weight_count);
        check_array("y", y, y_count, x_count);
        for (int64_t first = 0; first < x_count; first += weight_count)
            current_isa().normalize(x + first, weight_count, weight, bias, epsilon, y + first);
    });
}
