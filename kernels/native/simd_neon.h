// The SIMD abstraction in NEON with its dot products of bytes (Armv8.2): four registers are 16 lanes.
// simd_portable.h says what each function computes.

#pragma once

#include <arm_neon.h>
#include <stdint.h>

#include "isa.h"

namespace {

struct Simd {
    static constexpr int OFFSET = 0;
    static constexpr int BUNDLE = 4;

    struct Bytes {  // four rows each
        uint8x16_t at[4];
    };
    struct Ints {
        int32x4_t at[4];
    };
    struct Floats {
        float32x4_t at[4];
    };

    // Bytes are looked up in up to 64 entries at once.
    template <int BITS>
    struct Decoder {
        // One and two bits stay where they are in a nibble: all codes in it are looked up without a shift, each in its
        // own table. Of 8 bits: what the code's bits are flipped by.
        static constexpr int TABLES = BITS == 8 ? 1 : BITS < 3 ? 4 / BITS : BITS < 5 ? 1 : 1 << (BITS - 4);

        uint8x16_t tables[TABLES];

        // Entries of 8 bits are entries[0] ^ code, which spares looking them up.
        explicit Decoder(const uint8_t* entries) {
            for (int table = 0; table < TABLES; ++table) {
                uint8_t bytes[16];
                for (int i = 0; i < 16; ++i) bytes[i] = entries[code(table, i)];
                tables[table] = vld1q_u8(bytes);
            }
        }

        static constexpr int code(int table, int i) {
            if (BITS == 8) return 0;
            if (BITS < 3) return i >> BITS * table & ((1 << BITS) - 1);
            return (16 * table + i) & ((1 << BITS) - 1);
        }

        template <int J>
        Bytes group(const uint8_t* tile) const {
            return {{quarter<J>(tile), quarter<J>(tile + 16), quarter<J>(tile + 32), quarter<J>(tile + 48)}};
        }

        template <int J>
        uint8x16_t quarter(const uint8_t* tile) const {
            if constexpr (BITS == 8) return veorq_u8(vld1q_u8(tile + 64 * J), tables[0]);
            if constexpr (BITS == 1) return vqtbl1q_u8(tables[J % 4], nibble<J / 4>(tile));
            if constexpr (BITS == 2) return vqtbl1q_u8(tables[J % 2], nibble<J / 2>(tile));
            if constexpr (BITS > 2 && BITS < 8) return look_up(code<J>(tile));
        }

        template <int I>
        static uint8x16_t nibble(const uint8_t* tile) {
            const uint8x16_t bytes = vld1q_u8(tile + 64 * (I / 2));
            if constexpr (I % 2) return vshrq_n_u8(bytes, 4);
            else return vandq_u8(bytes, vdupq_n_u8(15));
        }

        template <int J>
        static uint8x16_t code(const uint8_t* tile) {
            constexpr gq::Part FIRST = gq::part_of(BITS, J, 0);
            const uint8x16_t first = down<FIRST.bit>(vld1q_u8(tile + 64 * FIRST.register_));
            return clean<J>(append<J, FIRST.count>(first, tile));
        }

        // The code's bits from TO on, in place of what is above.
        template <int J, int TO>
        static uint8x16_t append(uint8x16_t code, const uint8_t* tile) {
            if constexpr (TO == BITS) {
                return code;
            } else {
                constexpr gq::Part PART = gq::part_of(BITS, J, TO);
                const uint8x16_t part = down<PART.bit>(vld1q_u8(tile + 64 * PART.register_));
                return append<J, TO + PART.count>(vsliq_n_u8(code, part, TO), tile);
            }
        }

        // Without what lay above the code's last part.
        template <int J, int TO = 0>
        static uint8x16_t clean(uint8x16_t code) {
            constexpr gq::Part PART = gq::part_of(BITS, J, TO);
            if constexpr (TO + PART.count < BITS) return clean<J, TO + PART.count>(code);
            else if constexpr (PART.bit + PART.count == 8) return code;
            else return vandq_u8(code, vdupq_n_u8((1 << BITS) - 1));
        }

