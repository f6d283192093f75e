// Fake quantization, 16 weights at a time; kernels/fake_quantize.py has the mathematics and its names.
//
// Codes are the same bits on every instruction set, other results need not be.

#pragma once

#include "isa.h"

namespace {

// Counts the borders below each of 16 numbers by going down a tree of them: the very comparison with one border decides
// each bit, so that no grid, however crowded, needs corrections. The first four levels share a table of 16 entries,
// deeper ones have one each.
template <class Simd, int BITS, bool DEEP = (BITS > 4)>
struct Search {
    typename Simd::template Table<BITS> nodes;

    explicit Search(const float* tree) : nodes(tree) {}

    // place(border) < number is what is asked of a border.
    template <class Place>
    GQ_INLINE typename Simd::Ints count(typename Simd::Floats number, const Place& place) const {
        typename Simd::Ints node = Simd::set_ints(1);
        for (int level = 0; level < BITS; ++level)
            node = Simd::child(node, place(nodes.template look_up<0>(Simd::bytes(node))), number);
        return Simd::add(node, Simd::set_ints(-(1 << BITS)));
    }
};

template <class Simd, int BITS>
struct Search<Simd, BITS, true> {
    Search<Simd, BITS - 1> upper;
    typename Simd::template Table<BITS - 1> nodes;

    explicit Search(const float* tree) : upper(tree), nodes(tree + (1 << (BITS - 1))) {}

    template <class Place>
    GQ_INLINE typename Simd::Ints count(typename Simd::Floats number, const Place& place) const {
        const typename Simd::Ints node = upper.count(number, place);
        return Simd::child(node, place(nodes.template look_up<0>(Simd::bytes(node))), number);
    }
};

template <class Simd>
struct FakeQuantizeKernels {
    using Floats = typename Simd::Floats;
    using Ints = typename Simd::Ints;
    template <int BITS>
    using Table = typename Simd::template Table<BITS>;

    template <int BITS>
    GQ_INLINE static Floats look_up(const Table<BITS>& table, Ints index) {
        return table.template look_up<0>(Simd::bytes(index));
    }

    // --- hard

    // write(k, weight, scale, code, count) for every 16 weights from the k-th on, of which `count` are there.
    template <int BITS, class Write>
    GQ_INLINE static void each_code(const gq::Quantizer& quantizer, const gq::Span& span, const float* w,
                                    const Write& write) {
        const Search<Simd, BITS> search(quantizer.borders);
        span.each_row([&](int64_t first, int64_t last, int64_t row) {
            const Floats scale = Simd::set(span.scale[row]);
            for (int64_t k = first; k < last; k += 16) {
                const Floats weight = Simd::load(w + k, last - k);
                const auto scaled = [&](Floats border) { return Simd::mul(scale, border); };
                write(k, weight, scale, search.count(weight, scaled), last - k);
            }
        });
    }

    template <int BITS>
    static void encode(const gq::Quantizer& quantizer, const gq::Span& span, const float* w, uint8_t* codes) {
        each_code<BITS>(quantizer, span, w, [&](int64_t k, Floats, Floats, Ints code, int64_t count) {
            if (count >= 16) return Simd::store_codes(codes + k, code);
            uint8_t some[16];
            Simd::store_codes(some, code);
            for (int64_t lane = 0; lane < count; ++lane) codes[k + lane] = some[lane];
        });
    }

    template <int BITS>
    static void hard(const gq::Quantizer& quantizer, const gq::Span& span, const float* w, float* out) {
        const Table<BITS> values(quantizer.values);
        each_code<BITS>(quantizer, span, w, [&](int64_t k, Floats weight, Floats scale, Ints code, int64_t count) {
            Simd::store(out + k, scaled(weight, look_up(values, code), scale), count);
        });
    }

    // unit times scale: NaN where the weight is not finite, +0 and not -0.
    GQ_INLINE static Floats scaled(Floats weight, Floats unit, Floats scale) {
        return Simd::add(Simd::sub(weight, weight), Simd::mul(unit, scale));
    }

    // --- soft

