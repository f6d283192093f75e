// Every function of a SIMD header against simd_portable.h: compiled with -DSIMD_HEADER="simd_avx2.h" and its flags.
// Prints what differs and returns how much did.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define Simd Expected
#include "simd_portable.h"
#undef Simd
#include SIMD_HEADER

namespace {

int failures = 0;
uint64_t state = 1;

uint32_t random_bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 32);
}

float random_float() {
    static const float edges[] = {0.0f,      -0.0f,     INFINITY, -INFINITY, NAN,   1.0f,  -1.0f,
                                  1.1754e-38f, 1e-40f, 3.4e38f,  -3.4e38f,  0.5f,  2.5f,  -3.5f};
    const uint32_t bits = random_bits();
    if (bits % 4 == 0) return edges[bits / 4 % 14];
    return (static_cast<float>(random_bits()) / 2147483648.0f - 1.0f) * (bits % 8 < 4 ? 1.0f : 1e-3f);
}

void random_bytes(uint8_t* bytes, int count) {
    for (int i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(random_bits());
}

// NaNs are alike, zeros are not.
bool same(const float* a, const float* b, int count) {
    for (int i = 0; i < count; ++i)
        if (!(isnan(a[i]) && isnan(b[i])) && memcmp(a + i, b + i, 4)) return false;
    return true;
}

void check(bool right, const char* what, int detail = 0) {
    if (right) return;
    if (++failures < 50) printf("%s differs (%d)\n", what, detail);
}

template <class S>
typename S::Bytes bytes_of(const uint8_t* bytes) {  // as 8-bit codes, neither looked up nor flipped
    uint8_t entries[256];
    for (int code = 0; code < 256; ++code) entries[code] = static_cast<uint8_t>(code);
    const typename S::template Decoder<8> decoder(entries);
    return decoder.template group<0>(bytes);
}

template <class S>
void write_ints(int32_t* to, typename S::Ints ints) {
    memcpy(to, &ints, sizeof ints);
    static_assert(sizeof ints == 64, "16 lanes, in order");
}

template <class S>
void write_bytes(uint8_t* to, typename S::Bytes bytes) {
    memcpy(to, &bytes, sizeof bytes);
    static_assert(sizeof bytes == 64, "16 rows of four, in order");
}

template <int BITS, int J>
void check_group(const uint8_t* entries, const uint8_t* tile) {
    uint8_t expected[64], got[64];
    const Expected::Decoder<BITS> reference(entries);
    const Simd::Decoder<BITS> decoder(entries);
    write_bytes<Expected>(expected, reference.template group<J>(tile));
    write_bytes<Simd>(got, decoder.template group<J>(tile));
    check(!memcmp(expected, got, 64), "Decoder", 10 * BITS + J);
}

template <int BITS, int K>
void check_column(const float* values, const uint8_t* codes) {
    float expected[16], got[16];
    const Expected::Table<BITS> reference(values);
    const Simd::Table<BITS> table(values);
    Expected::store(expected, reference.template look_up<K>(bytes_of<Expected>(codes)));
    Simd::store(got, table.template look_up<K>(bytes_of<Simd>(codes)));
    check(same(expected, got, 16), "Table", 10 * BITS + K);
}

template <int BITS>
void check_width() {
    uint8_t entries[1 << BITS], tile[BITS * 64 + 1], codes[64];
    float values[1 << BITS];
    random_bytes(entries, sizeof entries);
    random_bytes(tile, sizeof tile);
    random_bytes(codes, sizeof codes);
    for (int code = 0; code < 1 << BITS; ++code) {
        values[code] = random_float();
        if (BITS == 8) entries[code] = static_cast<uint8_t>(entries[0] ^ code);
    }
    for (uint8_t& code : codes) code &= (1 << BITS) - 1;
    const uint8_t* unaligned = tile + 1;
    check_group<BITS, 0>(entries, unaligned), check_group<BITS, 1>(entries, unaligned);
    check_group<BITS, 2>(entries, unaligned), check_group<BITS, 3>(entries, unaligned);
    check_group<BITS, 4>(entries, unaligned), check_group<BITS, 5>(entries, unaligned);
    check_group<BITS, 6>(entries, unaligned), check_group<BITS, 7>(entries, unaligned);
    check_column<BITS, 0>(values, codes), check_column<BITS, 1>(values, codes);
    check_column<BITS, 2>(values, codes), check_column<BITS, 3>(values, codes);
}

template <int K>
void check_signed(const uint8_t* bytes) {
    float expected[16], got[16];
    Expected::store(expected, Expected::signed_bytes<K>(bytes_of<Expected>(bytes)));
    Simd::store(got, Simd::signed_bytes<K>(bytes_of<Simd>(bytes)));
    check(same(expected, got, 16), "signed_bytes", K);
}

// Weights from end to end of int8, tokens too but for -128, which quantization never gives.
void check_integers(bool extremes) {
    uint8_t weights[64], shifted[64];
    int8_t x[2][5];
    random_bytes(weights, 64);
    random_bytes(reinterpret_cast<uint8_t*>(x), sizeof x);
    for (auto& token : x)
        for (int8_t& value : token)
            if (extremes) value = random_bits() % 2 ? 127 : -127;
            else if (value == -128) value = 0;
    if (extremes)
        for (uint8_t& weight : weights) weight = random_bits() % 2 ? 0x7F : 0x80;
    for (int i = 0; i < 64; ++i) shifted[i] = static_cast<uint8_t>(weights[i] + Simd::OFFSET);
    check_signed<0>(weights), check_signed<1>(weights), check_signed<2>(weights), check_signed<3>(weights);
    Expected::Ints reference = Expected::zero();
    Simd::Ints sum = Simd::zero();
    int32_t correction = 0;
    for (const auto& token : x) {
        reference = Expected::dot(reference, bytes_of<Expected>(weights), token + 1);
        sum = Simd::dot(sum, bytes_of<Simd>(shifted), token + 1);
        for (int k = 1; k < 5; ++k) correction += Simd::OFFSET * token[k];
    }
    reference = Expected::add(reference, reference);
    sum = Simd::add(sum, sum);
    int32_t expected[16], got[16];
    write_ints<Expected>(expected, reference);
    write_ints<Simd>(got, sum);
    for (int lane = 0; lane < 16; ++lane) check(got[lane] - 2 * correction == expected[lane], "dot, add", lane);
    float numbers[16];
    Simd::store(numbers, Simd::to_floats(sum));
    for (int lane = 0; lane < 16; ++lane) check(numbers[lane] == static_cast<float>(got[lane]), "to_floats", lane);
}

template <class S>
void arithmetic(const float* a, const float* b, float (*y)[16]) {
    const typename S::Floats left = S::load(a), right = S::load(b);
    S::store(y[0], S::add(left, right));
    S::store(y[1], S::sub(left, right));
    S::store(y[2], S::mul(left, right));
    S::store(y[3], S::div(left, right));
    S::store(y[4], S::max(left, right));
    S::store(y[5], S::min(left, right));
    S::store(y[6], S::set(a[3]));
}

void check_floats() {
    static const char* const names[] = {"add", "sub", "mul", "div", "max", "min", "set"};
    float a[17], b[17], expected[7][16], got[7][16];
    for (int i = 0; i < 17; ++i) a[i] = random_float(), b[i] = random_float();
    arithmetic<Expected>(a + 1, b + 1, expected);
    arithmetic<Simd>(a + 1, b + 1, got);
    for (int i = 0; i < 7; ++i) check(same(expected[i], got[i], 16), names[i]);
    float sums[16];
    Simd::store(sums, Simd::fma(Simd::load(a), Simd::load(b), Simd::load(a + 1)));
    for (int i = 0; i < 16; ++i) {
        const float once = fmaf(a[i], b[i], a[i + 1]), twice = a[i] * b[i] + a[i + 1];
        check(same(sums + i, &once, 1) || same(sums + i, &twice, 1), "fma");
    }
}

template <class S>
void whole_numbers(const float* integers, const float* fractions, const float* small, float (*y)[16], int8_t* bytes) {
    S::store(y[0], S::power(S::load(integers)));
    S::store(y[1], S::round(S::load(fractions)));
    S::store_bytes(bytes, S::load(small));
}

void check_whole_numbers() {
    float integers[16], fractions[16], small[16], expected[2][16], got[2][16];
    int8_t expected_bytes[16], bytes[16];
    for (int i = 0; i < 16; ++i) {
        integers[i] = static_cast<float>(static_cast<int>(random_bits() % 254) - 126);
        fractions[i] = static_cast<float>(static_cast<int>(random_bits() % 8388607) - 4194303) /
                       (random_bits() % 2 ? 2.0f : 8192.0f);
        small[i] = static_cast<float>(static_cast<int>(random_bits() % 256) - 128);
    }
    whole_numbers<Expected>(integers, fractions, small, expected, expected_bytes);
    whole_numbers<Simd>(integers, fractions, small, got, bytes);
    check(same(expected[0], got[0], 16), "power");
    check(same(expected[1], got[1], 16), "round");
    check(!memcmp(expected_bytes, bytes, 16), "store_bytes");
}

// Borders and numbers among which some are equal; the first nodes of trees.
template <class S>
void tree_step(const float* a, const float* b, const int32_t* nodes, int32_t* children, uint8_t* codes, uint8_t* low) {
    typename S::Ints node;
    memcpy(&node, nodes, sizeof node);
    S::store_ints(children, S::child(node, S::load(a), S::load(b)));
    S::store_codes(codes, node);
    uint8_t bytes[64];
    write_bytes<S>(bytes, S::bytes(node));
    for (int lane = 0; lane < 16; ++lane) low[lane] = bytes[4 * lane];
}

void check_trees() {
    float a[16], b[16];
    int32_t nodes[16], expected[16], got[16];
    uint8_t expected_codes[16], codes[16], expected_low[16], low[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = random_float(), b[i] = random_bits() % 4 ? random_float() : a[i];
        nodes[i] = static_cast<int32_t>(random_bits() % 256);
    }
    tree_step<Expected>(a, b, nodes, expected, expected_codes, expected_low);
    tree_step<Simd>(a, b, nodes, got, codes, low);
    check(!memcmp(expected, got, sizeof got), "child, store_ints");
    check(!memcmp(expected_codes, codes, 16), "store_codes");
    check(!memcmp(expected_low, low, 16), "bytes");
}

template <class S>
void choose(const float* a, const float* b, const float* x, const float* y, float* result) {
    S::store(result, S::if_less(S::load(a), S::load(b), S::load(x), S::load(y)));
}

void check_choice() {
    float a[16], b[16], x[16], y[16], positive[16], expected[16], got[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = random_float(), b[i] = random_float(), x[i] = random_float(), y[i] = random_float();
        positive[i] = ldexpf(1.0f + static_cast<float>(random_bits() % 1024) / 1024.0f, random_bits() % 254 - 126);
    }
    choose<Expected>(a, b, x, y, expected);
    choose<Simd>(a, b, x, y, got);
    check(same(expected, got, 16), "if_less");
    Expected::store(expected, Expected::exponent(Expected::load(positive)));
    Simd::store(got, Simd::exponent(Simd::load(positive)));
    check(same(expected, got, 16), "exponent");
}

// The rest of a row: neither more nor less of it.
void check_rest() {
    const int count = static_cast<int>(random_bits() % 20) + 1, there = count < 16 ? count : 16;
    float numbers[16], loaded[16], stored[17];
    for (float& number : numbers) number = random_float();
    Simd::store(loaded, Simd::load(numbers, count));
    memset(stored, 0xFF, sizeof stored);
    Simd::store(stored, Simd::load(numbers), count);
    for (int i = 0; i < 16; ++i) {
        const float zero = 0.0f;
        check(same(loaded + i, i < there ? numbers + i : &zero, 1), "load", count);
        check(i < there ? same(stored + i, numbers + i, 1) : isnan(stored[i]), "store", count);
    }
}

void check_interleaved() {
    float a[16], b[16], c[16], all[64];
    for (int i = 0; i < 16; ++i) a[i] = random_float(), b[i] = random_float(), c[i] = random_float();
    Simd::interleave(all, Simd::load(a), Simd::load(b), Simd::load(c));
    uint32_t lanes = 0;
    for (int place = 0; place < 16; ++place) {
        const int lane = Simd::interleaved(place);
        const float expected[4] = {a[lane], b[lane], c[lane], 0.0f};
        check(same(expected, all + 4 * place, 4), "interleave", place);
        lanes |= 1u << lane;
    }
    check(lanes == 0xFFFF, "interleaved");
}

}  // namespace

int main() {
    for (int round = 0; round < 500; ++round) {
        check_width<1>(), check_width<2>(), check_width<3>(), check_width<4>();
        check_width<5>(), check_width<6>(), check_width<7>(), check_width<8>();
        check_integers(round % 2);
        check_floats();
        check_whole_numbers();
        check_trees();
        check_choice();
        check_rest();
        check_interleaved();
    }
    printf("%d differences\n", failures);
    return failures != 0;
}
