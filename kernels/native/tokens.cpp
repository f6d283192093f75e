#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "checks.h"

namespace gq {
namespace {

// x, and zeros up to `padded`: each four numbers are `step` from the next.
void scatter(const float* x, int64_t features, int64_t padded, float* out, int64_t step) {
    int64_t k = 0;
    for (; k + 4 <= features; k += 4, out += step) std::memcpy(out, x + k, 4 * sizeof(float));
    for (; k < padded; k += 4, out += step)
        for (int64_t i = 0; i < 4; ++i) out[i] = k + i < features ? x[k + i] : 0.0f;
}

float round_e4m3(float unit) {
    uint32_t bits;
    std::memcpy(&bits, &unit, 4);
    bits &= 0x7F800000;
    float power;
    std::memcpy(&power, &bits, 4);
    const float large = std::max(power, 0.015625f) * 0.125f * 12582912.0f;  // its last bit is worth that of e4m3
    return (unit + large) - large;
}

// What q s of kernels/activations.py is, for e4m3, in place of what scatter() has written.
void fake_quantize_e4m3(float* x, int64_t padded, int64_t step) {
    uint32_t largest = 0;  // |x| as bits: in the same order, and NaN above all
    for (int64_t k = 0; k < padded; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k / 4 * step + k % 4, 4);
        largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    float scale;
    std::memcpy(&scale, &largest, 4);
    scale /= 448.0f;
    if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
    if (!std::isfinite(scale)) scale = std::numeric_limits<float>::quiet_NaN();
    for (int64_t k = 0; k < padded; k += 4, x += step)
        for (int64_t i = 0; i < 4; ++i) x[i] = scale > 0.0f ? round_e4m3(x[i] / scale) * scale : scale;
}

// The same for int8. The integers of four columns first lie where the floats of the first of them goes.
void fake_quantize_int8(const Isa& isa, const float* x, int64_t features, int64_t padded, float* out, int64_t step) {
    int32_t sum;
    float scale;
    isa.quantize(x, features, padded, reinterpret_cast<int8_t*>(out), step * sizeof(float), &sum, &scale);
    for (int64_t k = 0; k < padded; k += 4, out += step) {
        int8_t q[4];
        std::memcpy(q, out, 4);
        for (int64_t i = 0; i < 4; ++i) out[i] = static_cast<float>(q[i]) * scale;
    }
}

// The bundle that token `token` of `count` falls into.
struct Bundle {
    int64_t first;
    int size;
};

Bundle bundle_of(int64_t token, int64_t count, int limit) {
    Bundle bundle{token / limit * limit, 0};
    for (;; bundle.first += bundle.size) {
        bundle.size = bundle_size(count - bundle.first, limit);
        if (token < bundle.first + bundle.size) return bundle;
    }
}

}  // namespace

Path path_of(const Weight& weight, int32_t activations) {
    return weight.codebook_kind == GQ_INT8 && activations == GQ_ACTIVATIONS_INT8 ? INTEGERS : FLOATS;
}

void TokenRoom::reserve(const Isa& isa, const Weight& weight, int32_t activations, int64_t count) {
    isa_ = &isa;
    path_ = path_of(weight, activations);
    activations_ = activations;
    features_ = weight.columns;
    padded_ = weight.tiles() * TILE;
    count_ = count;
    const int64_t room = cdiv(count, isa.bundle) * isa.bundle;
    sum_ = sums_.reserve(room);
    scale_ = scales_.reserve(room);
    const int64_t numbers = elements(room, padded_);
    if (path_ == INTEGERS) q_ = integers_.reserve(numbers);
    else x_ = floats_.reserve(numbers);
}

void TokenRoom::put(const float* row, int64_t token) {
    const Bundle bundle = bundle_of(token, count_, isa_->bundle);
    const int64_t start = bundle.first * padded_ + 4 * (token - bundle.first), step = 4 * bundle.size;
    if (path_ == INTEGERS)
        return isa_->quantize(row, features_, padded_, q_ + start, step, sum_ + token, scale_ + token);
    // Memory is as it was reserved: nothing here can fail, as threads must not.
    float* out = x_ + start;
    if (activations_ == GQ_ACTIVATIONS_INT8) return fake_quantize_int8(*isa_, row, features_, padded_, out, step);
    scatter(row, features_, padded_, out, step);
    if (activations_ == GQ_ACTIVATIONS_E4M3) fake_quantize_e4m3(out, padded_, step);
}

Tokens TokenRoom::tokens(int64_t first, int64_t count) const {
    const int64_t start = first * padded_;
    if (path_ == INTEGERS) return {q_ + start, sum_ + first, scale_ + first, nullptr, padded_, count};
    return {nullptr, nullptr, nullptr, x_ + start, padded_, count};
}

}  // namespace gq
