// Quantized tokens and linear layers: gq_quantize_tokens, gq_linear.

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"
#include "scratch.h"
#include "threads.h"
#include "tokens.h"

namespace gq {
namespace {

constexpr int64_t CHUNK = 64;   // tokens that meet all blocks before the next tokens come: a multiple of every bundle
constexpr int64_t PART = 1024;  // tokens that are quantized, or laid out, before any is multiplied: whole chunks
constexpr int64_t RUN = 4096;  // numbers that a call of a kernel gives, at least those of a block

struct Range {
    int64_t begin, end;
};

// Part `index` of `count` of 0 to total, in whole multiples of `unit` but for the last.
Range part(int64_t total, int64_t unit, int index, int count) {
    const int64_t units = cdiv(total, unit);
    return {units * index / count * unit, std::min(total, units * (index + 1) / count * unit)};
}

void put_tokens(TokenRoom& room, int bundle, const float* x, int64_t columns, int64_t tokens, int threads) {
    parallel(worthwhile(threads, 16 * tokens * columns), [&](int index, int count) {
        const Range range = part(tokens, bundle, index, count);
        for (int64_t token = range.begin; token < range.end; ++token) room.put(x + token * columns, token);
    });
}

// Products of a block to where they belong.
void write_block(const Weight& weight, int64_t block, const float* products, const float* bias, int64_t tokens,
                 float* y) {
    const int64_t first = weight.first_row(block), rows = weight.row_count(block);
    float added[BLOCK] = {};
    if (bias) std::memcpy(added, bias + first, rows * sizeof(float));
    for (int64_t token = 0; token < tokens; ++token, products += BLOCK) {
        float* to = y + token * weight.rows + first;
        if (rows == BLOCK)
            for (int64_t row = 0; row < BLOCK; ++row) to[row] = products[row] + added[row];
        else
            for (int64_t row = 0; row < rows; ++row) to[row] = products[row] + added[row];
    }
}

void multiply(const Isa& isa, const Weight& weight, Path path, const Tokens& x, Range blocks, const float* bias,
              float* y) {
    alignas(64) float products[RUN];
    const int64_t most = RUN / (BLOCK * x.count);
    for (int64_t block = blocks.begin; block < blocks.end; block += most) {
        const int64_t count = std::min(most, blocks.end - block);
        isa.product[path][weight.bits](weight, block, count, x, products, BLOCK * x.count);
        for (int64_t i = 0; i < count; ++i)
            write_block(weight, block + i, products + i * BLOCK * x.count, bias, x.count, y);
    }
}

void multiply_part(const Isa& isa, const Weight& weight, int32_t activations, const float* x, int64_t tokens,
                   const float* bias, float* y, int threads) {
    thread_local TokenRoom kept;
    TokenRoom& room = kept;  // of this thread, for all
    room.reserve(isa, weight, activations, tokens);
    put_tokens(room, isa.bundle, x, weight.columns, tokens, threads);
    parallel(worthwhile(threads, tokens * weight.rows * weight.columns), [&](int index, int count) {
        const Range blocks = part(weight.blocks(), 1, index, count);
        for (int64_t first = 0; first < tokens; first += CHUNK)
            multiply(isa, weight, path_of(weight, activations), room.tokens(first, std::min(CHUNK, tokens - first)),
                     blocks, bias, y + first * weight.rows);
    });
}

}  // namespace
}  // namespace gq

int32_t gq_quantize_tokens(const float* x, int64_t tokens, int64_t features, int8_t* q, float* scale) {
    using namespace gq;
    return guarded([&] {
        check_between("tokens", tokens, 0, INT64_MAX);
        check_between("features", features, 0, INT64_MAX / 16);
        const int64_t numbers = elements(tokens, features), padded = cdiv(features, 4) * 4;
        if (numbers && (!x || !q)) refuse("%s must not be NULL", x ? "q" : "x");
        if (tokens && !scale) refuse("scale must not be NULL");
        Scratch<int8_t> room;
        int8_t* row = room.reserve(padded);
        for (int64_t token = 0; token < tokens; ++token) {
            int32_t sum;
            current_isa().quantize(x + token * features, features, padded, row, 4, &sum, scale + token);
            std::copy_n(row, features, q + token * features);
        }
    });
}

int32_t gq_linear(const gq_weight* weight, int32_t activations, const float* x, int64_t x_count, const float* bias,
                  int64_t bias_count, float* y, int64_t y_count, int64_t tokens, int32_t threads) {
    using namespace gq;
    return guarded([&] {
        const Weight checked = check_weight("weight", weight);
        check_activations("activations", activations);
        check_integers("weight", checked, activations);
        check_between("tokens", tokens, 0, INT64_MAX);
        check_between("threads", threads, 1, INT32_MAX);
        check_array("x", x, x_count, elements(tokens, checked.columns));
        check_array("y", y, y_count, elements(tokens, checked.rows));
        check_array("bias", bias, bias_count, bias ? checked.rows : 0);
        elements(elements(tokens, checked.rows), checked.columns);
        for (int64_t first = 0; first < tokens; first += PART)
            multiply_part(current_isa(), checked, activations, x + first * checked.columns,
                          std::min(PART, tokens - first), bias, y + first * checked.rows, threads);
    });
}
