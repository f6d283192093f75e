// Fake quantization: gq_fake_quantize, gq_fake_quantize_backward, gq_encode.

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"
#include "scratch.h"
#include "threads.h"

namespace gq {
namespace {

constexpr int64_t CHUNK = 1 << 15;  // weights whose sums are float32, for any number of threads
constexpr int64_t WAVE = 64;        // chunks between which threads meet, so that their sums take little memory
constexpr int64_t COST = 16;        // of a weight, in multiplications
constexpr double LEAST_MU = 1e-9;   // where F is the identity to the last bit, and squares of mu |x| are normal numbers
constexpr double SMALL_MU = 0.03;   // below it dF/dmu in closed form cancels in float32; the series errs by mu^4

// Sorted borders as a tree of 2^bits - 1; of those that are not there, none is crossed.
void plant(const float* borders, int64_t count, int bits, float* tree) {
    for (int node = 1, level = 0; level < bits; ++level)
        for (int i = 0; i < 1 << level; ++i, ++node) {
            const int place = ((2 * i + 1) << (bits - level - 1)) - 1;
            tree[node] = place < count ? borders[place] : INFINITY;
        }
}

int check_table(const float* table, int64_t count) {
    int bits = 1;
    while (bits < 8 && count > 6 << bits) ++bits;
    check_array("table", table, count, 6 << bits);
    return bits;
}

// A flat table (kernels/tables.py) of 2^bits levels.
struct Table {
    int bits;
    int64_t levels;
    const float *thresholds, *values, *edges, *bounds, *left, *jump, *offset, *curve;
    double mu, log;  // mu, at least LEAST_MU, and ln(1 + mu)

    Table(const float* table, int width) : bits(width), levels(int64_t{1} << width), thresholds(table) {
        values = thresholds + levels - 1;
        edges = values + levels;
        bounds = edges + levels - 2;
        left = bounds + 2;
        jump = left + levels - 1;
        offset = jump + levels - 1;
        curve = offset + levels - 1;
        mu = std::max<double>(curve[1], LEAST_MU);
        log = std::log1p(mu);
    }

    double k() const { return curve[0]; }

    Quantizer quantizer() const {
        constexpr double log2_e = 1.4426950408889634;
        Quantizer of{};
        plant(thresholds, levels - 1, bits, of.borders);
        std::copy_n(values, levels, of.values);
        float stretched[256];
        for (int64_t i = 0; i < levels - 2; ++i) stretched[i] = static_cast<float>(edges[i] * log);
        plant(stretched, levels - 2, bits, of.edges);
        std::copy_n(left, levels - 1, of.left);
        std::copy_n(jump, levels - 1, of.jump);
        for (int64_t i = 0; i < levels - 1; ++i) of.offset[i] = static_cast<float>(-log2_e * offset[i]);
        of.low = bounds[0];
        of.high = bounds[1];
        of.mu = static_cast<float>(mu);
        of.rate = static_cast<float>(-log2_e * k() / log);
        of.steepness = static_cast<float>(k() * mu / log);
        of.small_mu = mu < SMALL_MU;
        expand_slope(of.series);
        return of;
    }

    // Of dF/dmu = (x / (1 + mu x) - F / (1 + mu)) / ln(1 + mu), x > 0, the factors of x, x^2, ...
    void expand_slope(float* series) const {
        const double safe = std::max(mu, 1e-7), length = std::log1p(safe);  // double has digits enough to subtract
        double power = 1.0 / length;
        for (int n = 1; n <= 5; ++n, power *= -safe)
            series[n - 1] = static_cast<float>(power * (1.0 - safe / (n * length * (1.0 + safe))));
    }

    // Its gradient, from sums over all weights as `Backward` has them.
    void gradient(const double* sums, float* to) const {
        float* part = std::fill_n(to, 3 * levels - 1, 0.0f);
        const double *jumps = sums + levels, *offsets = jumps + levels, *rest = offsets + levels;
        for (const double* of : {sums, jumps, offsets}) part = std::copy_n(of, levels - 1, part);
        const double y = rest[0], below = rest[2], above = rest[3];
        const double inner = y - log * (below * curve[2] + above * curve[3]);
        const double dmu = mu < SMALL_MU ? rest[1] : (rest[1] - inner / (log * (1 + mu))) / log;
        for (const double end : {y / log, k() * dmu, k() * below, k() * above}) *part++ = static_cast<float>(end);
    }
};

// The weight as a matrix with a scale for each row.
Span check_matrix(const float* weight, int64_t weight_count, const float* scale, int64_t scales) {
    check_array("weight", weight, weight_count, weight_count);
    check_between("weight_count", weight_count, 0, INT64_MAX - CHUNK);
    check_between("scales", scales, weight_count ? 1 : 0, INT64_MAX);
    check_array("scale", scale, scales, scales);
    if (scales && weight_count % scales)
        refuse("scales must divide the %lld weights, got %lld", (long long)weight_count, (long long)scales);
    return {scale, scales ? weight_count / scales : 0, 0, weight_count};
}

// run(span) for parts of the whole, which threads share.
template <class Run>
void share(const Span& whole, int32_t threads, const Run& run) {
    const int64_t units = cdiv(whole.end, 16);
    parallel(worthwhile(threads, COST * std::min(whole.end, INT64_MAX / COST)), [&](int index, int count) {
        Span span = whole;
        span.begin = 16 * (units * index / count);
        span.end = std::min(whole.end, 16 * (units * (index + 1) / count));
        run(span);
    });
}

// Sums by chunk in double, added up in the order of the chunks.
struct Sums {
    int64_t size;  // of the table's sums, 0 for none
    double *dscale, *table, *rest, *tables;

