// The product of blocks, 16 rows of a weight each, with tokens.
//
// Weights are decoded in registers, once for all tokens of a bundle, and sums are kept there: several for each token,
// so that additions need not wait for one another. Integers are exact in any order. Floats are summed in the same order
// for any number of tokens: a stretch of 128 columns at a time, column k into sum k mod 4, and these four one after the
// other into a total. For many tokens a stretch is decoded into the cache, since bundles with four sums each are small.

#pragma once

#include <utility>

#include "isa.h"

namespace {

template <int N>
struct Index {
    static constexpr int value = N;
};

// f(Index<0>), ..., f(Index<COUNT - 1>).
template <int... I, class Function>
GQ_INLINE void each_of(std::integer_sequence<int, I...>, const Function& f) {
    (f(Index<I>()), ...);
}
template <int COUNT, class Function>
GQ_INLINE void repeat(const Function& f) {
    each_of(std::make_integer_sequence<int, COUNT>(), f);
}

template <class Simd>
struct BlockKernels {
    using Ints = typename Simd::Ints;
    using Floats = typename Simd::Floats;
    using Bytes = typename Simd::Bytes;

    static constexpr int FEW = Simd::BUNDLE / 4;  // tokens that have room for four sums each
    static constexpr int STRETCH = 4;            // tiles, the 128 columns above
    static constexpr int MANY = 64;              // tokens whose totals are kept in the cache

    // Sums that each of so many results has room for, at most `most`.
    static constexpr int sums_of(int results, int most) {
        return Simd::BUNDLE / results > most ? most : Simd::BUNDLE / results;
    }

    // The largest part of a bundle, at most `most` tokens, of which it has a whole number.
    static constexpr int equal_part(int size, int most) {
        int part = size < most ? size : most;
        while (size % part) --part;
        return part;
    }

    // What multiplies the 16 sums.
    static Floats factors(const gq::Weight& weight, int64_t block) {
        const float* first = weight.scale + weight.first_row(block) * weight.scale_stride;
        const int64_t rows = weight.row_count(block);
        float scales[gq::BLOCK];
        for (int64_t row = 0; row < gq::BLOCK; ++row)
            scales[row] = row < rows ? first[row * weight.scale_stride] : 0.0f;
        const Floats scale = rows == gq::BLOCK && weight.scale_stride ? Simd::load(first) : Simd::load(scales);
        if (weight.codebook_kind == GQ_INT8) return Simd::div(scale, Simd::set(127.0f));
        return weight.codebook_kind == GQ_E4M3 ? Simd::mul(scale, Simd::set(1.0f / 256.0f)) : scale;
    }

    // Fetches codes before they are needed: into the nearest cache and, where few bits make them go by fast, long
    // before into the next one.
    template <int BITS>
    GQ_INLINE static void prefetch(const uint8_t* tile) {
        for (int j = 0; j < BITS; ++j) {
            __builtin_prefetch(tile + 1024 + 64 * j, 0, 3);
            if (BITS < 6) __builtin_prefetch(tile + 32768 + 64 * j, 0, 2);
        }
    }

    // BLOCKS blocks and where their products belong.
    template <int BLOCKS>
    struct Place {
        const uint8_t* codes;
        int64_t block_bytes;
        float* y;
        int64_t stride;  // from block to block
        Floats factor[BLOCKS];

        Place(const gq::Weight& weight, int64_t block, float* y, int64_t stride)
            : codes(weight.panels + block * weight.block_bytes()),
              block_bytes(weight.block_bytes()),
              y(y),
              stride(stride) {
            for (int b = 0; b < BLOCKS; ++b) factor[b] = factors(weight, block + b);
        }
    };

    // f(Index<2>, the first of two blocks), and f(Index<1>, ...) if one is left over.
    template <class Function>
    GQ_INLINE static void pairs(int64_t blocks, const Function& f) {
        int64_t i = 0;
        for (; i + 2 <= blocks; i += 2) f(Index<2>(), i);
        if (i < blocks) f(Index<1>(), i);
    }

    // f(Index<tokens of the bundle>, its first token), bundle by bundle; none holds more than MOST.
    template <int MOST, class Function>
    GQ_INLINE static void bundles(int64_t count, const Function& f) {
        for (int64_t first = 0, size; first < count; first += size) {
            size = gq::bundle_size(count - first, Simd::BUNDLE);
            one_bundle<MOST>(size, first, f);
        }
    }
    template <int SIZE, class Function>
    GQ_INLINE static void one_bundle(int64_t size, int64_t first, const Function& f) {
        if (size == SIZE) return f(Index<SIZE>(), first);
        if constexpr (SIZE > 1) one_bundle<gq::smaller_bundle(SIZE)>(size, first, f);
    }

