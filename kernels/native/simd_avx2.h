// The SIMD abstraction in AVX2 and FMA, and AVX-VNNI where the compiler has it on: two registers are 16 lanes.
// simd_portable.h says what each function computes.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "isa.h"

namespace {

struct Simd {
#ifdef __AVXVNNI__
    static constexpr int OFFSET = 128;
#else
    static constexpr int OFFSET = 0;
#endif
    static constexpr int BUNDLE = 4;

    struct Bytes {  // rows 0 to 7, rows 8 to 15
        __m256i low, high;
    };
    struct Ints {
        __m256i low, high;
    };
    struct Floats {
        __m256 low, high;
    };

    static __m256i load_register(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

    // Bytes are looked up by the lowest 4 bits of the code, and chosen by the rest.
    template <int BITS>
    struct Decoder {
        static constexpr int REST = BITS > 4 && BITS < 8 ? BITS - 4 : 0;
        static constexpr int TABLES = BITS < 3 ? 4 / BITS : 1 << REST;

        __m256i tables[TABLES];  // of 8 bits: what the code's bits are flipped by

        // Entries of 8 bits are entries[0] ^ code, which spares looking them up.
        explicit Decoder(const uint8_t* entries) {
            for (int table = 0; table < TABLES; ++table) {
                uint8_t bytes[16];
                for (int nibble = 0; nibble < 16; ++nibble) bytes[nibble] = entries[code_of(table, nibble)];
                tables[table] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<__m128i*>(bytes)));
            }
        }

        // The code that entry `nibble` of a table decodes. Codes of one or two bits stay where they are in the nibble,
        // and each place has a table of its own, which spares shifts.
        static constexpr int code_of(int table, int nibble) {
            if (BITS == 8) return 0;
            if (BITS < 3) return nibble >> BITS * table & ((1 << BITS) - 1);
            return (table << 4 | nibble) & ((1 << BITS) - 1);
        }

        template <int J>
        Bytes group(const uint8_t* tile) const {
            return {half<J>(tile), half<J>(tile + 32)};
        }

        template <int J>
        __m256i half(const uint8_t* tile) const {
            if constexpr (BITS == 8) return _mm256_xor_si256(load_register(tile + 64 * J), tables[0]);
            if constexpr (BITS == 1) return look_up(tables[J % 4], mask<15>(move<-(J & 4)>(load_register(tile))));
            if constexpr (BITS == 2) {
                const __m256i codes = load_register(tile + 64 * (J / 4));
                return look_up(tables[J % 2], mask<15>(move<-2 * (J & 2)>(codes)));
            }
            if constexpr (BITS > 2 && BITS < 8) {
                constexpr bool WHOLE = J < 8 / BITS * BITS;  // with other bits above; else a shuffle takes the nibble
                const __m256i codes = code<J>(tile);
                return choose<REST>(tables, WHOLE ? mask<15>(codes) : codes, codes);
            }
        }

        // Codes in the lowest bits, from bit TO on; above whole codes there may be anything.
        template <int J, int TO = 0>
        static __m256i code(const uint8_t* tile) {
            constexpr gq::Part PART = gq::part_of(BITS, J, TO);
            const __m256i part = move<TO - PART.bit>(load_register(tile + 64 * PART.register_));
            if constexpr (TO + PART.count == BITS) {
                return TO ? mask<(1 << BITS) - (1 << TO)>(part) : part;
            } else {
                const __m256i above = code<J, TO + PART.count>(tile);
                constexpr int MASK = ((1 << PART.count) - 1) << TO;
                return _mm256_or_si256(mask<MASK>(part), above);
            }
        }

        template <int MASK>
        static __m256i mask(__m256i bytes) {
            return _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(MASK)));
        }

        // Bits of each byte, moved up or down; what crosses into the next byte is masked off or never looked at.
        template <int UP>
        static __m256i move(__m256i bytes) {
            if constexpr (UP > 0) return _mm256_slli_epi16(bytes, UP);
            if constexpr (UP < 0) return _mm256_srli_epi16(bytes, -UP);
            return bytes;
        }

        static __m256i look_up(__m256i table, __m256i nibble) { return _mm256_shuffle_epi8(table, nibble); }

        // One of 2^LEFT tables, by as many bits of the code above its nibble: the highest halves the tables.
        template <int LEFT>
        static __m256i choose(const __m256i* tables, __m256i nibble, __m256i codes) {
            if constexpr (LEFT == 0) {
                return look_up(tables[0], nibble);
            } else {
                const __m256i zero = choose<LEFT - 1>(tables, nibble, codes);
                const __m256i one = choose<LEFT - 1>(tables + (1 << (LEFT - 1)), nibble, codes);
                return _mm256_blendv_epi8(zero, one, move<4 - LEFT>(codes));
            }
        }
    };

    static Ints zero() { return set_ints(0); }

    static Ints set_ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }

    static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

    static Ints dot(Ints sum, Bytes weights, const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        const __m256i tokens = _mm256_set1_epi32(four);
        return {dot(sum.low, weights.low, tokens), dot(sum.high, weights.high, tokens)};
    }