    Sums(Scratch<double>& scratch, int64_t scales, int64_t table_sums) : size(table_sums) {
        const int64_t count = scales + size + WAVE * (1 + size);
        dscale = scratch.reserve(count);
        std::fill_n(dscale, count, 0.0);
        table = dscale + scales;
        rest = table + size;
        tables = rest + WAVE;
    }

    // The span's own place among those of its wave.
    Backward own(Backward pass, int64_t place) const {
        pass.dscale = dscale;
        pass.rest = rest + place;
        pass.table = size ? tables + place * size : nullptr;
        return pass;
    }

    void add(const Span& span, int64_t place) {
        if (span.begin % span.columns) dscale[span.begin / span.columns] += rest[place];
        for (int64_t i = 0; i < size; ++i) table[i] += tables[place * size + i];
    }
};

template <class Kernel>
void run_backward(Kernel kernel, const Quantizer& quantizer, const Span& whole, const Backward& pass, Sums& sums,
                  int threads) {
    const auto chunk = [&](int64_t first) {
        Span span = whole;
        span.begin = first;
        span.end = std::min(whole.end, first + CHUNK);
        return span;
    };
    for (int64_t wave = 0; wave < whole.end; wave += WAVE * CHUNK) {
        const int64_t chunks = std::min(WAVE, cdiv(whole.end - wave, CHUNK));
        parallel(worthwhile(threads, COST * chunks * CHUNK), [&](int index, int count) {
            for (int64_t place = chunks * index / count; place < chunks * (index + 1) / count; ++place)
                kernel(quantizer, chunk(wave + place * CHUNK), sums.own(pass, place));
        });
        for (int64_t place = 0; place < chunks; ++place) sums.add(chunk(wave + place * CHUNK), place);
    }
}

}  // namespace
}  // namespace gq

int32_t gq_fake_quantize(const float* weight, int64_t weight_count, const float* scale, int64_t scales,
                         const float* table, int64_t table_count, int32_t soft, float* out, int64_t out_count,
                         int32_t threads) {
    using namespace gq;
    return guarded([&] {
        const Span whole = check_matrix(weight, weight_count, scale, scales);
        const int bits = check_table(table, table_count);
        check_between("soft", soft, 0, 1);
        check_array("out", out, out_count, weight_count);
        check_between("threads", threads, 1, INT32_MAX);
        const Quantizer quantizer = Table(table, bits).quantizer();
        const auto kernel = (soft ? current_isa().soft : current_isa().hard)[bits];
        share(whole, threads, [&](const Span& span) { kernel(quantizer, span, weight, out); });
    });
}

int32_t gq_fake_quantize_backward(const float* grad, int64_t grad_count, const float* weight, int64_t weight_count,
                                  const float* scale, int64_t scales, const float* table, int64_t table_count,
                                  float straight_through, float* dweight, int64_t dweight_count, float* dscale,
                                  int64_t dscale_count, float* dtable, int64_t dtable_count, int32_t threads) {
    using namespace gq;
    return guarded([&] {
        const Span whole = check_matrix(weight, weight_count, scale, scales);
        const int bits = check_table(table, table_count);
        check_array("grad", grad, grad_count, weight_count);
        check_array("dweight", dweight, dweight_count, weight_count);
        check_array("dscale", dscale, dscale_count, scales);
        check_array("dtable", dtable, dtable_count, dtable ? table_count : 0);
        check_between("threads", threads, 1, INT32_MAX);
        thread_local Scratch<double> scratch;
        const Table parts(table, bits);
        Sums sums(scratch, scales, dtable ? 3 * parts.levels + 4 : 0);
        const Backward pass{grad, weight, straight_through, dweight, nullptr, nullptr, nullptr};
        run_backward(current_isa().backward[bits], parts.quantizer(), whole, pass, sums, threads);
        std::copy_n(sums.dscale, scales, dscale);
        if (dtable) parts.gradient(sums.table, dtable);
    });
}

int32_t gq_encode(const float* weight, int64_t weight_count, const float* scale, int64_t scales, const float* borders,
                  int64_t border_count, uint8_t* codes, int64_t code_count, int32_t threads) {
    using namespace gq;
    return guarded([&] {
        const Span whole = check_matrix(weight, weight_count, scale, scales);
        check_between("border_count", border_count, 0, 255);
        check_array("borders", borders, border_count, border_count);
        check_array("codes", codes, code_count, weight_count);
        check_between("threads", threads, 1, INT32_MAX);
        int bits = 1;
        while (border_count >> bits) ++bits;
        Quantizer quantizer;
        plant(borders, border_count, bits, quantizer.borders);
        const auto kernel = current_isa().encode[bits];
        share(whole, threads, [&](const Span& span) { kernel(quantizer, span, weight, codes); });
    });
}