    // --- integers ----------------------------------------------------------------------------------------------------

    // The entries of an int8 codebook, `offset` added, for Decoder. Those that are stored have 128 added already.
    template <int BITS>
    static void byte_entries(const gq::Weight& weight, int offset, uint8_t* entries) {
        const uint8_t* codebook = static_cast<const uint8_t*>(weight.codebook);
        for (int code = 0; code < 1 << BITS; ++code)
            entries[code] = static_cast<uint8_t>((BITS == 8 ? code ^ 128 : codebook[code]) + offset);
    }

    template <int BITS>
    static void integers(const gq::Weight& weight, int64_t first_block, int64_t blocks, const gq::Tokens& x, float* y,
                         int64_t stride) {
        uint8_t entries[1 << BITS];
        byte_entries<BITS>(weight, Simd::OFFSET, entries);
        const typename Simd::template Decoder<BITS> decoder(entries);
        constexpr int MOST = Simd::BUNDLE, HALF = (FEW + 1) / 2;
        int64_t i = 0;
        // The fewest tokens wait for codes, of which two streams come faster than one.
        for (; x.count <= HALF && i + 2 <= blocks; i += 2)
            integer_blocks<BITS, 2, HALF>(decoder, Place<2>(weight, first_block + i, y + i * stride, stride), x);
        for (; i < blocks; ++i)
            integer_blocks<BITS, 1, MOST>(decoder, Place<1>(weight, first_block + i, y + i * stride, stride), x);
    }

    template <int BITS, int BLOCKS, int MOST, class Decoder>
    static void integer_blocks(const Decoder& decoder, const Place<BLOCKS>& place, const gq::Tokens& x) {
        bundles<MOST>(x.count, [&](auto size, int64_t first) GQ_INLINED {
            integer_bundle<BITS, BLOCKS, size.value>(decoder, place, x, first);
        });
    }

    template <int BITS, int BLOCKS, int TOKENS, class Decoder>
    static void integer_bundle(const Decoder& decoder, const Place<BLOCKS>& place, const gq::Tokens& x, int64_t first) {
        constexpr int RESULTS = BLOCKS * TOKENS, SUMS = sums_of(RESULTS, 8);
        Ints sums[RESULTS][SUMS];
        repeat<RESULTS * SUMS>([&](auto i) GQ_INLINED { sums[i.value / SUMS][i.value % SUMS] = Simd::zero(); });
        const uint8_t* tile = place.codes;
        const int8_t* q = x.q + first * x.padded;
        for (const int8_t* end = q + TOKENS * x.padded; q != end; q += TOKENS * gq::TILE, tile += 64 * BITS) {
            repeat<BLOCKS>([&](auto b) GQ_INLINED {
                const uint8_t* codes = tile + b.value * place.block_bytes;
                prefetch<BITS>(codes);
                repeat<8>([&](auto j) GQ_INLINED {
                    const Bytes weights = decoder.template group<j.value>(codes);
                    repeat<TOKENS>([&](auto t) GQ_INLINED {
                        Ints& sum = sums[b.value * TOKENS + t.value][j.value % SUMS];
                        sum = Simd::dot(sum, weights, q + 4 * (TOKENS * j.value + t.value));
                    });
                });
            });
        }
        repeat<RESULTS>([&](auto i) GQ_INLINED {
            constexpr int b = i.value / TOKENS, t = i.value % TOKENS;
            if (first + t >= x.count) return;
            Ints total = Simd::set_ints(-Simd::OFFSET * x.sum[first + t]);
            repeat<SUMS>([&](auto s) GQ_INLINED { total = Simd::add(total, sums[i.value][s.value]); });
            const Floats scale = Simd::mul(Simd::set(x.scale[first + t]), place.factor[b]);
            Simd::store(place.y + b * place.stride + 16 * (first + t), Simd::mul(Simd::to_floats(total), scale));
        });
    }

    // --- floats ------------------------------------------------------------------------------------------------------

    static float e4m3(uint8_t byte) {  // without subnormal numbers, which a thread may have switched off
        const uint32_t size = byte & 127, bits = ((size << 20) + (120u << 23)) | (byte & 128u) << 24;
        const float small = static_cast<float>(size) / (byte & 128 ? -512.0f : 512.0f);
        float normal;
        __builtin_memcpy(&normal, &bits, 4);
        return size < 8 ? small : normal;
    }

