// LSTM and GRU layers: gq_recurrent. gq_triton/kernels/packed_recurrent.py has the mathematics.
//
// Time runs in parts of a bounded number of tokens: the products of a part's inputs with W_ih come first, so that its
// codes are read once for all of them; then its segments run step by step. A thread has the same blocks of units, all
// gates of them, from beginning to end: they are one stream of panels, and what it computes of the inputs and of c
// nobody else needs. Steps go to and fro: what one has read last of W_hh the next finds in a cache too small for all of
// it. Threads meet once a step, when its h is complete, and once more before a projection. What all need of h each
// quantizes for itself, which costs less than meeting again.

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "gq_native.h"
#include "isa.h"
#include "scratch.h"
#include "threads.h"
#include "tokens.h"

namespace gq {
namespace {

constexpr int64_t INPUT_NUMBERS = 1 << 18;  // of a part's products with W_ih: 1 MB
constexpr int64_t FEWEST = 16;              // tokens of a part, and a divisor: whole bundles
constexpr int64_t PRODUCTS = 1 << 14;       // of a step that are there at a time, if more than one block: 64 KB
constexpr int64_t TURNS = 4;                // runs of units that a step is made of, if there are as many
constexpr int64_t MOST = INT32_MAX;

struct Segment {
    int64_t row, sequence, count, before;
};

// A checked weight and what enters it.
struct Operand {
    Weight weight;
    int32_t activations;

    void reserve(const Isa& isa, TokenRoom& room, int64_t tokens) const {
        room.reserve(isa, weight, activations, tokens);
    }
    // Of `blocks` blocks: whose products begin `stride` numbers apart.
    void multiply(const Isa& isa, int64_t block, int64_t blocks, const TokenRoom& x, float* y, int64_t stride) const {
        isa.product[path_of(weight, activations)][weight.bits](weight, block, blocks, x.tokens(), y, stride);
    }
};

struct Layer {
    gq_recurrent_arguments of;
    Operand ih, hh, hr;
    const Isa& isa;

    bool is_lstm() const { return gates() == 4; }
    bool projected() const { return of.hr; }
    int64_t gates() const { return ih.weight.groups; }
    int64_t inputs() const { return ih.weight.columns; }
    int64_t hidden() const { return ih.weight.group_rows(); }
    int64_t size() const { return hh.weight.columns; }
    int64_t unit_blocks() const { return ih.weight.group_blocks(); }
    // Tokens of a part, at most.
    int64_t tokens() const {
        const int64_t most = INPUT_NUMBERS / (ih.weight.blocks() * BLOCK) / FEWEST * FEWEST;
        return std::min(of.steps, std::max(FEWEST, most));
    }
    // From block to block of the inputs' products; odd, so that lines of neighbouring blocks do not share a cache set.
    int64_t input_stride() const { return (tokens() | 1) * BLOCK; }
};

// Hands out the segments in order, cut where a part of time ends: sequences of a step do not depend on each other.
class Walk {
   public:
    explicit Walk(const Layer& layer) : next_(layer.of.segments), end_(next_ + 4 * layer.of.segment_count) {}

    bool done() const { return next_ == end_; }

    Segment take(int64_t most) {
        const int64_t count = std::min(most, next_[2] - taken_), before = next_[3];
        const Segment segment{next_[0] + taken_, next_[1] + taken_, count, before < 0 ? -1 : before + taken_};
        taken_ += count;
        if (taken_ == next_[2]) {
            next_ += 4;
            taken_ = 0;
        }
        return segment;
    }

   private:
    const int64_t *next_, *end_;
    int64_t taken_ = 0;
};

// Memory of a call, reserved before threads begin. What they share:
struct Shared {
    TokenRoom x;
    Scratch<float> inputs, m;
};

// and what each has for itself.
struct Own {
    TokenRoom h, m;
    Scratch<float> products, c, state;
};

// One thread of a call.
class Worker {
   public:
    Worker(const Layer& layer, Shared& shared, Own& own, Barrier& barrier, int index, int count)
        : layer_(layer), of_(layer.of), isa_(layer.isa), gates_(layer.gates()), hidden_(layer.hidden()),
          size_(layer.size()), input_stride_(layer.input_stride()), shared_(shared), own_(own), barrier_(barrier),
          index_(index), count_(count), units_(share(layer.unit_blocks())) {}

    void run() {
        copy_last_biases();
        for (Walk walk(layer_); !walk.done();) {
            const int64_t tokens = std::min(layer_.tokens(), of_.steps - done_);
            take_inputs(walk, tokens);
            multiply_inputs();
            for (int64_t slot = 0; slot < tokens;) {
                const Segment segment = walk.take(tokens - slot);
                step(segment, slot);
                meet();
                if (layer_.projected()) {
                    project(segment);
                    meet();
                }
                slot += segment.count;
            }
            done_ += tokens;
        }
    }