        template <int BY>
        static uint8x16_t down(uint8x16_t bytes) {
            if constexpr (BY == 0) return bytes;
            else return vshrq_n_u8(bytes, BY);
        }

        uint8x16_t look_up(uint8x16_t code) const {
            if constexpr (BITS < 5) {
                return vqtbl1q_u8(tables[0], code);
            } else if constexpr (BITS == 5) {
                return vqtbl2q_u8({{tables[0], tables[1]}}, code);
            } else {
                const uint8x16_t bytes = vqtbl4q_u8({{tables[0], tables[1], tables[2], tables[3]}}, code);
                if constexpr (BITS == 6) return bytes;
                else return look_up_more(bytes, vsubq_u8(code, vdupq_n_u8(64)));
            }
        }

        uint8x16_t look_up_more(uint8x16_t bytes, uint8x16_t code) const {
            return vqtbx4q_u8(bytes, {{tables[4], tables[5], tables[6], tables[7]}}, code);
        }
    };

    template <class Function>
    static Floats each(Floats a, Floats b, Function function) {
        for (int i = 0; i < 4; ++i) a.at[i] = function(a.at[i], b.at[i]);
        return a;
    }

    static Ints zero() { return set_ints(0); }

    static Ints set_ints(int32_t value) {
        return {{vdupq_n_s32(value), vdupq_n_s32(value), vdupq_n_s32(value), vdupq_n_s32(value)}};
    }

    static Ints add(Ints a, Ints b) {
        for (int i = 0; i < 4; ++i) a.at[i] = vaddq_s32(a.at[i], b.at[i]);
        return a;
    }

    static Ints dot(Ints sum, Bytes weights, const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        const int8x16_t tokens = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int i = 0; i < 4; ++i) sum.at[i] = vdotq_s32(sum.at[i], vreinterpretq_s8_u8(weights.at[i]), tokens);
        return sum;
    }