    // The number that each code stands for, but for what factors() makes up for.
    static void float_entries(const gq::Weight& weight, float* entries) {
        const uint8_t* codebook = static_cast<const uint8_t*>(weight.codebook);
        const int count = 1 << weight.bits;
        if (weight.codebook_kind == GQ_FLOAT32) __builtin_memcpy(entries, codebook, 4 * count);
        else if (weight.codebook_kind == GQ_E4M3)
            for (int code = 0; code < count; ++code) entries[code] = e4m3(codebook[code]);
        else
            for (int code = 0; code < count; ++code) entries[code] = static_cast<int8_t>(codebook[code]);
    }

    // Signed bytes as they are.
    struct Bytewise {
        template <int K>
        Floats look_up(Bytes bytes) const {
            return Simd::template signed_bytes<K>(bytes);
        }
    };

    // Large int8 codebooks are looked up as bytes, like those of integer products, all others as floats.
    template <int BITS>
    static void floats(const gq::Weight& weight, int64_t first_block, int64_t blocks, const gq::Tokens& x, float* y,
                       int64_t stride) {
        uint8_t codes[1 << BITS];
        if constexpr (BITS > 5) {
            if (weight.codebook_kind == GQ_INT8) {
                byte_entries<BITS>(weight, 0, codes);
                return float_product<BITS>(weight, first_block, blocks, x, codes, Bytewise(), y, stride);
            }
        }
        float entries[1 << BITS];
        float_entries(weight, entries);
        for (int code = 0; code < 1 << BITS; ++code) codes[code] = static_cast<uint8_t>(code);
        const typename Simd::template Table<BITS> table(entries);
        float_product<BITS>(weight, first_block, blocks, x, codes, table, y, stride);
    }

    template <int BITS, class Table>
    static void float_product(const gq::Weight& weight, int64_t first_block, int64_t blocks, const gq::Tokens& x,
                              const uint8_t* codes, const Table& table, float* y, int64_t stride) {
        const typename Simd::template Decoder<BITS> decoder(codes);
        if (x.count <= FEW)
            for (int64_t i = 0; i < blocks; ++i) {
                const Place<1> place(weight, first_block + i, y + i * stride, stride);
                bundles<FEW>(x.count, [&](auto tokens, int64_t first) GQ_INLINED {
                    few_floats<BITS, tokens.value>(decoder, table, place, x, first);
                });
            }
        else
            pairs(blocks, [&](auto size, int64_t i) GQ_INLINED {
                const Place<size.value> place(weight, first_block + i, y + i * stride, stride);
                for (int64_t first = 0; first < x.count; first += MANY)
                    many_floats<BITS>(decoder, table, place, x, first);
            });
    }

    template <int BITS, int TOKENS, class Decoder, class Table>
    static void few_floats(const Decoder& decoder, const Table& table, const Place<1>& place, const gq::Tokens& x,
                           int64_t first) {
        Floats totals[TOKENS];
        repeat<TOKENS>([&](auto t) GQ_INLINED { totals[t.value] = Simd::set(0.0f); });
        const uint8_t* tile = place.codes;
        const float* number = x.x + first * x.padded;
        for (int64_t left = x.padded / gq::TILE; left > 0; left -= STRETCH) {
            Floats sums[TOKENS][4];
            repeat<4 * TOKENS>([&](auto i) GQ_INLINED { sums[i.value / 4][i.value % 4] = Simd::set(0.0f); });
            const float* end = number + TOKENS * gq::TILE * (left < STRETCH ? left : STRETCH);
            for (; number != end; number += TOKENS * gq::TILE, tile += 64 * BITS) {
                prefetch<BITS>(tile);
                repeat<8>([&](auto j) GQ_INLINED {
                    const Bytes codes = decoder.template group<j.value>(tile);
                    repeat<4>([&](auto k) GQ_INLINED {
                        const Floats weights = table.template look_up<k.value>(codes);
                        repeat<TOKENS>([&](auto t) GQ_INLINED {
                            const Floats token = Simd::set(number[4 * (TOKENS * j.value + t.value) + k.value]);
                            sums[t.value][k.value] = Simd::fma(weights, token, sums[t.value][k.value]);
                        });
                    });
                });
            }
            repeat<4 * TOKENS>([&](auto i) GQ_INLINED {
                totals[i.value / 4] = Simd::add(totals[i.value / 4], sums[i.value / 4][i.value % 4]);
            });
        }
        repeat<TOKENS>([&](auto t) GQ_INLINED {
            if (first + t.value < x.count)
                Simd::store(place.y + 16 * (first + t.value), Simd::mul(totals[t.value], place.factor[0]));
        });
    }

