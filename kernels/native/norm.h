// Layer normalization of a row. No fma(): the same bits on every instruction set.

#pragma once

#include "isa.h"
#include "quantize.h"

namespace {

template <class Simd>
struct NormKernels {
    using Floats = typename Simd::Floats;

    GQ_INLINE static Floats numbers(const float* x, int64_t k, int64_t features) {
        return QuantizeKernels<Simd>::numbers(x, k, features);
    }

    static float sum(Floats lanes) {
        float each[16], total = 0.0f;
        Simd::store(each, lanes);
        for (int lane = 0; lane < 16; ++lane) total += each[lane];
        return total;
    }

    static void normalize(const float* x, int64_t features, const float* weight, const float* bias, float epsilon,
                          float* y) {
        static constexpr float ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
        const float share = 1.0f / static_cast<float>(features);
        Floats sums = Simd::set(0.0f), squares = sums;
        for (int64_t k = 0; k < features; k += 16) sums = Simd::add(sums, numbers(x, k, features));
        const Floats mean = Simd::set(sum(sums) * share);
        for (int64_t k = 0; k < features; k += 16) {
            const Floats there = numbers(ONES, 0, features - k);
            const Floats deviation = Simd::mul(there, Simd::sub(numbers(x, k, features), mean));
            squares = Simd::add(squares, Simd::mul(deviation, deviation));
        }
        const Floats factor = Simd::set(1.0f / __builtin_sqrtf(sum(squares) * share + epsilon));
        for (int64_t k = 0; k < features; k += 16) {
            const int64_t left = features - k;
            const Floats unit = Simd::mul(Simd::sub(numbers(x, k, features), mean), factor);
            const Floats result = Simd::add(Simd::mul(unit, numbers(weight, k, features)), numbers(bias, k, features));
            if (left >= 16) {
                Simd::store(y + k, result);
            } else {
                float some[16];
                Simd::store(some, result);
                for (int64_t i = 0; i < left; ++i) y[k + i] = some[i];
            }
        }
    }
};

}  // namespace
