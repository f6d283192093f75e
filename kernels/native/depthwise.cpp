// Depthwise convolution over time: gq_depthwise_conv1d.
//
// Windows of 16 channels are copied, with zeros around them, to where neighbouring moments lie together: that costs
// what one tap does, and spares the taps all edges, strides of memory, and channels that are no multiple of 16.

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"
#include "scratch.h"
#include "threads.h"

namespace gq {
namespace {

constexpr int64_t WINDOW = 512;  // moments: 32 KB
constexpr int64_t MOST = INT32_MAX;

struct Convolution {
    Weight weight;
    const float *x, *bias;
    float* y;
    int64_t batch, length, out_length, stride, padding, dilation;

    int64_t taps() const { return weight.columns; }
    int64_t span() const { return (taps() - 1) * dilation + 1; }
    // A kernel wider than a window is gathered tap by tap for one output at a time.
    bool gathered() const { return span() > WINDOW; }
    int64_t outputs() const { return gathered() ? 1 : std::min(out_length, (WINDOW - span()) / stride + 1); }
    int64_t window() const { return gathered() ? taps() : (outputs() - 1) * stride + span(); }
};

// What a thread computes in.
struct Room {
    float *taps, *window, *y;

    static int64_t size(const Convolution& conv) {
        return BLOCK * (conv.weight.tiles() * TILE + conv.window() + conv.outputs());
    }
    Room(const Convolution& conv, float* memory)
        : taps(memory), window(taps + BLOCK * conv.weight.tiles() * TILE), y(window + BLOCK * conv.window()) {}
};

// x is at the first of `channels` channels.
void copy_window(const Convolution& conv, const float* x, int64_t first, int64_t count, int64_t channels,
                 float* window) {
    const int64_t step = conv.gathered() ? conv.dilation : 1;
    for (int64_t i = 0; i < count; ++i, window += BLOCK) {
        const int64_t moment = first + step * i;
        if (moment >= 0 && moment < conv.length)
            std::memcpy(window, x + moment * conv.weight.rows, channels * sizeof(float));
        else
            std::fill_n(window, BLOCK, 0.0f);
    }
}

// 16 channels of one sequence.
void convolve(const Isa& isa, const Convolution& conv, int64_t block, int64_t sequence, const Room& room) {
    const int64_t rows = conv.weight.rows, first_row = conv.weight.first_row(block);
    const int64_t channels = conv.weight.row_count(block);
    const float* x = conv.x + sequence * conv.length * rows + first_row;
    float* y = conv.y + sequence * conv.out_length * rows + first_row;
    float bias[BLOCK] = {};
    if (conv.bias) std::copy_n(conv.bias + first_row, channels, bias);
    for (int64_t t = 0; t < conv.out_length; t += conv.outputs()) {
        const int64_t count = std::min(conv.outputs(), conv.out_length - t);
        const int64_t moments = conv.window() - (conv.outputs() - count) * conv.stride;
        copy_window(conv, x, t * conv.stride - conv.padding, moments, channels, room.window);
        isa.depthwise(room.taps, conv.taps(), room.window, bias, room.y, count, conv.stride,
                      conv.gathered() ? 1 : conv.dilation);
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(y + (t + i) * rows, room.y + i * BLOCK, channels * sizeof(float));
    }
}

// Blocks one after the other, so that taps are decoded once for the sequences that a thread has of a block.
void run(const Isa& isa, const Convolution& conv, int64_t begin, int64_t end, const Room& room) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / conv.batch;
        if (item == begin || item % conv.batch == 0)
            isa.decode[conv.weight.bits](conv.weight, block, 0, conv.weight.tiles(), room.taps);
        convolve(isa, conv, block, item % conv.batch, room);
    }
}

Convolution checked(const gq_weight* weight, const float* x, int64_t x_count, const float* bias, int64_t bias_count,
                    float* y, int64_t y_count, int64_t batch, int64_t length, int64_t stride, int64_t padding,
                    int64_t dilation) {
    Convolution conv{check_weight("weight", weight), x, bias, y, batch, length, 0, stride, padding, dilation};
    if (conv.weight.groups != 1) refuse("weight.groups must be 1, got %d", conv.weight.groups);
    check_between("batch", batch, 0, MOST);
    check_between("length", length, 0, MOST);
    check_between("stride", stride, 1, MOST);
    check_between("padding", padding, 0, MOST);
    check_between("dilation", dilation, 1, MOST);
    check_between("weight.columns", conv.weight.columns, 1, MOST);
    const int64_t room = length + 2 * padding - conv.span();
    if (room < 0)
        refuse("length with its padding must be at least the %lld that the kernel spans, got %lld",
               (long long)conv.span(), (long long)(length + 2 * padding));
    conv.out_length = room / stride + 1;
    const int64_t rows = elements(batch, conv.weight.rows);
    check_array("x", x, x_count, elements(rows, length));
    check_array("y", y, y_count, elements(rows, conv.out_length));
    if (bias) check_count("bias", bias_count, conv.weight.rows);
    return conv;
}

}  // namespace
}  // namespace gq

int32_t gq_depthwise_conv1d(const gq_weight* weight, const float* x, int64_t x_count, const float* bias,
                            int64_t bias_count, float* y, int64_t y_count, int64_t batch, int64_t length,
                            int64_t stride, int64_t padding, int64_t dilation, int32_t threads) {
    using namespace gq;
    return guarded([&] {
        const Convolution conv = checked(weight, x, x_count, bias, bias_count, y, y_count, batch, length, stride,
                                         padding, dilation);
        check_between("threads", threads, 1, MOST);
        thread_local Scratch<float> scratch;
        const int64_t items = conv.batch * conv.weight.blocks(), size = Room::size(conv);
        if (!items) return;  // without rows, taps take no memory
        const int64_t multiplications = elements(y_count, conv.taps());
        const int64_t useful = std::min<int64_t>(worthwhile(threads, multiplications), items);
        const int most = static_cast<int>(std::max<int64_t>(1, useful));
        float* memory = scratch.reserve(elements(most, size));
        const Isa& isa = current_isa();
        parallel(most, [&](int index, int count) {
            run(isa, conv, items * index / count, items * (index + 1) / count, Room(conv, memory + index * size));
        });
    });
}
