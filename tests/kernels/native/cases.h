// Random arguments of the C interface, in memory of exactly their size, and what the definitions give for them.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <vector>

#include "gq_native.h"

class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) { bits(); }

    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 32);
    }
    int64_t below(int64_t count) { return bits() % static_cast<uint32_t>(count); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool one_in(int64_t count) { return below(count) == 0; }
    float real() { return static_cast<float>(bits()) / 2147483648.0f - 1.0f; }

    // Now and then what arithmetic stumbles over.
    float any_real() {
        static const float edges[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 1e-38f, 1e-45f};
        return one_in(8) ? edges[below(9)] : real();
    }

   private:
    uint64_t state_;
};

// Memory beyond which nobody reads or writes unseen.
inline std::shared_ptr<char> allocate(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)  // which watches what lies before it, too
    return {static_cast<char*>(malloc(bytes + 8)) + 8, [](char* first) { free(first - 8); }};
#else  // a page that must not be touched
    const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page + page;
    void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char* end = static_cast<char*>(pages) + size - page;
    mprotect(end, page, PROT_NONE);
    return {end - bytes, [=](char*) { munmap(pages, size); }};
#endif
}

// An array that ends where its memory does, begins no better aligned than its elements must be, and is full of NaN at
// first, so that what is left unwritten shows.
template <class T>
class Exact {
   public:
    Exact() : Exact(0) {}
    explicit Exact(int64_t count) : memory_(allocate(count * sizeof(T))), count_(count) {
        memset(memory_.get(), 0xFF, count * sizeof(T));
    }
    Exact(Exact&&) = default;
    Exact& operator=(Exact&&) = default;

    T* data() const { return reinterpret_cast<T*>(memory_.get()); }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) const { return data()[i]; }
    T* begin() const { return data(); }
    T* end() const { return data() + count_; }

   private:
    std::shared_ptr<char> memory_;
    int64_t count_;
};

inline Exact<float> random_reals(Random& random, int64_t count) {
    Exact<float> reals(count);
    for (float& value : reals) value = random.real();
    return reals;
}

