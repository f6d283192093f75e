// The SIMD abstraction in AVX-512 (F, BW, VL, VBMI, VNNI): a register is 16 lanes. simd_portable.h says what each
// function computes.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "isa.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // what GCC's own header leaves undefined, on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace {

// A byte permutation looks up 64 entries by the lowest six bits of each byte and ignores the others. So the bits of a
// code need not be brought together: they stay in any of those six places, and each arrangement that occurs has a table
// of its own, in which the other places make no difference. These are the places of a code's bits, the highest first.
template <int BITS>
struct Arrangements;
template <>
struct Arrangements<1> {
    static constexpr int places[6][1] = {{0}, {1}, {2}, {3}, {4}, {5}};
};
template <>
struct Arrangements<2> {
    static constexpr int places[3][2] = {{1, 0}, {3, 2}, {5, 4}};
};
template <>
struct Arrangements<3> {
    static constexpr int places[2][3] = {{2, 1, 0}, {5, 4, 3}};
};
template <>
struct Arrangements<4> {
    static constexpr int places[1][4] = {{3, 2, 1, 0}};
};
template <>
struct Arrangements<5> {
    static constexpr int places[4][5] = {{4, 3, 2, 1, 0}, {1, 0, 5, 4, 3}, {0, 5, 4, 3, 2}, {5, 4, 3, 2, 1}};
};
template <>
struct Arrangements<6> {
    static constexpr int places[1][6] = {{5, 4, 3, 2, 1, 0}};
};
template <>
struct Arrangements<7> {  // two registers, by the seventh bit
    static constexpr int places[1][7] = {{6, 5, 4, 3, 2, 1, 0}};
};

struct Simd {
    static constexpr int OFFSET = 128;
    static constexpr int BUNDLE = 16;

    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;

    static __m512i load_register(const void* from) { return _mm512_loadu_si512(from); }

    // Bits of each byte, moved up or down; what crosses into the next byte ends up where nobody looks.
    template <int UP>
    static __m512i move(__m512i bytes) {
        if constexpr (UP > 0) return _mm512_slli_epi16(bytes, UP);
        if constexpr (UP < 0) return _mm512_srli_epi16(bytes, -UP);
        return bytes;
    }

    // Bits MASK of the first, the others of the second.
    template <int MASK>
    static __m512i select(__m512i first, __m512i second) {
        return _mm512_ternarylogic_epi32(_mm512_set1_epi8(MASK), first, second, 0xCA);
    }

    template <int BITS>
    struct Decoder {
        static constexpr int TABLES = sizeof(Arrangements<BITS>::places) / sizeof(int) / BITS;
        static constexpr int REGISTERS = BITS == 7 ? 2 : TABLES;

        __m512i tables[REGISTERS];

        // The code that byte i of a register is for.
        struct Codes {
            alignas(64) uint8_t at[REGISTERS][64];
        };
        static constexpr Codes codes() {
            Codes codes{};
            for (int i = 0; i < 64 * REGISTERS; ++i)
                for (const int place : Arrangements<BITS>::places[BITS == 7 ? 0 : i / 64])
                    codes.at[i / 64][i % 64] = codes.at[i / 64][i % 64] * 2 + (i >> place & 1);
            return codes;
        }

        explicit Decoder(const uint8_t* entries) {
            static constexpr Codes CODES = codes();
            uint8_t all[128] = {};
            __builtin_memcpy(all, entries, 1 << BITS);
            const __m512i low = load_register(all), high = load_register(all + 64);
            for (int i = 0; i < REGISTERS; ++i)
                tables[i] = _mm512_permutex2var_epi8(low, load_register(CODES.at[i]), high);
        }

        template <int J>
        Bytes group(const uint8_t* tile) const {
            if constexpr (BITS == 1) return look_up<J < 6 ? J : J - 2>(move<J < 6 ? 0 : -2>(load_register(tile)));
            if constexpr (BITS == 2) return look_up<J % 4 < 3 ? J % 4 : 2>(pair<J>(tile));
            if constexpr (BITS == 3 && J < 6) return look_up<J % 2>(load_register(tile + 64 * (J / 2)));
            if constexpr (BITS == 3 && J >= 6) return look_up<0>(code<J>(tile));
            if constexpr (BITS == 4 || BITS == 6 || (BITS == 5 && J < 5)) return look_up<0>(code<J>(tile));
            if constexpr (BITS == 5 && J >= 5) return look_up<J - 4>(left_of_five<J - 5>(tile));
            if constexpr (BITS == 7) return _mm512_permutex2var_epi8(tables[0], code<J>(tile), tables[1]);
        }

        // A field of two bits, where it is or, if that is the highest two, two lower.
        template <int J>
        static __m512i pair(const uint8_t* plane) {
            return move<J % 4 == 3 ? -2 : 0>(load_register(plane + 64 * (J / 4)));
        }

