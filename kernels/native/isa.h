// What one instruction set gives: a table of kernels. The table of each is filled in its own translation unit, compiled
// with that instruction set's flags; everything else of the library knows this table alone.

#pragma once

#include <stdint.h>

#include "gq_native.h"

// Functions in headers that several translation units share: they must not leave a copy of their own behind, of which
// the linker would keep any one, perhaps with instructions that this processor does not have.
#define GQ_INLINED __attribute__((always_inline))
#define GQ_INLINE inline GQ_INLINED
#define GQ_CALLED __attribute__((noinline))  // much code, of which one copy is enough

namespace gq {

constexpr int64_t BLOCK = 16;  // rows of a block: one SIMD lane each
constexpr int64_t TILE = 32;   // columns of a tile

GQ_INLINE constexpr int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bits of the code of one place and group of columns (gq_triton/kernels/panels.py): `count` of them, those from bit `to`
// on, are bits of a register's byte, from `bit` on.
struct Part {
    int register_, bit, count, to;
};

// The part of group j's code that begins with bit `to`. Of codes of `bits` bits, a byte has room for `whole`, and `left`
// bits beside them.
GQ_INLINE constexpr Part part_of(int bits, int j, int to) {
    const int whole = 8 / bits, left = 8 % bits;
    if (j < whole * bits) return {j / whole, j % whole * bits + to, bits - to, to};
    const int place = (j - whole * bits) * bits + to, more = left - place % left;
    return {place / left, 8 - more, bits - to < more ? bits - to : more, to};
}

enum Path { INTEGERS = 0, FLOATS = 1 };

// A checked weight, with what products need of it.
struct Weight {
    const uint8_t* panels;
    const void* codebook;
    const float* scale;
    int64_t scale_stride;  // 0 or 1
    int64_t rows, columns;
    int bits, groups, codebook_kind;

    GQ_INLINE int64_t group_rows() const { return rows / groups; }
    GQ_INLINE int64_t group_blocks() const { return cdiv(group_rows(), BLOCK); }
    GQ_INLINE int64_t blocks() const { return groups * group_blocks(); }
    GQ_INLINE int64_t tiles() const { return cdiv(columns, TILE); }
    GQ_INLINE int64_t block_bytes() const { return tiles() * bits * 64; }
    GQ_INLINE bool stores_values() const { return bits == 8 && codebook_kind == GQ_INT8; }
    // The first row of a block, and how many it has: blocks are ordered by their place in a group, then by group.
    GQ_INLINE int64_t first_row(int64_t block) const { return block % groups * group_rows() + block / groups * BLOCK; }
    GQ_INLINE int64_t row_count(int64_t block) const {
        const int64_t left = group_rows() - block / groups * BLOCK;
        return left < BLOCK ? left : BLOCK;
    }
};

// Tokens as products take them, which TokenRoom (tokens.h) makes: each of `padded` numbers (whole tiles), zeros beyond
// the weight's columns. Tokens that are multiplied together lie in a bundle: four numbers of its first token, four of
// its second and so on, then the next four of its first. Bundles follow one another.
struct Tokens {
    const int8_t* q;     // INTEGERS
    const int32_t* sum;  // of each token's integers
    const float* scale;  // of each token
    const float* x;      // FLOATS
    int64_t padded, count;
};

// Bundles hold 1, 2, 3, 4, 6, 8, 12, ... tokens: the size after, and the size before one.
GQ_INLINE constexpr int larger_bundle(int size) { return size == 1 ? 2 : size % 3 ? size / 2 * 3 : size / 3 * 4; }
GQ_INLINE constexpr int smaller_bundle(int size) {
    return size <= 3 ? size - 1 : size % 3 ? size / 4 * 3 : size / 3 * 2;
}

// How many tokens the next bundle holds of those left, at most `limit`. What it holds beyond those left nobody looks at.
GQ_INLINE int bundle_size(int64_t left, int limit) {
    int size = 1;
    while (size < left && size < limit) size = larger_bundle(size);
    return size;
}

// What products gave for the gates of 16 units: gate g of token t begins at g * stride + 16 t.
struct Gates {
    const float *x, *h;
    int64_t x_stride, h_stride;
    const float *bias_x = nullptr, *bias_h = nullptr;  // of gate g from g * bias_stride on
    int64_t bias_stride = 0;
};

// The table of a quantizer (kernels/tables.py), with what fake_quantize.h needs of it. Borders and edges are search
// trees: below node n, the root being 1, are 2 n (less) and 2 n + 1.
struct Quantizer {
    float borders[256], values[256];
    float edges[256], left[256], jump[256], offset[256];
    float low, high;  // the bounds of x
    float mu, rate;   // sigma = 1 / (1 + 2^(rate y + offset)), where y is not yet divided by ln(1 + mu)
    float steepness;  // dq/dx = steepness J sigma (1 - sigma) / (1 + mu |x|)
    bool small_mu;    // dF/dmu is then x (series[0] + series[1] |x| + ... )
    float series[5];
};

// Part of a matrix whose rows have a scale each: numbers begin <= i < end, row after row.
struct Span {
    const float* scale;
    int64_t columns, begin, end;