   private:
    struct Range {
        int64_t begin, end;
    };

    // Units, or outputs of the projection, of a block.
    struct Place {
        int64_t first, count;
    };

    // This thread's part.
    Range share(int64_t total) const { return {total * index_ / count_, total * (index_ + 1) / count_}; }

    void meet() { barrier_.wait(count_); }

    // The biases of the last units with room for a whole block; zeros where there are none.
    void copy_last_biases() {
        const Weight& weight = layer_.ih.weight;
        for (int64_t gate = 0; of_.bias_ih && gate < gates_; ++gate) {
            const int64_t block = weight.blocks() - gates_ + gate;
            std::copy_n(of_.bias_ih + weight.first_row(block), weight.row_count(block), last_biases_[0][gate]);
            std::copy_n(of_.bias_hh + weight.first_row(block), weight.row_count(block), last_biases_[1][gate]);
        }
    }

    void set_biases(const Place& place, Gates& gates) const {
        const bool given = of_.bias_ih && place.count == BLOCK;
        gates.bias_x = given ? of_.bias_ih + place.first : last_biases_[0][0];
        gates.bias_h = given ? of_.bias_hh + place.first : last_biases_[1][0];
        gates.bias_stride = given ? hidden_ : BLOCK;
    }

    // The next tokens of x, in the order of their segments: whole bundles by one thread.
    void take_inputs(Walk walk, int64_t tokens) {
        if (index_ == 0) layer_.ih.reserve(isa_, shared_.x, tokens);
        meet();
        const Range bundles = share(cdiv(tokens, isa_.bundle));
        const int64_t begin = bundles.begin * isa_.bundle, end = std::min(tokens, bundles.end * isa_.bundle);
        for (int64_t slot = 0; slot < end;) {
            const Segment segment = walk.take(tokens - slot);
            const int64_t last = std::min(segment.count, end - slot);
            for (int64_t i = std::max<int64_t>(0, begin - slot); i < last; ++i)
                shared_.x.put(of_.x + (segment.row + i) * layer_.inputs(), slot + i);
            slot += segment.count;
        }
        meet();
    }

    void multiply_inputs() {
        const int64_t block = units_.begin * gates_, blocks = (units_.end - units_.begin) * gates_;
        float* inputs = shared_.inputs.data() + block * input_stride_;
        layer_.ih.multiply(isa_, block, blocks, shared_.x, inputs, input_stride_);
    }

    // Rows of numbers, as the operand takes them.
    void take(const Operand& operand, TokenRoom& room, const float* rows, int64_t count) {
        operand.reserve(isa_, room, count);
        for (int64_t i = 0; i < count; ++i) room.put(rows + i * operand.weight.columns, i);
    }

    // h of the thread's units, or m where it is to be projected; slot is the place of the segment's inputs.
    void step(const Segment& segment, int64_t slot) {
        if (units_.begin == units_.end) return;
        const float* h = segment.before < 0 ? of_.h0 + segment.sequence * size_ : of_.out + segment.before * size_;
        take(layer_.hh, own_.h, h, segment.count);
        const int64_t stride = segment.count * BLOCK, units = units_.end - units_.begin;
        const int64_t most = std::max<int64_t>(1, std::min(PRODUCTS / (gates_ * stride), units / TURNS));
        const int64_t runs = cdiv(units, most);
        for (int64_t i = 0; i < runs; ++i) {
            const int64_t first = units_.begin + most * (back_ ? runs - 1 - i : i);
            step_units({first, std::min(units_.end, first + most)}, segment, slot, h);
        }
        back_ = !back_;
    }

    void step_units(Range units, const Segment& segment, int64_t slot, const float* h) {
        const int64_t stride = gates_ * segment.count * BLOCK;
        const float* products = own_.products.data();
        layer_.hh.multiply(isa_, units.begin * gates_, (units.end - units.begin) * gates_, own_.h, own_.products.data(),
                           segment.count * BLOCK);
        for (int64_t unit = units.begin; unit < units.end; ++unit, products += stride)
            update(segment, slot, unit, products, h);
    }

    // A block of units; `before` are all of h.
    void update(const Segment& segment, int64_t slot, int64_t unit, const float* products, const float* before) {
        const Place place{unit * BLOCK, layer_.ih.weight.row_count(unit * gates_)};
        const float* inputs = shared_.inputs.data() + unit * gates_ * input_stride_ + slot * BLOCK;
        Gates gates{inputs, products, input_stride_, segment.count * BLOCK};
        set_biases(place, gates);
        if (layer_.is_lstm()) update_lstm(gates, segment, place);
        else update_gru(gates, segment, place, before);
    }