#ifdef __AVXVNNI__
    static __m256i dot(__m256i sum, __m256i weights, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
#else
    // |w| (sign(w) x): a pair's sum is at most 2 * 128 * 127, which 16 bits hold; x is never -128.
    static __m256i dot(__m256i sum, __m256i weights, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif

    static Ints child(Ints node, Floats a, Floats b) {
        return {child(node.low, a.low, b.low), child(node.high, a.high, b.high)};
    }
    static __m256i child(__m256i node, __m256 a, __m256 b) {
        const __m256i less = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ));  // -1 or 0
        return _mm256_sub_epi32(_mm256_add_epi32(node, node), less);
    }
    static Bytes bytes(Ints a) { return {a.low, a.high}; }
    static void store_ints(int32_t* to, Ints a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), a.high);
    }
    static void store_codes(uint8_t* to, Ints a) {
        const __m256i ordered = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xD8);
        const __m128i low = _mm256_castsi256_si128(ordered), high = _mm256_extracti128_si256(ordered, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(low, high));
    }

    static Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

    template <int K>
    static Floats signed_bytes(Bytes bytes) {
        return to_floats({signed_byte<K>(bytes.low), signed_byte<K>(bytes.high)});
    }
    template <int K>
    static __m256i signed_byte(__m256i bytes) {
        return _mm256_srai_epi32(_mm256_slli_epi32(bytes, 24 - 8 * K), 24);
    }

    // Eight entries are looked up in a register, 16 in two; more are gathered, which is faster than more registers.
    template <int BITS>
    struct Table {
        const float* values;
        __m256 low, high;

        explicit Table(const float* entries) : values(entries) {
            float first[16] = {};
            for (int code = 0; code < 16 && code < 1 << BITS; ++code) first[code] = entries[code];
            low = _mm256_loadu_ps(first);
            high = _mm256_loadu_ps(first + 8);
        }

        template <int K>
        Floats look_up(Bytes codes) const {
            return {half<K>(codes.low), half<K>(codes.high)};
        }

        // permutevar takes the lowest three bits, blendv the highest.
        template <int K>
        __m256 half(__m256i codes) const {
            const __m256i column = _mm256_srli_epi32(codes, 8 * K);
            const __m256i code = _mm256_and_si256(column, _mm256_set1_epi32(255));
            if constexpr (BITS > 4) return _mm256_i32gather_ps(values, code, 4);
            const __m256 lower = _mm256_permutevar8x32_ps(low, column);
            if constexpr (BITS < 4) return lower;
            const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 8 * K));
            return _mm256_blendv_ps(lower, _mm256_permutevar8x32_ps(high, column), fourth);
        }
    };

    static Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static void store(float* to, Floats a) {
        _mm256_storeu_ps(to, a.low);
        _mm256_storeu_ps(to + 8, a.high);
    }
    static __m256i first_lanes(int64_t count) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    }
    static Floats load(const float* from, int64_t count) {
        if (count >= 16) return load(from);
        return {_mm256_maskload_ps(from, first_lanes(count)), _mm256_maskload_ps(from + 8, first_lanes(count - 8))};
    }
    static void store(float* to, Floats a, int64_t count) {
        if (count >= 16) return store(to, a);
        _mm256_maskstore_ps(to, first_lanes(count), a.low);
        _mm256_maskstore_ps(to + 8, first_lanes(count - 8), a.high);
    }
    static constexpr int interleaved(int place) { return place / 8 * 8 + place % 2 * 4 + place / 2 % 4; }
    static void interleave(float* to, Floats a, Floats b, Floats c) {
        interleave(to, a.low, b.low, c.low);
        interleave(to + 32, a.high, b.high, c.high);
    }
    static void interleave(float* to, __m256 a, __m256 b, __m256 c) {
        const __m256 zero = _mm256_setzero_ps();
        interleave_pairs(to, _mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, zero));
        interleave_pairs(to + 16, _mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, zero));
    }
    static void interleave_pairs(float* to, __m256 ab, __m256 c) {
        const __m256d first = _mm256_castps_pd(ab), second = _mm256_castps_pd(c);
        _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(first, second)));
        _mm256_storeu_ps(to + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(first, second)));
    }
    static Floats set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static Floats if_less(Floats a, Floats b, Floats x, Floats y) {
        return {_mm256_blendv_ps(y.low, x.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                _mm256_blendv_ps(y.high, x.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }

    static Floats power(Floats a) { return {power(a.low), power(a.high)}; }
    static __m256 power(__m256 a) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvttps_epi32(a), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }

    static Floats exponent(Floats a) { return {exponent(a.low), exponent(a.high)}; }
    static __m256 exponent(__m256 a) {
        const __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(a), 23);
        return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
    }

    static Floats round(Floats a) {
        const Floats large = set(12582912.0f);
        return sub(add(a, large), large);
    }

    static void store_bytes(int8_t* to, Floats a) {
        const __m256i words = _mm256_packs_epi32(_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);  // packs works within 128 bits
        const __m128i low = _mm256_castsi256_si128(ordered), high = _mm256_extracti128_si256(ordered, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(low, high));
    }

};

}  // namespace
