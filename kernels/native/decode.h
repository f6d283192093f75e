// Weights as floats: value times scale, one float32 product, as gq_triton.kernels.packed_embedding defines them.

#pragma once

#include "block.h"
#include "isa.h"

namespace {

template <class Simd>
struct DecodeKernels {
    using Floats = typename Simd::Floats;

    // The value of each code, as gq_triton.kernels.tables.stored_values gives it; of each byte where these are values.
    static void code_values(const gq::Weight& weight, float* values) {
        constexpr float units[] = {1.0f, 127.0f, 256.0f};
        BlockKernels<Simd>::float_entries(weight, values);
        for (int code = 0; code < 1 << weight.bits; ++code) {
            if (weight.stores_values()) values[code] = static_cast<int8_t>(code ^ 128);
            values[code] /= units[weight.codebook_kind];
        }
    }

    // 16 scales; a subnormal one, and one of no row, counts as 0.
    static void block_scales(const gq::Weight& weight, int64_t block, float* scales) {
        const float* first = weight.scale + weight.first_row(block) * weight.scale_stride;
        const int64_t count = weight.row_count(block);
        for (int64_t row = 0; row < gq::BLOCK; ++row) {
            const float scale = row < count ? first[row * weight.scale_stride] : 0.0f;
            scales[row] = __builtin_fabsf(scale) < 1.17549435e-38f ? 0.0f : scale;
        }
    }

    template <int BITS>
    static void decode(const gq::Weight& weight, int64_t block, int64_t first_tile, int64_t tiles, float* out) {
        uint8_t codes[256];
        float values[256], scales[gq::BLOCK];
        for (int code = 0; code < 256; ++code) codes[code] = static_cast<uint8_t>(code);
        code_values(weight, values);
        block_scales(weight, block, scales);
        const typename Simd::template Decoder<BITS> decoder(codes);
        const typename Simd::template Table<BITS> table(values);
        const Floats scale = Simd::load(scales);
        const uint8_t* tile = weight.panels + block * weight.block_bytes() + first_tile * BITS * 64;
        for (; tiles > 0; --tiles, tile += BITS * 64, out += gq::TILE * gq::BLOCK)
            groups<0>(decoder, table, scale, tile, out);
    }

    template <int J, class Decoder, class Table>
    static void groups(const Decoder& decoder, const Table& table, Floats scale, const uint8_t* tile, float* out) {
        four(table, scale, decoder.template group<J>(tile), out + 4 * gq::BLOCK * J);
        if constexpr (J < 7) groups<J + 1>(decoder, table, scale, tile, out);
    }

    template <class Table>
    static void four(const Table& table, Floats scale, typename Simd::Bytes codes, float* out) {
        Simd::store(out, Simd::mul(scale, table.template look_up<0>(codes)));
        Simd::store(out + gq::BLOCK, Simd::mul(scale, table.template look_up<1>(codes)));
        Simd::store(out + 2 * gq::BLOCK, Simd::mul(scale, table.template look_up<2>(codes)));
        Simd::store(out + 3 * gq::BLOCK, Simd::mul(scale, table.template look_up<3>(codes)));
    }
};

}  // namespace
