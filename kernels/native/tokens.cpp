#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "checks.h"

namespace gq {
namespace {

// q s of kernels/activations.py, for e4m3.
void fake_quantize_e4m3(const float* x, int64_t features, float* out) {
    uint32_t largest = 0;  // |x| as bits: in the same order, and NaN above all
    for (int64_t k = 0; k < features; ++k) {
        uint32_t bits;
        std::memcpy(&bits, x + k, 4);
        largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    float scale;
    std::memcpy(&scale, &largest, 4);
    scale /= 448.0f;
    if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
    if (!(scale > 0.0f && std::isfinite(scale))) {
        std::fill_n(out, features, scale == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN());
        return;
    }
    for (int64_t k = 0; k < features; ++k) {
        const float unit = x[k] / scale;
        uint32_t bits;
        std::memcpy(&bits, &unit, 4);
        bits &= 0x7F800000;
        float power;
        std::memcpy(&power, &bits, 4);
        const float large = std::max(power, 0.015625f) * 0.125f * 12582912.0f;  // its last bit is worth that of e4m3
        out[k] = ((unit + large) - large) * scale;
    }
}

void fake_quantize_int8(const Isa& isa, const float* x, int64_t features, float* out) {
    thread_local Scratch<int8_t> integers;
    int8_t* q = integers.reserve(cdiv(features, 4) * 4);
    int32_t sum;
    float scale;
    isa.quantize(x, features, cdiv(features, 4) * 4, q, 4, &sum, &scale);
    for (int64_t k = 0; k < features; ++k) out[k] = static_cast<float>(q[k]) * scale;
}

const float* fake_quantize(const Isa& isa, int32_t activations, const float* x, int64_t features) {
    thread_local Scratch<float> room;
    float* out = room.reserve(features);
    if (activations == GQ_ACTIVATIONS_INT8) fake_quantize_int8(isa, x, features, out);
    else fake_quantize_e4m3(x, features, out);
    return out;
}

// x, and zeros up to `padded`: each four numbers are `step` from the next.
void scatter(const float* x, int64_t features, int64_t padded, float* out, int64_t step) {
    int64_t k = 0;
    for (; k + 4 <= features; k += 4, out += step) std::memcpy(out, x + k, 4 * sizeof(float));
    for (; k < padded; k += 4, out += step)
        for (int64_t i = 0; i < 4; ++i) out[i] = k + i < features ? x[k + i] : 0.0f;
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
    const float* x = activations_ == GQ_NONE ? row : fake_quantize(*isa_, activations_, row, features_);
    scatter(x, features_, padded_, x_ + start, step);
}

Tokens TokenRoom::tokens(int64_t first, int64_t count) const {
    const int64_t start = first * padded_;
    if (path_ == INTEGERS) return {q_ + start, sum_ + first, scale_ + first, nullptr, padded_, count};
    return {nullptr, nullptr, nullptr, x_ + start, padded_, count};
}

}  // namespace gq