inline float e4m3(uint8_t byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    const float size = exponent ? ldexpf(8.0f + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return byte & 128 ? -size : size;
}

// --- weights ---------------------------------------------------------------------------------------------------------

struct Shape {
    int bits, kind, groups;
    int64_t rows, columns;
    bool scale_per_row;
};

inline std::string describe(const Shape& shape) {
    char text[128];
    snprintf(text, sizeof text, "%d bits, codebook %d, %lld x %lld in %d groups, %s", shape.bits, shape.kind,
             (long long)shape.rows, (long long)shape.columns, shape.groups,
             shape.scale_per_row ? "a scale per row" : "one scale");
    return text;
}

inline Shape random_shape(Random& random) {
    static const int groups[] = {1, 1, 3, 4};
    const int count = groups[random.below(4)];
    const int bits = static_cast<int>(random.between(1, 8)), kind = static_cast<int>(random.below(3));
    return {bits, kind, count, count * random.between(1, 40), random.between(1, 100), !random.one_in(3)};
}

// Widths of the bit planes, see kernels/packing.py.
inline std::vector<int> plane_widths(int bits) {
    if (bits == 8) return {4, 4};
    std::vector<int> widths;
    for (int width = 4; width; width /= 2)
        if (bits & width) widths.push_back(width);
    return widths;
}

inline Exact<uint8_t> pack(const std::vector<uint8_t>& codes, int bits) {
    const int64_t count = static_cast<int64_t>(codes.size());
    int64_t bytes = 0;
    for (const int width : plane_widths(bits)) bytes += (count * width + 7) / 8;
    Exact<uint8_t> planes(bytes);
    memset(planes.data(), 0, bytes);
    uint8_t* plane = planes.data();
    int shift = bits;
    for (const int width : plane_widths(bits)) {
        shift -= width;
        for (int64_t i = 0; i < count; ++i)
            plane[i * width / 8] |= (codes[i] >> shift & ((1 << width) - 1)) << i * width % 8;
        plane += (count * width + 7) / 8;
    }
    return planes;
}

struct Packed {
    Shape shape;
    std::vector<uint8_t> codes;
    Exact<uint8_t> codebook, panels, planes;
    Exact<float> scale;

    Packed(Random& random, const Shape& of)
        : shape(of),
          codebook((int64_t{1} << of.bits) * (of.kind == GQ_FLOAT32 ? 4 : 1)),
          panels(gq_panel_bytes(of.bits, of.rows, of.columns, of.groups)),
          scale(of.scale_per_row ? of.rows : 1) {
        for (int code = 0; code < 1 << of.bits; ++code) set_entry(code, random);
        for (float& value : scale) value = 0.5f + 0.1f * random.real();
        for (int64_t i = 0; i < of.rows * of.columns; ++i)
            codes.push_back(first_equal(static_cast<uint8_t>(random.below(int64_t{1} << of.bits))));
        planes = pack(codes, of.bits);
        const gq_weight weight = c();
        if (gq_to_panels(planes.data(), planes.size(), &weight)) throw std::string(gq_error());
    }

    gq_weight c() const {
        return {panels.data(), panels.size(),    codebook.data(), codebook.size(), scale.data(),
                scale.size(),  shape.rows,       shape.columns,   shape.bits,      shape.groups,
                shape.kind};
    }

    int integer(uint8_t code) const { return static_cast<int8_t>(codebook[code]); }

    float value(uint8_t code) const {
        if (shape.kind == GQ_INT8) return static_cast<float>(integer(code)) / 127.0f;
        if (shape.kind == GQ_E4M3) return e4m3(codebook[code]) / 256.0f;
        float value;
        memcpy(&value, codebook.data() + 4 * code, 4);
        return value;
    }

    uint8_t code(int64_t row, int64_t column) const { return codes[row * shape.columns + column]; }
    float row_scale(int64_t row) const { return scale[shape.scale_per_row ? row : 0]; }

   private:
    void set_entry(int code, Random& random) {
        const float value = random.real();
        const uint8_t byte = static_cast<uint8_t>(random.bits());
        if (shape.kind == GQ_FLOAT32)
            memcpy(codebook.data() + 4 * code, &value, 4);
        else
            codebook[code] = shape.kind == GQ_E4M3 && (byte & 127) == 127 ? 0 : byte;  // not NaN
    }

    // Panels of 8 bits hold int8 entries, not codes: of equal entries the first comes back.
    uint8_t first_equal(uint8_t code) const {
        if (shape.kind != GQ_INT8 || shape.bits != 8) return code;
        for (int first = 0; first < code; ++first)
            if (codebook[first] == codebook[code]) return static_cast<uint8_t>(first);
        return code;
    }
};

// --- tokens ----------------------------------------------------------------------------------------------------------

inline float token_scale(const float* x, int64_t count, float limit) {
    float most = 0.0f;
    for (int64_t i = 0; i < count; ++i)
        if (!(fabsf(x[i]) <= most)) most = fabsf(x[i]);
    for (int64_t i = 0; i < count; ++i)
        if (isnan(x[i])) return NAN;
    const float scale = most / limit;
    return !(scale < INFINITY) ? NAN : scale < 1.17549435e-38f ? 0.0f : scale;
}

inline int8_t rounded(float x, float scale) {
    return scale > 0.0f ? static_cast<int8_t>(nearbyintf(x / scale)) : 0;
}

inline float rounded_e4m3(float x, float scale) {
    if (!(scale > 0.0f)) return 0.0f;
    const float unit = x / scale;
    const float quantum = ldexpf(1.0f, (fabsf(unit) < 0.015625f ? -6 : ilogbf(unit)) - 3);
    return nearbyintf(unit / quantum) * quantum;
}

// x (count,) as a layer with these activations sees it.
inline std::vector<float> seen(const float* x, int64_t count, int activations) {
    std::vector<float> result(x, x + count);
    if (activations == GQ_NONE) return result;
    const float scale = token_scale(x, count, activations == GQ_ACTIVATIONS_INT8 ? 127.0f : 448.0f);
    for (float& value : result)
        value = scale * (activations == GQ_ACTIVATIONS_INT8 ? rounded(value, scale) : rounded_e4m3(value, scale));
    return result;
}

// --- recurrent layers ------------------------------------------------------------------------------------------------

// Sequences of falling lengths, time step by time step.
struct Recurrent {
    Packed ih, hh, hr;
    gq_weight weights[3];
    Exact<float> x, h0, c0, bias_ih, bias_hh, out, h, c;
    Exact<int64_t> segments;
    gq_recurrent_arguments of;

    struct Sizes {
        bool lstm, projected;
        int64_t inputs, hidden, state, sequences, length;
    };

    static Sizes random_sizes(Random& random) {
        const bool lstm = !random.one_in(3), projected = lstm && random.one_in(2);
        const int64_t hidden = random.between(1, 40);
        return {lstm,   projected, random.between(1, 70), hidden, projected ? random.between(1, 40) : hidden,
                random.between(1, 5), random.between(1, 5)};
    }

    static Shape shape(Random& random, int groups, int64_t rows, int64_t columns, bool integers) {
        const int bits = static_cast<int>(random.between(1, 8));
        return {bits, integers ? GQ_INT8 : static_cast<int>(random.below(3)), groups, rows, columns, true};
    }

    Recurrent(Random& random, bool integers) : Recurrent(random, integers, random_sizes(random)) {}

    Recurrent(Random& random, bool integers, const Sizes& sizes)
        : ih(random, shape(random, sizes.lstm ? 4 : 3, (sizes.lstm ? 4 : 3) * sizes.hidden, sizes.inputs, integers)),
          hh(random, shape(random, sizes.lstm ? 4 : 3, (sizes.lstm ? 4 : 3) * sizes.hidden, sizes.state, integers)),
          hr(random, shape(random, 1, sizes.state, sizes.hidden, integers)),
          weights{ih.c(), hh.c(), hr.c()},
          h0(random_reals(random, sizes.sequences * sizes.state)),
          c0(random_reals(random, sizes.lstm ? sizes.sequences * sizes.hidden : 0)),
          bias_ih(random_reals(random, ih.shape.rows)),
          bias_hh(random_reals(random, ih.shape.rows)),
          h(h0.size()),
          c(c0.size()),
          segments(4 * sizes.length) {
        int64_t row = 0, before = -1, count = sizes.sequences;
        for (int64_t step = 0; step < sizes.length; ++step) {
            const int64_t segment[4] = {row, 0, count, before};
            memcpy(segments.data() + 4 * step, segment, sizeof segment);
            before = row;
            row += count;
            count = random.between(1, count);
        }
        x = random_reals(random, row * sizes.inputs);
        out = Exact<float>(row * sizes.state);
        const auto activations = [&] {
            return integers ? int32_t{GQ_ACTIVATIONS_INT8} : static_cast<int32_t>(random.below(3));
        };
        const bool biased = random.one_in(2);
        of = {&weights[0],
              &weights[1],
              sizes.projected ? &weights[2] : nullptr,
              activations(),
              activations(),
              activations(),
              x.data(),
              x.size(),
              row,
              h0.data(),
              sizes.lstm ? c0.data() : nullptr,
              h0.size(),
              c0.size(),
              sizes.sequences,
              biased ? bias_ih.data() : nullptr,
              biased ? bias_hh.data() : nullptr,
              biased ? bias_ih.size() : 0,
              biased ? bias_hh.size() : 0,
              segments.data(),
              sizes.length,
              out.data(),
              h.data(),
              sizes.lstm ? c.data() : nullptr,
              out.size(),
              h.size(),
              c.size(),
              1};
    }
};

// --- fake quantization -----------------------------------------------------------------------------------------------

// A flat table as kernels/tables.py defines it, of random centroids; its parts begin at multiples of K, see there.
struct FlatTable {
    int levels;
    float mu;
    Exact<float> of;

    FlatTable(Random& random, int bits) : levels(1 << bits), mu(random.one_in(3) ? 0.0f : 255.0f), of(6 * levels) {
        mu *= random.one_in(2) ? 1.0f : 1e-4f;
        std::vector<double> z(levels), c(levels);
        const double limit = random.one_in(2) ? 1.0 : 0.8;
        for (int i = 0; i < levels; ++i) {
            const double step = 2.0 / (levels - 1), shift = i && i < levels - 1 ? 0.3 * step * random.real() : 0.0;
            z[i] = limit * (i * step - 1.0 + shift);
            c[i] = expand(z[i]);
        }
        const double kappa = (1.0 + 3.0 * fabs(random.real())) * (levels - 1) / (2.0 * limit);
        float* to = of.data();
        for (int i = 0; i < levels - 1; ++i) *to++ = static_cast<float>(expand((z[i] + z[i + 1]) / 2));
        for (int i = 0; i < levels; ++i) *to++ = static_cast<float>(c[i]);
        for (int i = 1; i < levels - 1; ++i) *to++ = static_cast<float>(z[i]);
        *to++ = static_cast<float>(c[0]), *to++ = static_cast<float>(c[levels - 1]);
        for (int j = 0; j < levels - 1; ++j, ++to) {
            double mass[2] = {}, moment[2] = {};  // of the centroids to the left and to the right
            for (int i = 0; i < levels; ++i) {
                const double factor = exp(-kappa * fabs(z[i] - z[i > j ? j + 1 : j]));
                mass[i > j] += factor, moment[i > j] += factor * c[i];
            }
            to[0] = static_cast<float>(moment[0] / mass[0]);
            to[levels - 1] = static_cast<float>(moment[1] / mass[1] - moment[0] / mass[0]);
            to[2 * (levels - 1)] = static_cast<float>(log(mass[1] / mass[0]) - kappa * (z[j] + z[j + 1]));
        }
        to += 2 * (levels - 1);
        to[0] = static_cast<float>(2 * kappa), to[1] = mu;
        to[2] = static_cast<float>(z[0]), to[3] = static_cast<float>(z[levels - 1]);
    }

    double safe_mu() const { return mu > 1e-9 ? mu : 1e-9; }
    double compress(double x) const { return copysign(log1p(safe_mu() * fabs(x)) / log1p(safe_mu()), x); }
    double expand(double y) const { return copysign(expm1(fabs(y) * log1p(safe_mu())) / safe_mu(), y); }
    float value(int code) const { return of[levels - 1 + code]; }
    float bound(int side) const { return of[3 * levels - 3 + side]; }
    double left(int cell) const { return of[3 * levels - 1 + cell]; }
    double jump(int cell) const { return of[4 * levels - 2 + cell]; }
    double offset(int cell) const { return of[5 * levels - 3 + cell]; }
    double curve(int i) const { return of[6 * levels - 4 + i]; }
};

// What one weight comes to, as kernels/fake_quantize.py has it.
struct FakeQuantized {
    int code = 0, cell = 0;
    double q, y, sigma, d, slope, slope_mu;  // slopes of q in x, and of y in mu
    int side = 0;                            // -1 below the bounds, 1 above

    FakeQuantized(const FlatTable& table, float weight, float scale) {
        for (int i = 0; i < table.levels - 1; ++i) code += scale * table.of[i] < weight;
        double x = scale == 0.0f ? 0.0 : static_cast<double>(weight) / scale;
        side = x < table.bound(0) ? -1 : x > table.bound(1);
        if (side) x = table.bound(side > 0);
        y = table.compress(x);
        for (int i = 0; i < table.levels - 2; ++i) cell += table.of[2 * table.levels - 1 + i] < y;
        sigma = 1.0 / (1.0 + exp(-table.curve(0) * y - table.offset(cell)));
        q = table.left(cell) + table.jump(cell) * sigma;
        d = table.jump(cell) * sigma * (1.0 - sigma);
        const double mu = table.safe_mu(), length = log1p(mu), grown = 1.0 + mu * fabs(x);
        slope = d * table.curve(0) * mu / (length * grown);
        const double size = fabs(x), series = 0.5 * size * (1.0 - size);  // of a mu that counts as 0
        const double closed = (size / grown - fabs(y) / (1.0 + mu)) / length;
        slope_mu = side ? 0.0 : copysign(mu > 1e-9 ? closed : series, x);
    }
};