        // The codes of the last three groups of 5 bits, with each register moved but once: three bits are those of
        // register 2 I, and the other two those of its neighbours.
        template <int I>
        static __m512i left_of_five(const uint8_t* tile) {
            const __m512i above = move<-2>(load_register(tile + 128 * I));
            const __m512i first = move<-5>(load_register(tile + 64)), second = move<-5>(load_register(tile + 192));
            return select<56>(above, I == 0 ? first : I == 2 ? second : select<4>(first, second));
        }

        // Codes in the lowest bits, from bit TO on, whatever is above.
        template <int J, int TO = 0>
        static __m512i code(const uint8_t* tile) {
            constexpr gq::Part PART = gq::part_of(BITS, J, TO);
            const __m512i part = move<TO - PART.bit>(load_register(tile + 64 * PART.register_));
            if constexpr (TO + PART.count == BITS) return part;
            else return select<((1 << PART.count) - 1) << TO>(part, code<J, TO + PART.count>(tile));
        }

        template <int TABLE>
        __m512i look_up(__m512i index) const {
            return _mm512_permutexvar_epi8(index, tables[TABLE]);
        }
    };

    static Ints zero() { return _mm512_setzero_si512(); }
    static Ints set_ints(int32_t value) { return _mm512_set1_epi32(value); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

    static Ints dot(Ints sum, Bytes weights, const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four));
    }

    static Ints child(Ints node, Floats a, Floats b) {
        const Ints twice = _mm512_add_epi32(node, node);
        return _mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), twice, set_ints(1));
    }
    static Bytes bytes(Ints a) { return a; }
    static void store_ints(int32_t* to, Ints a) { _mm512_storeu_si512(to, a); }
    static void store_codes(uint8_t* to, Ints a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
    }

    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }

    template <int K>
    static Floats signed_bytes(Bytes bytes) {
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(bytes, 24 - 8 * K), 24));
    }

    // Up to 64 entries are looked up in registers, by the lowest bits of the index.
    template <int BITS>
    struct Table {
        static constexpr int REGISTERS = BITS < 5 ? 1 : BITS < 7 ? 1 << (BITS - 4) : 0;

        const float* values;
        __m512 table[REGISTERS ? REGISTERS : 1];

        explicit Table(const float* entries) : values(entries) {
            float first[16 * REGISTERS + 1] = {};
            for (int code = 0; code < 16 * REGISTERS && code < 1 << BITS; ++code) first[code] = entries[code];
            for (int i = 0; i < REGISTERS; ++i) table[i] = _mm512_loadu_ps(first + 16 * i);
        }

        template <int K>
        Floats look_up(Bytes codes) const {
            const __m512i code = _mm512_srli_epi32(codes, 8 * K);
            if constexpr (REGISTERS == 0) return _mm512_i32gather_ps(_mm512_and_si512(code, set_ints(255)), values, 4);
            if constexpr (REGISTERS == 1) return _mm512_permutexvar_ps(code, table[0]);
            if constexpr (REGISTERS == 2) return _mm512_permutex2var_ps(table[0], code, table[1]);
            if constexpr (REGISTERS == 4) {
                const __mmask16 upper = _mm512_test_epi32_mask(code, set_ints(32));
                return _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(table[0], code, table[1]),
                                            _mm512_permutex2var_ps(table[2], code, table[3]));
            }
        }
    };

    static Floats load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
    static __mmask16 first_lanes(int64_t count) {
        return static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xFFFF);
    }
    static Floats load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
    static void store(float* to, Floats a, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), a); }
    static constexpr int interleaved(int place) { return place % 4 * 4 + place / 4; }
    static void interleave(float* to, Floats a, Floats b, Floats c) {
        const Floats zero = set(0.0f);
        interleave_pairs(to, _mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, zero));
        interleave_pairs(to + 32, _mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, zero));
    }
    static void interleave_pairs(float* to, Floats ab, Floats c) {
        const __m512d first = _mm512_castps_pd(ab), second = _mm512_castps_pd(c);
        store(to, _mm512_castpd_ps(_mm512_unpacklo_pd(first, second)));
        store(to + 16, _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    }
    static Floats set(float value) { return _mm512_set1_ps(value); }
    static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats if_less(Floats a, Floats b, Floats x, Floats y) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
    }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

    static Floats power(Floats a) {
        const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(a), set_ints(127));
        return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    }

    static Floats exponent(Floats a) { return _mm512_getexp_ps(a); }

    static Floats round(Floats a) {
        const Floats large = set(12582912.0f);
        return sub(add(a, large), large);
    }

    static void store_bytes(int8_t* to, Floats a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
    }

};

// Codes of 8 bits are flipped.
template <>
struct Simd::Decoder<8> {
    __m512i flip;

    explicit Decoder(const uint8_t* entries) : flip(_mm512_set1_epi8(static_cast<char>(entries[0]))) {}

    template <int J>
    Bytes group(const uint8_t* tile) const {
        return _mm512_xor_si512(load_register(tile + 64 * J), flip);
    }
};

}  // namespace
