// The table of kernels of an instruction set: what each isa_*.cpp makes of its simd_*.h.

#pragma once

#include "block.h"
#include "decode.h"
#include "depthwise.h"
#include "gates.h"
#include "isa.h"
#include "norm.h"
#include "quantize.h"

namespace {

template <class Simd>
constexpr gq::Isa make_isa(const char* name) {
    using Block = BlockKernels<Simd>;
    using Decode = DecodeKernels<Simd>;
    return {name,
            Simd::BUNDLE,
            {{nullptr, Block::template integers<1>, Block::template integers<2>, Block::template integers<3>,
              Block::template integers<4>, Block::template integers<5>, Block::template integers<6>,
              Block::template integers<7>, Block::template integers<8>},
             {nullptr, Block::template floats<1>, Block::template floats<2>, Block::template floats<3>,
              Block::template floats<4>, Block::template floats<5>, Block::template floats<6>,
              Block::template floats<7>, Block::template floats<8>}},
            QuantizeKernels<Simd>::quantize,
            NormKernels<Simd>::normalize,
            GateKernels<Simd>::lstm,
            GateKernels<Simd>::gru,
            {nullptr, Decode::template decode<1>, Decode::template decode<2>, Decode::template decode<3>,
             Decode::template decode<4>, Decode::template decode<5>, Decode::template decode<6>,
             Decode::template decode<7>, Decode::template decode<8>},
            DepthwiseKernels<Simd>::depthwise};
}

}  // namespace
