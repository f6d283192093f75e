// Dynamic quantization of a token to 8-bit integers, as kernels/activations.py defines it.

#pragma once

#include "isa.h"

namespace {

template <class Simd>
struct QuantizeKernels {
    using Floats = typename Simd::Floats;

    static float scale_of(const float* x, int64_t features) {
        const Floats zero = Simd::set(0.0f);
        Floats largest = zero, none = zero;  // the second stays 0 unless a number is not finite
        for (int64_t k = 0; k < features; k += 16) {
            const Floats values = Simd::load(x + k, features - k);
            largest = Simd::max(largest, Simd::max(values, Simd::sub(zero, values)));
            none = Simd::add(none, Simd::mul(values, zero));
        }
        float lanes[16], nones[16];
        Simd::store(lanes, largest);
        Simd::store(nones, none);
        float most = 0.0f, nothing = 0.0f;
        for (int lane = 0; lane < 16; ++lane) {
            most = lanes[lane] > most ? lanes[lane] : most;
            nothing += nones[lane];
        }
        if (nothing != 0.0f) return __builtin_nanf("");
        const float scale = most / 127.0f;
        return scale < 1.17549435e-38f ? 0.0f : scale;
    }

    static void quantize(const float* x, int64_t features, int64_t padded, int8_t* q, int64_t step, int32_t* sum,
                         float* scale) {
        *scale = scale_of(x, features);
        *sum = 0;
        const bool usable = *scale > 0.0f;
        const Floats divisor = Simd::set(*scale);
        Floats sums = Simd::set(0.0f);  // of few integers each, exact
        for (int64_t k = 0; k < padded; k += 16) {
            int8_t bytes[16] = {};
            if (usable && k < features) {
                const Floats rounded = Simd::round(Simd::div(Simd::load(x + k, features - k), divisor));
                sums = Simd::add(sums, rounded);
                Simd::store_bytes(bytes, rounded);
            }
            for (int64_t i = 0; i < 16 && k + i < padded; i += 4, q += step) __builtin_memcpy(q, bytes + i, 4);
        }
        float lanes[16];
        Simd::store(lanes, sums);
        for (int lane = 0; lane < 16; ++lane) *sum += static_cast<int32_t>(lanes[lane]);
    }
};

}  // namespace
