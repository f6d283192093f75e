// Tokens, rows of float32 numbers, as products take them: quantized, fake-quantized or as they are, in whole tiles and
// bundles (see Tokens in isa.h).

#pragma once

#include "isa.h"
#include "scratch.h"

namespace gq {

// Integers, where both sides are integers; what else is quantized is so in floats.
Path path_of(const Weight& weight, int32_t activations);

class TokenRoom {
   public:
    // Room for that many tokens that meet the weight. Their number decides where each lies: reserve anew for another.
    void reserve(const Isa& isa, const Weight& weight, int32_t activations, int64_t count);
    // From several threads at once only tokens that lie in different multiples of isa.bundle.
    void put(const float* row, int64_t token);
    // `count` tokens from `first`, a multiple of isa.bundle; to the last, or a multiple of it again.
    Tokens tokens(int64_t first, int64_t count) const;
    Tokens tokens() const { return tokens(0, count_); }

   private:
    const Isa* isa_ = nullptr;
    Path path_ = FLOATS;
    int32_t activations_ = GQ_NONE;
    int64_t features_ = 0, padded_ = 0, count_ = 0;
    int8_t* q_ = nullptr;
    int32_t* sum_ = nullptr;
    float *scale_ = nullptr, *x_ = nullptr;
    Scratch<int8_t> integers_;
    Scratch<int32_t> sums_;
    Scratch<float> scales_, floats_;
};

}  // namespace gq
