// The SIMD abstraction in plain C++, which every simd_*.h repeats with its own instructions: 16 lanes, one for each row
// of a block. Kernels are written once, against these names.
//
// All but fma() rounds as IEEE float32 prescribes, operation by operation, so that what avoids fma() gives the same
// bits on every instruction set.

#pragma once

#include <stdint.h>

#include "isa.h"


namespace {

struct Simd {
    static constexpr int OFFSET = 0;  // what weights have added when dot() sees them: 128 where it takes unsigned bytes
    static constexpr int BUNDLE = 4;  // how many Ints or Floats, a power of two, registers have room for beside a tile

    struct Bytes {  // [16 rows][4 columns]
        uint8_t at[64];
    };
    struct Ints {
        int32_t at[16];
    };
    struct Floats {
        float at[16];
    };

    // Bytes entries[code] of the columns 4 J to 4 J + 3 of a tile. Those of 8 bits are entries[0] ^ code, which spares
    // most instruction sets a look-up in 256.
    template <int BITS>
    struct Decoder {
        uint8_t map[256];

        explicit Decoder(const uint8_t* entries) {
            for (int code = 0; code < 1 << BITS; ++code) map[code] = entries[code];
        }

        template <int J>
        GQ_CALLED Bytes group(const uint8_t* tile) const {
            Bytes bytes;
            for (int place = 0; place < 64; ++place) bytes.at[place] = code<J>(tile + place);
            for (int place = 0; place < 64; ++place) bytes.at[place] = map[bytes.at[place]];
            return bytes;
        }

        // The code at that place, from bit TO on, its parts put together.
        template <int J, int TO = 0>
        static uint8_t code(const uint8_t* place) {
            constexpr gq::Part PART = gq::part_of(BITS, J, TO);
            const int part = (place[64 * PART.register_] >> PART.bit & ((1 << PART.count) - 1)) << TO;
            if constexpr (TO + PART.count == BITS) return static_cast<uint8_t>(part);
            else return static_cast<uint8_t>(part | code<J, TO + PART.count>(place));
        }
    };

    static Ints zero() { return {}; }

    static Ints set_ints(int32_t value) {
        Ints result;
        for (int lane = 0; lane < 16; ++lane) result.at[lane] = value;
        return result;
    }

    static Ints add(Ints a, Ints b) {
        for (int lane = 0; lane < 16; ++lane) a.at[lane] += b.at[lane];
        return a;
    }

    // sum + the products of each row's four weights, OFFSET added, with x[0..3]. Exact.
    GQ_CALLED static Ints dot(Ints sum, Bytes weights, const int8_t* x) {
        for (int lane = 0; lane < 16; ++lane)
            for (int k = 0; k < 4; ++k) sum.at[lane] += static_cast<int8_t>(weights.at[4 * lane + k]) * x[k];
        return sum;
    }

    // 2 node + 1 where a < b, 2 node elsewhere: a step down a search tree.
    GQ_CALLED static Ints child(Ints node, Floats a, Floats b) {
        for (int lane = 0; lane < 16; ++lane) node.at[lane] = 2 * node.at[lane] + (a.at[lane] < b.at[lane]);
        return node;
    }

    // Numbers from 0 to 255 as column 0 of rows of bytes, the other columns 0: what tables look up.
    GQ_CALLED static Bytes bytes(Ints a) {
        Bytes result = {};
        for (int lane = 0; lane < 16; ++lane) result.at[4 * lane] = static_cast<uint8_t>(a.at[lane]);
        return result;
    }

    static void store_ints(int32_t* to, Ints a) {
        for (int lane = 0; lane < 16; ++lane) to[lane] = a.at[lane];
    }

    // Numbers from 0 to 255 to 16 bytes.
    static void store_codes(uint8_t* to, Ints a) {
        for (int lane = 0; lane < 16; ++lane) to[lane] = static_cast<uint8_t>(a.at[lane]);
    }

    static Floats to_floats(Ints a) {
        Floats result;
        for (int lane = 0; lane < 16; ++lane) result.at[lane] = static_cast<float>(a.at[lane]);
        return result;
    }