    // body(first, last, row) for what is there of each row.
    template <class Body>
    GQ_INLINE void each_row(const Body& body) const {
        for (int64_t first = begin, last; first < end; first = last) {
            const int64_t row = first / columns, next = (row + 1) * columns;
            last = next < end ? next : end;
            body(first, last, row);
        }
    }
};

// What the backward pass of a span reads and writes besides.
struct Backward {
    const float *grad, *weight;
    float straight_through;
    float* dweight;
    double* dscale;  // of rows that begin in the span
    double* rest;    // the same of the row before
    double* table;   // NULL or 3 * 2^bits + 4 sums: of G, G sigma and G d by cell, G d y, dmu, G d below and above
};

struct Isa {
    const char* name;
    int bundle;  // the most tokens of a bundle

    // y[i stride + 16 t + r] = row r of block first_block + i, i < blocks, token t of all in x: the scales are applied,
    // rows beyond the last are 0 or NaN. Many blocks at a time: a call has to make tables first. [path][bits]
    void (*product[2][9])(const Weight& weight, int64_t first_block, int64_t blocks, const Tokens& x, float* y,
                          int64_t stride);

    // One token of `features` numbers to `padded` integers (a multiple of 4), of which four neighbours are `step` bytes
    // from the next four, their sum and the scale, as `kernels/activations.py` defines.
    void (*quantize)(const float* x, int64_t features, int64_t padded, int8_t* q, int64_t step, int32_t* sum,
                     float* scale);

    // A row of `features` numbers, normalized; gq_native.h says how. y may be x.
    void (*normalize)(const float* x, int64_t features, const float* weight, const float* bias, float epsilon,
                      float* y);

    // `count` tokens' next states of 16 units, as kernels/packed_recurrent.py defines them; (tokens, 16) each: c and m
    // of an LSTM, the state h of a GRU.
    void (*lstm)(const Gates& gates, int64_t count, float* c, float* m);
    void (*gru)(const Gates& gates, int64_t count, float* h);

    // out[32 tiles][16]: that many tiles of a block as floats, column by column; rows beyond the last are 0. [bits]
    void (*decode[9])(const Weight& weight, int64_t block, int64_t first_tile, int64_t tiles, float* out);

    // As kernels/fake_quantize.py defines them; w and the results are those of the whole matrix. [bits]
    void (*hard[9])(const Quantizer& quantizer, const Span& span, const float* w, float* out);
    void (*soft[9])(const Quantizer& quantizer, const Span& span, const float* w, float* out);
    void (*encode[9])(const Quantizer& quantizer, const Span& span, const float* w, uint8_t* codes);
    void (*backward[9])(const Quantizer& quantizer, const Span& span, const Backward& pass);

    // y[t] = bias + sum_j taps[j] x[stride t + dilation j] for 0 <= t < count: 16 channels each.
    void (*depthwise)(const float* taps, int64_t tap_count, const float* x, const float* bias, float* y, int64_t count,
                      int64_t stride, int64_t dilation);
};

const Isa& current_isa();

}  // namespace gq