    // ln(1 + v) of v >= 0, where `grown` is 1 + v. With 2^k near that and 1 + f = (1 + v) / 2^k, it is
    // k ln 2 + f + f^2 P(f), to 3e-8 of it and rounding; f is found from v, so that nothing of a small v is lost.
    GQ_INLINE static Floats log1p(Floats v, Floats grown) {
        const Floats one = Simd::set(1.0f);
        const Floats k = Simd::exponent(Simd::mul(grown, Simd::set(1.41421356f)));
        const Floats shrink = Simd::power(Simd::sub(Simd::set(0.0f), k));
        const Floats f = Simd::fma(v, shrink, Simd::sub(shrink, one));
        constexpr float coefficients[] = {-0.143075228f, 0.149179727f, -0.165705085f, 0.199620724f,
                                          -0.250017554f, 0.333339512f, -0.499999911f};
        Floats p = Simd::set(0.0873484462f);
        for (const float coefficient : coefficients) p = Simd::fma(p, f, Simd::set(coefficient));
        return Simd::fma(k, Simd::set(0.693147181f), Simd::fma(Simd::mul(f, f), p, f));
    }

    // 2^a, to 9e-8 of it; beyond +-50 as if there, so that nothing made of it is subnormal, which is slow.
    GQ_INLINE static Floats exp2(Floats a) {
        const Floats within = Simd::min(Simd::max(a, Simd::set(-50.0f)), Simd::set(50.0f));
        const Floats whole = Simd::round(within), r = Simd::sub(within, whole);
        constexpr float coefficients[] = {0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f, 1.0f};
        Floats p = Simd::set(0.00132647273f);
        for (const float coefficient : coefficients) p = Simd::fma(p, r, Simd::set(coefficient));
        return Simd::mul(Simd::power(whole), p);
    }

    // What is known of up to MOST neighbouring weights of a row. It is computed in passes, each short enough for a
    // processor to have several groups of 16 in work at once.
    struct Batch {
        static constexpr int64_t MOST = 256;
        alignas(64) float size[MOST], y[MOST];  // |x| within the bounds; y times ln(1 + mu)
        alignas(64) float left[MOST], jump[MOST], decay[MOST];  // sigma = 1 / (1 + decay)
        alignas(64) int32_t cell[MOST];
    };

    template <int BITS>
    struct Curve {
        Search<Simd, BITS> search;
        Table<BITS> left, jump, offset;
        Floats low, high, mu, rate;

        explicit Curve(const gq::Quantizer& of)
            : search(of.edges),
              left(of.left),
              jump(of.jump),
              offset(of.offset),
              low(Simd::set(of.low)),
              high(Simd::set(of.high)),
              mu(Simd::set(of.mu)),
              rate(Simd::set(of.rate)) {}

        GQ_INLINE void fill(Batch& batch, const float* w, int64_t count, Floats unscale) const {
            const Floats zero = Simd::set(0.0f), one = Simd::set(1.0f);
            for (int64_t k = 0; k < count; k += 16) {
                const Floats x = Simd::mul(Simd::load(w + k, count - k), unscale);
                const Floats clamped = Simd::min(Simd::max(x, low), high);
                const Floats size = Simd::max(clamped, Simd::sub(zero, clamped)), v = Simd::mul(mu, size);
                const Floats log = log1p(v, Simd::add(one, v));
                Simd::store(batch.size + k, size);
                Simd::store(batch.y + k, Simd::if_less(clamped, zero, Simd::sub(zero, log), log));
            }
            for (int64_t k = 0; k < count; k += 16) {
                const Floats y = Simd::load(batch.y + k);
                const Ints cell = search.count(y, [](Floats edge) { return edge; });
                Simd::store_ints(batch.cell + k, cell);
                Simd::store(batch.left + k, look_up(left, cell));
                Simd::store(batch.jump + k, look_up(jump, cell));
                Simd::store(batch.decay + k, Simd::fma(rate, y, look_up(offset, cell)));
            }
            for (int64_t k = 0; k < count; k += 16) Simd::store(batch.decay + k, exp2(Simd::load(batch.decay + k)));
        }
    };