    // Column K of each row's four signed bytes.
    template <int K>
    GQ_CALLED static Floats signed_bytes(Bytes bytes) {
        Floats result;
        for (int lane = 0; lane < 16; ++lane) result.at[lane] = static_cast<int8_t>(bytes.at[4 * lane + K]);
        return result;
    }

    // values[code] of column K of each row's four codes.
    template <int BITS>
    struct Table {
        const float* values;

        explicit Table(const float* entries) : values(entries) {}

        template <int K>
        GQ_CALLED Floats look_up(Bytes codes) const {
            Floats result;
            for (int lane = 0; lane < 16; ++lane) result.at[lane] = values[codes.at[4 * lane + K]];
            return result;
        }
    };

    template <class Function>
    static Floats each(Floats a, Floats b, Function function) {
        for (int lane = 0; lane < 16; ++lane) a.at[lane] = function(a.at[lane], b.at[lane]);
        return a;
    }

    static Floats load(const float* from) {
        Floats result;
        for (int lane = 0; lane < 16; ++lane) result.at[lane] = from[lane];
        return result;
    }
    static void store(float* to, Floats a) {
        for (int lane = 0; lane < 16; ++lane) to[lane] = a.at[lane];
    }
    // Only the first `count` lanes, all where there are more than 16; the others are loaded as zeros.
    GQ_CALLED static Floats load(const float* from, int64_t count) {
        Floats result = {};
        for (int lane = 0; lane < 16 && lane < count; ++lane) result.at[lane] = from[lane];
        return result;
    }
    GQ_CALLED static void store(float* to, Floats a, int64_t count) {
        for (int lane = 0; lane < 16 && lane < count; ++lane) to[lane] = a.at[lane];
    }
    // to[4 place + 0, 1, 2, 3] = a, b, c, 0 of the lane that is interleaved(place).
    static constexpr int interleaved(int place) { return place; }
    GQ_CALLED static void interleave(float* to, Floats a, Floats b, Floats c) {
        for (int lane = 0; lane < 16; ++lane) {
            const float four[4] = {a.at[lane], b.at[lane], c.at[lane], 0.0f};
            __builtin_memcpy(to + 4 * lane, four, sizeof four);
        }
    }
    static Floats set(float value) {
        Floats result;
        for (int lane = 0; lane < 16; ++lane) result.at[lane] = value;
        return result;
    }
    static Floats add(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x + y; }); }
    static Floats sub(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x - y; }); }
    static Floats mul(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x * y; }); }
    static Floats div(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x / y; }); }
    // The second where the first is NaN, as x86 has it.
    static Floats max(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x > y ? x : y; }); }
    static Floats min(Floats a, Floats b) { return each(a, b, [](float x, float y) { return x < y ? x : y; }); }
    // x where a < b, y elsewhere.
    GQ_CALLED static Floats if_less(Floats a, Floats b, Floats x, Floats y) {
        for (int lane = 0; lane < 16; ++lane) x.at[lane] = a.at[lane] < b.at[lane] ? x.at[lane] : y.at[lane];
        return x;
    }
    GQ_CALLED static Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }

    // 2^a of integers -126 <= a <= 127.
    static Floats power(Floats a) {
        Floats result;
        for (int lane = 0; lane < 16; ++lane) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(a.at[lane]) + 127) << 23;
            __builtin_memcpy(&result.at[lane], &bits, 4);
        }
        return result;
    }

    // The largest integer k with 2^k <= a, of normal a > 0.
    GQ_CALLED static Floats exponent(Floats a) {
        for (int lane = 0; lane < 16; ++lane) {
            uint32_t bits;
            __builtin_memcpy(&bits, &a.at[lane], 4);
            a.at[lane] = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
        }
        return a;
    }

    // To the nearest integer, ties to even; |a| < 2^22.
    static Floats round(Floats a) {
        const Floats large = set(12582912.0f);  // 1.5 * 2^23: the last bit of the sum is worth 1
        return sub(add(a, large), large);
    }

    // Integers -128 <= a <= 127 to 16 bytes.
    static void store_bytes(int8_t* to, Floats a) {
        for (int lane = 0; lane < 16; ++lane) to[lane] = static_cast<int8_t>(a.at[lane]);
    }

};

}  // namespace
