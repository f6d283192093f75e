// The table of kernels of an instruction set: what each isa_*.cpp makes of its simd_*.h.

#pragma once

#include "block.h"
#include "decode.h"
#include "depthwise.h"
#include "fake_quantize.h"
#include "gates.h"
#include "isa.h"
#include "norm.h"
#include "quantize.h"

// A function of every width.
#define GQ_WIDTHS(function) \
    {nullptr,     function<1>, function<2>, function<3>, function<4>, function<5>, function<6>, function<7>, \
     function<8>}

namespace {

template <class Simd>
constexpr gq::Isa make_isa(const char* name) {
    using Block = BlockKernels<Simd>;
    using Decode = DecodeKernels<Simd>;
    using Fake = FakeQuantizeKernels<Simd>;
    return {name,
            Simd::BUNDLE,
            {GQ_WIDTHS(Block::template integers), GQ_WIDTHS(Block::template floats)},
            QuantizeKernels<Simd>::quantize,
            NormKernels<Simd>::normalize,
            GateKernels<Simd>::lstm,
            GateKernels<Simd>::gru,
            GQ_WIDTHS(Decode::template decode),
            GQ_WIDTHS(Fake::template hard),
            GQ_WIDTHS(Fake::template soft),
            GQ_WIDTHS(Fake::template encode),
            GQ_WIDTHS(Fake::template backward),
            DepthwiseKernels<Simd>::depthwise};
}

}  // namespace