    // A row's scale, and what its weights are multiplied by to give x: 0 where the scale is too small to invert, so that
    // x is 0 there and not NaN.
    struct Row {
        Floats scale, unscale;

        explicit Row(float value) : scale(Simd::set(value)), unscale(Simd::set(inverse(value))) {}

        static float inverse(float value) {
            const float result = 1.0f / value;
            return __builtin_isfinite(result) ? result : 0.0f;
        }
    };

    // body(k, count) for batches of `count` weights from the k-th on.
    template <class Body>
    GQ_INLINE static void each_batch(int64_t first, int64_t last, const Body& body) {
        for (int64_t k = first; k < last; k += Batch::MOST) body(k, last - k < Batch::MOST ? last - k : Batch::MOST);
    }

    template <int BITS>
    static void soft(const gq::Quantizer& quantizer, const gq::Span& span, const float* w, float* out) {
        const Curve<BITS> curve(quantizer);
        const Floats one = Simd::set(1.0f);
        Batch batch;
        span.each_row([&](int64_t first, int64_t last, int64_t index) {
            const Row row(span.scale[index]);
            each_batch(first, last, [&](int64_t start, int64_t count) {
                curve.fill(batch, w + start, count, row.unscale);
                for (int64_t k = 0; k < count; k += 16) {
                    const Floats weight = Simd::load(w + start + k, count - k);
                    const Floats sigma = Simd::div(one, Simd::add(one, Simd::load(batch.decay + k)));
                    const Floats q = Simd::fma(Simd::load(batch.jump + k), sigma, Simd::load(batch.left + k));
                    Simd::store(out + start + k, scaled(weight, q, row.scale), count - k);
                }
            });
        });
    }

    // --- backward

    // The sum of 16 lanes.
    static double total(Floats lanes) {
        float each[16];
        double sums[8];
        Simd::store(each, lanes);
        for (int i = 0; i < 8; ++i) sums[i] = static_cast<double>(each[i]) + each[i + 8];
        return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }

    // Sums over the weights of a span that are the gradient of the table. Those by cell are kept in several copies, so
    // that neighbouring weights of one cell do not wait for each other.
    template <int BITS>
    struct TableSums {
        typedef float Four __attribute__((vector_size(16)));
        static constexpr int CELLS = 1 << BITS, COPIES = BITS < 7 ? 16 : 1024 / CELLS;  // at most 16 KB

        alignas(64) Four cells[CELLS][COPIES];  // G, G sigma, G d
        alignas(64) Four batch[Batch::MOST];
        Floats y, mu, below, above;

        TableSums() : cells{}, y(Simd::set(0.0f)), mu(y), below(y), above(y) {}

        void add(const int32_t* cell, int64_t count) {
            for (int64_t k = 0; k < count; k += 16)
                for (int place = 0; place < 16; ++place)
                    cells[cell[k + Simd::interleaved(place)]][place % COPIES] += batch[k + place];
        }

        void write(double* to) const {
            for (int cell = 0; cell < CELLS; ++cell)
                for (int of = 0; of < 3; ++of) {
                    double sum = 0.0;
                    for (int copy = 0; copy < COPIES; ++copy) sum += cells[cell][copy][of];
                    to[of * CELLS + cell] = sum;
                }
            to += 3 * CELLS;
            to[0] = total(y), to[1] = total(mu), to[2] = total(below), to[3] = total(above);
        }
    };

    // The curve at 16 weights, and the gradient there.
    struct Point {
        Floats g, bad;  // bad: NaN where the weight is not finite, else 0
        Floats x, size, sigma, d, ungrown;  // ungrown = 1 / (1 + mu |x|)
    };

    template <int BITS>
    struct BackwardPass {
        const gq::Quantizer& quantizer;
        const gq::Backward& pass;
        const Curve<BITS> curve;
        const Floats zero, one, straight, steepness;
        Batch batch;
        TableSums<BITS> sums;

