// Gates of LSTM and GRU layers, 16 units at a time.
//
// One polynomial gives both functions. With k = round(x / ln 2) and r = x - k ln 2, |r| <= ln(2) / 2,
//
//     expm1(r) = r + r^2 P(r)      exp(x) = 2^k expm1(r) + 2^k      expm1(x) = 2^k expm1(r) + (2^k - 1)
//     sigmoid(x) = 1 / (1 + exp(-x))      tanh(x) = expm1(2 x) / (expm1(2 x) + 2)
//
// P is of degree 3 and leaves an error of 4e-9; both functions are within 1.5e-7 of the truth, tanh relative to it too.
// No product is fused with a sum, so that every instruction set gives the same bits.

#pragma once

#include "isa.h"

namespace {

template <class Simd>
struct GateKernels {
    using Floats = typename Simd::Floats;

    // expm1(x) = small + (power - 1).
    struct Exponential {
        Floats small, power;
    };

    // Beyond +-87 as if there, where 2^k and its inverse are normal numbers; NaN stays NaN.
    static Exponential exponential(Floats x) {
        const Floats low = Simd::set(-87.0f), high = Simd::set(87.0f);
        const Floats finite = Simd::min(Simd::max(x, low), high);  // NaN has become a number, which power() needs
        const Floats k = Simd::round(Simd::mul(finite, Simd::set(1.44269504f)));
        const Floats inside = Simd::min(high, Simd::max(low, x));
        const Floats coarse = Simd::sub(inside, Simd::mul(k, Simd::set(0.693359375f)));  // exact: few bits
        const Floats r = Simd::sub(coarse, Simd::mul(k, Simd::set(-2.12194440e-4f)));
        constexpr float coefficients[] = {0.008369187f, 0.04166624f, 0.16666505f, 0.5f};
        Floats p = Simd::set(0.0013948643f);
        for (const float coefficient : coefficients) p = Simd::add(Simd::mul(p, r), Simd::set(coefficient));
        p = Simd::add(Simd::mul(p, Simd::mul(r, r)), r);
        const Floats power = Simd::power(k);
        return {Simd::mul(power, p), power};
    }

    static Floats sigmoid(Floats x) {
        const Exponential e = exponential(Simd::sub(Simd::set(0.0f), x));
        const Floats one = Simd::set(1.0f);
        return Simd::div(one, Simd::add(one, Simd::add(e.small, e.power)));
    }

    static Floats tanh(Floats x) {
        const Exponential e = exponential(Simd::add(x, x));
        const Floats expm1 = Simd::add(e.small, Simd::sub(e.power, Simd::set(1.0f)));
        return Simd::div(expm1, Simd::add(expm1, Simd::set(2.0f)));
    }

    static Floats of_x(const gq::Gates& gates, int gate, int64_t token) {
        const Floats bias = Simd::load(gates.bias_x + gate * gates.bias_stride);
        return Simd::add(Simd::load(gates.x + gate * gates.x_stride + 16 * token), bias);
    }
    static Floats of_h(const gq::Gates& gates, int gate, int64_t token) {
        const Floats bias = Simd::load(gates.bias_h + gate * gates.bias_stride);
        return Simd::add(Simd::load(gates.h + gate * gates.h_stride + 16 * token), bias);
    }
    static Floats sum(const gq::Gates& gates, int gate, int64_t token) {
        return Simd::add(of_x(gates, gate, token), of_h(gates, gate, token));
    }

    static void lstm(const gq::Gates& gates, int64_t count, float* c, float* m) {
        for (int64_t token = 0; token < count; ++token) {
            const Floats in = sigmoid(sum(gates, 0, token)), forget = sigmoid(sum(gates, 1, token));
            const Floats candidate = tanh(sum(gates, 2, token)), out = sigmoid(sum(gates, 3, token));
            const Floats kept = Simd::mul(forget, Simd::load(c + 16 * token));
            const Floats next = Simd::add(kept, Simd::mul(in, candidate));
            Simd::store(c + 16 * token, next);
            Simd::store(m + 16 * token, Simd::mul(out, tanh(next)));
        }
    }

    static void gru(const gq::Gates& gates, int64_t count, float* h) {
        for (int64_t token = 0; token < count; ++token) {
            const Floats reset = sigmoid(sum(gates, 0, token)), keep = sigmoid(sum(gates, 1, token));
            const Floats hidden = Simd::mul(reset, of_h(gates, 2, token));
            const Floats candidate = tanh(Simd::add(of_x(gates, 2, token), hidden));
            const Floats renewed = Simd::mul(Simd::sub(Simd::set(1.0f), keep), candidate);
            Simd::store(h + 16 * token, Simd::add(renewed, Simd::mul(keep, Simd::load(h + 16 * token))));
        }
    }
};

}  // namespace
