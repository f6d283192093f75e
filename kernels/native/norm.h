// Layer normalization of a row. No fma(): the same bits on every instruction set.

#pragma once

#include "isa.h"

namespace {

template <class Simd>
struct NormKernels {
    using Floats = typename Simd::Floats;

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
        for (int64_t k = 0; k < features; k += 16) sums = Simd::add(sums, Simd::load(x + k, features - k));
        const Floats mean = Simd::set(sum(sums) * share);
        for (int64_t k = 0; k < features; k += 16) {
            const Floats there = Simd::load(ONES, features - k);
            const Floats deviation = Simd::mul(there, Simd::sub(Simd::load(x + k, features - k), mean));
            squares = Simd::add(squares, Simd::mul(deviation, deviation));
        }
        const Floats factor = Simd::set(1.0f / __builtin_sqrtf(sum(squares) * share + epsilon));
        for (int64_t k = 0; k < features; k += 16) {
            const Floats unit = Simd::mul(Simd::sub(Simd::load(x + k, features - k), mean), factor);
            const Floats scaled = Simd::mul(unit, Simd::load(weight + k, features - k));
            Simd::store(y + k, Simd::add(scaled, Simd::load(bias + k, features - k)), features - k);
        }
    }
};

}  // namespace