    void update_lstm(const Gates& gates, const Segment& segment, const Place& place) {
        float *c = own_.c.data(), *m = own_.state.data();
        const float* before = (segment.before < 0 ? of_.c0 : of_.c) + segment.sequence * hidden_;
        copy_in(before, hidden_, segment.count, place, c);
        isa_.lstm(gates, segment.count, c, m);
        copy_out(c, segment.count, place, of_.c + segment.sequence * hidden_, hidden_);
        if (layer_.projected())
            copy_out(m, segment.count, place, shared_.m.data(), hidden_);
        else
            put_h(m, segment, place);
    }

    void update_gru(const Gates& gates, const Segment& segment, const Place& place, const float* before) {
        float* h = own_.state.data();
        copy_in(before, size_, segment.count, place, h);
        isa_.gru(gates, segment.count, h);
        put_h(h, segment, place);
    }

    void project(const Segment& segment) {
        const Range blocks = share(layer_.hr.weight.blocks());
        if (blocks.begin == blocks.end) return;
        take(layer_.hr, own_.m, shared_.m.data(), segment.count);
        const int64_t stride = segment.count * BLOCK, most = std::max<int64_t>(1, PRODUCTS / stride);
        for (int64_t first = blocks.begin; first < blocks.end; first += most) {
            const int64_t count = std::min(most, blocks.end - first);
            const float* products = own_.products.data();
            layer_.hr.multiply(isa_, first, count, own_.m, own_.products.data(), stride);
            for (int64_t block = first; block < first + count; ++block, products += stride)
                put_h(products, segment, {block * BLOCK, layer_.hr.weight.row_count(block)});
        }
    }

    // The new h is read from `out`: whoever still reads the old one must not find it there.
    void put_h(const float* lanes, const Segment& segment, const Place& place) {
        copy_out(lanes, segment.count, place, of_.out + segment.row * size_, size_);
        copy_out(lanes, segment.count, place, of_.h + segment.sequence * size_, size_);
    }

    static void copy(const float* from, int64_t count, float* to) {
        if (count == BLOCK) std::memcpy(to, from, BLOCK * sizeof(float));  // without a call
        else std::memcpy(to, from, count * sizeof(float));
    }

    static void copy_in(const float* rows, int64_t stride, int64_t tokens, const Place& place, float* lanes) {
        for (int64_t i = 0; i < tokens; ++i) copy(rows + i * stride + place.first, place.count, lanes + i * BLOCK);
    }

    static void copy_out(const float* lanes, int64_t tokens, const Place& place, float* rows, int64_t stride) {
        for (int64_t i = 0; i < tokens; ++i) copy(lanes + i * BLOCK, place.count, rows + i * stride + place.first);
    }