    template <int BITS, int BLOCKS, class Decoder, class Table>
    static void many_floats(const Decoder& decoder, const Table& table, const Place<BLOCKS>& place, const gq::Tokens& x,
                            int64_t first) {
        Floats weights[BLOCKS][STRETCH * gq::TILE];
        Floats totals[BLOCKS][MANY];
        const int64_t count = x.count - first < MANY ? x.count - first : MANY, tiles = x.padded / gq::TILE;
        for (int b = 0; b < BLOCKS; ++b)
            for (int t = 0; t < MANY; ++t) totals[b][t] = Simd::set(0.0f);
        for (int64_t tile = 0; tile < tiles; tile += STRETCH) {
            const int64_t stretch = tiles - tile < STRETCH ? tiles - tile : STRETCH;
            for (int b = 0; b < BLOCKS; ++b)
                for (int64_t i = 0; i < stretch; ++i)
                    decode_floats<BITS>(decoder, table, place.codes + b * place.block_bytes + (tile + i) * 64 * BITS,
                                        weights[b] + gq::TILE * i);
            bundles<Simd::BUNDLE>(count, [&](auto size, int64_t token) GQ_INLINED {
                constexpr int TOKENS = equal_part(size.value, Simd::BUNDLE / BLOCKS);
                const float* numbers = x.x + (first + token) * x.padded + size.value * tile * gq::TILE;
                for (int t = 0; t < size.value; t += TOKENS)
                    multiply<BLOCKS, TOKENS>(weights[0], 8 * stretch, numbers + 4 * t, 4 * size.value,
                                             totals[0] + token + t);
            });
        }
        for (int b = 0; b < BLOCKS; ++b)
            for (int64_t t = 0; t < count; ++t)
                Simd::store(place.y + b * place.stride + 16 * (first + t), Simd::mul(totals[b][t], place.factor[b]));
    }

    template <int BITS, class Decoder, class Table>
    GQ_CALLED static void decode_floats(const Decoder& decoder, const Table& table, const uint8_t* tile,
                                        Floats* weights) {
        prefetch<BITS>(tile);
        repeat<8>([&](auto j) GQ_INLINED {
            const Bytes codes = decoder.template group<j.value>(tile);
            repeat<4>([&](auto k) GQ_INLINED {
                weights[4 * j.value + k.value] = table.template look_up<k.value>(codes);
            });
        });
    }

    // totals[block][token] += the products of a stretch's groups of four columns; those of x are `step` apart. Weights
    // and totals of the second block lie behind those of a whole stretch and of MANY tokens.
    template <int BLOCKS, int TOKENS>
    GQ_CALLED static void multiply(const Floats* weights, int64_t groups, const float* x, int64_t step,
                                   Floats* totals) {
        constexpr int RESULTS = BLOCKS * TOKENS, SUMS = sums_of(RESULTS, 4);
        for (int k = 0; k < 4; k += SUMS) {
            Floats sums[SUMS][RESULTS];
            repeat<SUMS * RESULTS>([&](auto i) GQ_INLINED {
                sums[i.value / RESULTS][i.value % RESULTS] = Simd::set(0.0f);
            });
            const Floats* weight = weights + k;
            const float* number = x + k;
            for (int64_t group = 0; group < groups; ++group, weight += 4, number += step)
                repeat<SUMS>([&](auto s) GQ_INLINED {
                    repeat<RESULTS>([&](auto i) GQ_INLINED {
                        constexpr int t = i.value / BLOCKS, b = i.value % BLOCKS;
                        const Floats token = Simd::set(number[4 * t + s.value]);
                        Floats& sum = sums[s.value][i.value];
                        sum = Simd::fma(weight[s.value + b * STRETCH * gq::TILE], token, sum);
                    });
                });
            repeat<RESULTS>([&](auto i) GQ_INLINED {
                constexpr int t = i.value / BLOCKS, b = i.value % BLOCKS;
                Floats& total = totals[t + b * MANY];
                repeat<SUMS>([&](auto s) GQ_INLINED { total = Simd::add(total, sums[s.value][i.value]); });
            });
        }
    }
};

}  // namespace