    static Ints child(Ints node, Floats a, Floats b) {
        for (int i = 0; i < 4; ++i) {
            const int32x4_t less = vreinterpretq_s32_u32(vcltq_f32(a.at[i], b.at[i]));  // -1 or 0
            node.at[i] = vsubq_s32(vaddq_s32(node.at[i], node.at[i]), less);
        }
        return node;
    }
    static Bytes bytes(Ints a) {
        Bytes result;
        for (int i = 0; i < 4; ++i) result.at[i] = vreinterpretq_u8_s32(a.at[i]);
        return result;
    }
    static void store_ints(int32_t* to, Ints a) {
        for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, a.at[i]);
    }
    static void store_codes(uint8_t* to, Ints a) {
        const int16x8_t low = vcombine_s16(vmovn_s32(a.at[0]), vmovn_s32(a.at[1]));
        const int16x8_t high = vcombine_s16(vmovn_s32(a.at[2]), vmovn_s32(a.at[3]));
        vst1q_u8(to, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high))));
    }

    static Floats to_floats(Ints a) {
        return {{vcvtq_f32_s32(a.at[0]), vcvtq_f32_s32(a.at[1]), vcvtq_f32_s32(a.at[2]), vcvtq_f32_s32(a.at[3])}};
    }

    template <int K>
    static Floats signed_bytes(Bytes bytes) {
        Ints column;
        for (int i = 0; i < 4; ++i)
            column.at[i] = vshrq_n_s32(vshlq_n_s32(vreinterpretq_s32_u8(bytes.at[i]), 24 - 8 * K), 24);
        return to_floats(column);
    }

    // Sixteen entries are the 64 bytes that one look-up reaches; more are loaded one by one.
    template <int BITS>
    struct Table {
        const float* values;
        uint8x16x4_t table;

        explicit Table(const float* entries) : values(entries) {
            float first[16] = {};
            for (int code = 0; code < 16 && code < 1 << BITS; ++code) first[code] = entries[code];
            for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(first + 4 * i));
        }

        template <int K>
        Floats look_up(Bytes codes) const {
            Floats result;
            for (int i = 0; i < 4; ++i) result.at[i] = quarter<K>(codes.at[i]);
            return result;
        }

        template <int K>
        float32x4_t quarter(uint8x16_t codes) const {
            const uint32x4_t column = vshrq_n_u32(vshlq_n_u32(vreinterpretq_u32_u8(codes), 24 - 8 * K), 24);
            if constexpr (BITS > 4) {
                const float four[4] = {values[vgetq_lane_u32(column, 0)], values[vgetq_lane_u32(column, 1)],
                                       values[vgetq_lane_u32(column, 2)], values[vgetq_lane_u32(column, 3)]};
                return vld1q_f32(four);
            }
            const uint32x4_t places = vmlaq_u32(vdupq_n_u32(0x03020100), column, vdupq_n_u32(0x04040404));
            return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(places)));
        }
    };

    static Floats load(const float* from) {
        return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
    }
    static void store(float* to, Floats a) {
        for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.at[i]);
    }
    static Floats load(const float* from, int64_t count) {
        if (count >= 16) return load(from);
        float some[16] = {};
        for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
        return load(some);
    }
    static void store(float* to, Floats a, int64_t count) {
        if (count >= 16) return store(to, a);
        float all[16];
        store(all, a);
        for (int64_t lane = 0; lane < count; ++lane) to[lane] = all[lane];
    }
    static constexpr int interleaved(int place) { return place; }
    static void interleave(float* to, Floats a, Floats b, Floats c) {
        for (int i = 0; i < 4; ++i) vst4q_f32(to + 16 * i, {{a.at[i], b.at[i], c.at[i], vdupq_n_f32(0.0f)}});
    }
    static Floats set(float value) {
        return {{vdupq_n_f32(value), vdupq_n_f32(value), vdupq_n_f32(value), vdupq_n_f32(value)}};
    }
    static Floats add(Floats a, Floats b) { return each(a, b, [](auto x, auto y) { return vaddq_f32(x, y); }); }
    static Floats sub(Floats a, Floats b) { return each(a, b, [](auto x, auto y) { return vsubq_f32(x, y); }); }
    static Floats mul(Floats a, Floats b) { return each(a, b, [](auto x, auto y) { return vmulq_f32(x, y); }); }
    static Floats div(Floats a, Floats b) { return each(a, b, [](auto x, auto y) { return vdivq_f32(x, y); }); }
    static Floats max(Floats a, Floats b) {
        return each(a, b, [](auto x, auto y) { return vbslq_f32(vcgtq_f32(x, y), x, y); });
    }
    static Floats min(Floats a, Floats b) {
        return each(a, b, [](auto x, auto y) { return vbslq_f32(vcltq_f32(x, y), x, y); });
    }
    static Floats if_less(Floats a, Floats b, Floats x, Floats y) {
        for (int i = 0; i < 4; ++i) x.at[i] = vbslq_f32(vcltq_f32(a.at[i], b.at[i]), x.at[i], y.at[i]);
        return x;
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        for (int i = 0; i < 4; ++i) c.at[i] = vfmaq_f32(c.at[i], a.at[i], b.at[i]);
        return c;
    }

    static Floats power(Floats a) {
        for (int i = 0; i < 4; ++i) {
            const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(a.at[i]), vdupq_n_s32(127));
            a.at[i] = vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
        }
        return a;
    }

    static Floats exponent(Floats a) {
        for (int i = 0; i < 4; ++i) {
            const int32x4_t biased = vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(a.at[i]), 23));
            a.at[i] = vcvtq_f32_s32(vsubq_s32(biased, vdupq_n_s32(127)));
        }
        return a;
    }

    static Floats round(Floats a) {
        const Floats large = set(12582912.0f);
        return sub(add(a, large), large);
    }

    static void store_bytes(int8_t* to, Floats a) {
        int16x4_t words[4];
        for (int i = 0; i < 4; ++i) words[i] = vmovn_s32(vcvtq_s32_f32(a.at[i]));
        vst1_s8(to, vmovn_s16(vcombine_s16(words[0], words[1])));
        vst1_s8(to + 8, vmovn_s16(vcombine_s16(words[2], words[3])));
    }

};

}  // namespace