    const Layer& layer_;
    const gq_recurrent_arguments& of_;
    const Isa& isa_;
    const int64_t gates_, hidden_, size_, input_stride_;
    Shared& shared_;
    Own& own_;
    Barrier& barrier_;
    const int index_, count_;
    const Range units_;
    int64_t done_ = 0;
    bool back_ = false;  // whether the next step goes from the last units to the first
    float last_biases_[2][4][BLOCK] = {};
};

// --- arguments -------------------------------------------------------------------------------------------------------

void check_shape(const char* name, const Weight& weight, int64_t rows, int64_t columns, int groups) {
    if (weight.rows != rows || weight.columns != columns || weight.groups != groups)
        refuse("%s must have %lld rows, %lld columns and %d groups, got %lld, %lld and %d", name, (long long)rows,
               (long long)columns, groups, (long long)weight.rows, (long long)weight.columns, weight.groups);
}

Operand check_operand(const char* name, const gq_weight* weight, const char* activations_name, int32_t activations) {
    check_activations(activations_name, activations);
    const Operand operand{check_weight(name, weight), activations};
    check_integers(name, operand.weight, activations);
    return operand;
}

// Every row once, none read before it is written: nothing that comes out depends on what was in memory.
void check_segments(const gq_recurrent_arguments& of) {
    check_between("segment_count", of.segment_count, 0, of.steps);
    if (of.segment_count && !of.segments) refuse("segments must not be NULL");
    thread_local std::vector<bool> written;
    written.assign(of.steps, false);
    int64_t total = 0;
    for (int64_t index = 0; index < of.segment_count; ++index) {
        const int64_t *segment = of.segments + 4 * index, count = segment[2];
        check_between("a segment's count", count, 1, std::min(of.steps, of.sequences));
        check_between("a segment's row", segment[0], 0, of.steps - count);
        check_between("a segment's sequence", segment[1], 0, of.sequences - count);
        check_between("a segment's row of states", segment[3], -1, of.steps - count);
        for (int64_t i = 0; segment[3] >= 0 && i < count; ++i)
            if (!written[segment[3] + i]) refuse("segment %lld reads states before they are there", (long long)index);
        for (int64_t i = 0; i < count; ++i) {
            if (written[segment[0] + i]) refuse("segment %lld writes a row for the second time", (long long)index);
            written[segment[0] + i] = true;
        }
        total += count;
    }
    if (total != of.steps) refuse("segments must have all %lld rows, got %lld", (long long)of.steps, (long long)total);
}

Layer check_layer(const gq_recurrent_arguments* arguments) {
    if (!arguments) refuse("arguments must not be NULL");
    const gq_recurrent_arguments& of = *arguments;
    Layer layer{of, check_operand("ih", of.ih, "ih_activations", of.ih_activations),
                check_operand("hh", of.hh, "hh_activations", of.hh_activations), {}, current_isa()};
    const int groups = layer.ih.weight.groups;
    if (groups != 3 && groups != 4) refuse("ih.groups must be 4 (LSTM) or 3 (GRU), got %d", groups);
    check_between("ih.rows", layer.ih.weight.rows, 1, INT64_MAX);
    if (of.hr) layer.hr = check_operand("hr", of.hr, "hr_activations", of.hr_activations);
    if (of.hr && !layer.is_lstm()) refuse("hr must be NULL of a GRU");
    const int64_t hidden = layer.hidden(), size = of.hr ? layer.hr.weight.rows : hidden;
    check_shape("hh", layer.hh.weight, groups * hidden, size, groups);
    if (of.hr) check_shape("hr", layer.hr.weight, size, hidden, 1);
    check_between("steps", of.steps, 0, MOST);
    check_between("sequences", of.sequences, 0, MOST);
    check_between("threads", of.threads, 1, MOST);
    check_array("x", of.x, of.x_count, elements(of.steps, layer.inputs()));
    check_array("out", of.out, of.out_count, elements(of.steps, size));
    check_array("h0", of.h0, of.h0_count, elements(of.sequences, size));
    check_array("h", of.h, of.h_count, elements(of.sequences, size));
    const int64_t cells = layer.is_lstm() ? elements(of.sequences, hidden) : 0;
    check_array("c0", of.c0, of.c0_count, cells);
    check_array("c", of.c, of.c_count, cells);
    if (!of.bias_ih != !of.bias_hh) refuse("bias_ih and bias_hh must be there both or neither");
    if (of.bias_ih) check_count("bias_ih", of.bias_ih_count, layer.ih.weight.rows);
    if (of.bias_hh) check_count("bias_hh", of.bias_hh_count, layer.ih.weight.rows);
    check_segments(of);
    return layer;
}

// --- a call ----------------------------------------------------------------------------------------------------------

void reserve(const Layer& layer, int threads, Shared& shared, std::vector<Own>& own) {
    const int64_t tokens = layer.tokens(), blocks = layer.ih.weight.blocks();
    layer.ih.reserve(layer.isa, shared.x, tokens);
    shared.inputs.reserve(blocks * layer.input_stride());
    if (layer.projected()) shared.m.reserve(tokens * layer.hidden());
    if (own.size() < static_cast<size_t>(threads)) own.resize(threads);
    for (int index = 0; index < threads; ++index) {
        layer.hh.reserve(layer.isa, own[index].h, tokens);
        if (layer.projected()) layer.hr.reserve(layer.isa, own[index].m, tokens);
        own[index].products.reserve(std::max(PRODUCTS, layer.gates() * tokens * BLOCK));
        own[index].c.reserve(tokens * BLOCK);
        own[index].state.reserve(tokens * BLOCK);
    }
}

void run(const Layer& layer) {
    const gq_recurrent_arguments& of = layer.of;
    std::copy_n(of.h0, of.h0_count, of.h);  // of the sequences that have no rows
    std::copy_n(of.c0, of.c0_count, of.c);
    if (!of.steps) return;
    thread_local Shared kept_shared;
    thread_local std::vector<Own> kept_own;
    Shared& shared = kept_shared;  // of this thread, for all
    std::vector<Own>& own = kept_own;
    const int64_t tokens = of.steps / of.segment_count;  // of a step, which threads share
    const int64_t multiplications = elements(tokens * layer.size(), layer.ih.weight.rows);
    const int64_t most = std::min<int64_t>(worthwhile(of.threads, multiplications), layer.unit_blocks());
    const int threads = static_cast<int>(most);
    reserve(layer, threads, shared, own);
    Barrier barrier;
    parallel(threads, [&](int index, int count) { Worker(layer, shared, own[index], barrier, index, count).run(); });
}

}  // namespace
}  // namespace gq

int32_t gq_recurrent(const gq_recurrent_arguments* arguments) {
    return gq::guarded([&] { gq::run(gq::check_layer(arguments)); });
}