        BackwardPass(const gq::Quantizer& of, const gq::Backward& what)
            : quantizer(of),
              pass(what),
              curve(of),
              zero(Simd::set(0.0f)),
              one(Simd::set(1.0f)),
              straight(Simd::set(what.straight_through)),
              steepness(Simd::set((1.0f - what.straight_through) * of.steepness)) {}

        // Part of a row; returns dscale with what that adds to it.
        GQ_INLINE Floats run(int64_t start, int64_t count, const Row& row, Floats dscale) {
            curve.fill(batch, pass.weight + start, count, row.unscale);
            for (int64_t k = 0; k < count; k += 16) {
                const Point at = point(start, k, count, row);
                const Floats slope = Simd::add(at.bad, Simd::fma(steepness, Simd::mul(at.d, at.ungrown), straight));
                Simd::store(pass.dweight + start + k, Simd::mul(at.g, slope), count - k);
                const Floats q = Simd::fma(Simd::load(batch.jump + k), at.sigma, Simd::load(batch.left + k));
                dscale = Simd::fma(at.g, Simd::sub(q, Simd::mul(slope, inner(at))), dscale);
                if (pass.table) add(at, k, row);
            }
            if (pass.table) sums.add(batch.cell, count);
            return dscale;
        }

        GQ_INLINE Point point(int64_t start, int64_t k, int64_t count, const Row& row) const {
            const Floats weight = Simd::load(pass.weight + start + k, count - k), size = Simd::load(batch.size + k);
            const Floats decay = Simd::load(batch.decay + k), decayed = Simd::add(one, decay);
            const Floats grown = Simd::fma(curve.mu, size, one);
            const Floats both = Simd::div(one, Simd::mul(decayed, grown));  // of two divisions
            const Floats sigma = Simd::mul(both, grown), bell = Simd::mul(Simd::mul(decay, sigma), sigma);
            return {Simd::load(pass.grad + start + k, count - k),
                    Simd::sub(weight, weight),
                    Simd::mul(weight, row.unscale),
                    size,
                    sigma,
                    Simd::mul(Simd::load(batch.jump + k), bell),
                    Simd::mul(both, decayed)};
        }

        // x, and 0 where it is clamped.
        GQ_INLINE Floats inner(const Point& at) const {
            return Simd::if_less(curve.high, at.x, zero, Simd::if_less(at.x, curve.low, zero, at.x));
        }

        GQ_INLINE void add(const Point& at, int64_t k, const Row& row) {
            const Floats g = Simd::fma(at.g, row.scale, at.bad), through = Simd::mul(g, at.d);
            Simd::interleave(reinterpret_cast<float*>(sums.batch + k), g, Simd::mul(g, at.sigma), through);
            sums.y = Simd::fma(through, Simd::load(batch.y + k), sums.y);
            sums.mu = Simd::fma(through, slope_mu(at), sums.mu);
            sums.below = Simd::add(sums.below, Simd::if_less(at.x, curve.low, through, zero));
            sums.above = Simd::add(sums.above, Simd::if_less(curve.high, at.x, through, zero));
        }

        // dF/dmu of a small mu; else that part of it which is not y's (fake_quantize.cpp).
        GQ_INLINE Floats slope_mu(const Point& at) const {
            if (!quantizer.small_mu) return Simd::mul(inner(at), at.ungrown);
            Floats p = Simd::set(quantizer.series[4]);
            for (int n = 3; n >= 0; --n) p = Simd::fma(p, at.size, Simd::set(quantizer.series[n]));
            return Simd::mul(inner(at), p);
        }
    };

    template <int BITS>
    static void backward(const gq::Quantizer& quantizer, const gq::Span& span, const gq::Backward& pass) {
        BackwardPass<BITS> own(quantizer, pass);
        span.each_row([&](int64_t first, int64_t last, int64_t index) {
            const Row row(span.scale[index]);
            Floats dscale = Simd::set(0.0f);
            each_batch(first, last, [&](int64_t k, int64_t count) { dscale = own.run(k, count, row, dscale); });
            *(first == index * span.columns ? pass.dscale + index : pass.rest) = total(dscale);
        });
        if (pass.table) own.sums.write(pass.table);
    }
};

}  // namespace
