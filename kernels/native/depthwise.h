// Depthwise convolution of 16 channels, one to a lane: contiguous windows of x, see depthwise.cpp.

#pragma once

#include "isa.h"

namespace {

template <class Simd>
struct DepthwiseKernels {
    using Floats = typename Simd::Floats;

    // COUNT outputs, which share each tap as it is loaded.
    template <int COUNT>
    static void outputs(const float* taps, int64_t tap_count, const float* x, const float* bias, float* y,
                        int64_t stride, int64_t dilation) {
        Floats sums[COUNT];
        for (int t = 0; t < COUNT; ++t) sums[t] = Simd::load(bias);
        for (int64_t j = 0; j < tap_count; ++j) {
            const Floats tap = Simd::load(taps + 16 * j);
            const float* moment = x + 16 * dilation * j;
            for (int t = 0; t < COUNT; ++t) sums[t] = Simd::fma(tap, Simd::load(moment + 16 * stride * t), sums[t]);
        }
        for (int t = 0; t < COUNT; ++t) Simd::store(y + 16 * t, sums[t]);
    }

    static void depthwise(const float* taps, int64_t tap_count, const float* x, const float* bias, float* y,
                          int64_t count, int64_t stride, int64_t dilation) {
        int64_t t = 0;
        for (; t + 8 <= count; t += 8)
            outputs<8>(taps, tap_count, x + 16 * stride * t, bias, y + 16 * t, stride, dilation);
        for (; t < count; ++t) outputs<1>(taps, tap_count, x + 16 * stride * t, bias, y + 16 * t, stride, dilation);
    }
};

}  // namespace
