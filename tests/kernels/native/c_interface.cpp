// The C interface on random arguments. Prints the first thing that is wrong and returns 1.
//
//   c_interface compare SEED ROUNDS   against the definitions, on every instruction set, for any number of threads
//   c_interface fuzz SEED SECONDS     on malformed arguments: an error with a text, and no access out of bounds
//   c_interface threads SEED ROUNDS   from several threads at once
//   c_interface fork                  in the child of a process that has used threads

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <functional>
#include <sstream>
#include <thread>

#include "cases.h"

namespace {

void require(bool right, const std::string& what) {
    if (!right) throw what;
}

void succeed(int32_t status, const std::string& what) {
    if (status) throw what + ": " + gq_error();
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || !memcmp(&a, &b, sizeof a); }

bool same(const Exact<float>& a, const Exact<float>& b) {
    for (int64_t i = 0; i < a.size(); ++i)
        if (!same(a[i], b[i])) return false;
    return true;
}

bool close(const Exact<float>& a, const Exact<float>& b, float tolerance) {
    for (int64_t i = 0; i < a.size(); ++i)
        if (!(fabsf(a[i] - b[i]) <= tolerance)) return false;
    return true;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    std::stringstream list(gq_isas());
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

void for_each_isa(const std::function<void(const std::string&)>& check) {
    for (const std::string& name : isas()) {
        succeed(gq_use_isa(name.c_str()), "gq_use_isa");
        require(gq_isa() == name, "gq_isa is not what was chosen");
        check(name);
    }
}

// --- against the definitions -----------------------------------------------------------------------------------------

void compare_layouts(const Packed& packed) {
    Exact<uint8_t> planes(packed.planes.size());
    const gq_weight weight = packed.c();
    succeed(gq_to_planes(&weight, planes.data(), planes.size()), "gq_to_planes");
    require(!memcmp(planes.data(), packed.planes.data(), planes.size()), "planes differ, " + describe(packed.shape));
}

void compare_quantized(Random& random) {
    const int64_t tokens = random.between(0, 5), features = random.between(1, 100);
    Exact<float> x(tokens * features), scale(tokens);
    Exact<int8_t> q(tokens * features);
    const float size = ldexpf(1.0f, static_cast<int>(random.between(-140, 120)));
    for (int64_t i = 0; i < x.size(); ++i) x[i] = random.one_in(300) ? random.any_real() : size * random.real();
    for_each_isa([&](const std::string& isa) {
        succeed(gq_quantize_tokens(x.data(), tokens, features, q.data(), scale.data()), "gq_quantize_tokens");
        for (int64_t token = 0; token < tokens; ++token) {
            const float* row = x.data() + token * features;
            const float expected = token_scale(row, features, 127.0f);
            require(same(scale[token], expected), "a token's scale differs, " + isa);
            for (int64_t i = 0; i < features; ++i)
                require(q[token * features + i] == rounded(row[i], expected), "a token's integers differ, " + isa);
        }
    });
}

struct Linear {
    Packed packed;
    int32_t activations;
    int64_t tokens;
    Exact<float> x, bias;
    bool biased;

    Linear(Random& random, const Shape& shape, int64_t fewest_tokens = 0)
        : packed(random, shape),
          activations(static_cast<int32_t>(random.below(3))),
          tokens(fewest_tokens + random.below(20)),
          x(random_reals(random, tokens * shape.columns)),
          bias(random_reals(random, shape.rows)),
          biased(random.one_in(2)) {
        if (random.one_in(4) && x.size()) x[random.below(x.size())] = random.any_real();
    }

    bool integers() const { return packed.shape.kind == GQ_INT8 && activations == GQ_ACTIVATIONS_INT8; }

    Exact<float> run(int64_t first, int64_t count, int32_t threads) const {
        const Shape& shape = packed.shape;
        const gq_weight weight = packed.c();
        Exact<float> inputs(count * shape.columns), y(count * shape.rows);
        memcpy(inputs.data(), x.data() + first * shape.columns, inputs.size() * sizeof(float));
        succeed(gq_linear(&weight, activations, inputs.data(), inputs.size(), biased ? bias.data() : nullptr,
                          biased ? bias.size() : 0, y.data(), y.size(), count, threads),
                "gq_linear");
        return y;
    }

    // What y is, and how far from it a sum of floats may be.
    void check(const Exact<float>& y, const std::string& isa) const {
        for (int64_t token = 0; token < tokens; ++token) {
            const float* row = x.data() + token * packed.shape.columns;
            const std::vector<float> inputs = seen(row, packed.shape.columns, activations);
            for (int64_t i = 0; i < packed.shape.rows; ++i) {
                const float got = y[token * packed.shape.rows + i];
                const bool right = integers() ? same(got, integer_sum(row, i)) : near(got, inputs, i);
                require(right, "y[" + std::to_string(token) + ", " + std::to_string(i) + "] = " + std::to_string(got) +
                                   " on " + isa + ", activations " + std::to_string(activations) + ", " +
                                   describe(packed.shape));
            }
        }
    }

    float integer_sum(const float* row, int64_t i) const {
        const float scale = token_scale(row, packed.shape.columns, 127.0f);
        int32_t sum = 0;
        for (int64_t k = 0; k < packed.shape.columns; ++k)
            sum += packed.integer(packed.code(i, k)) * rounded(row[k], scale);
        const float product = static_cast<float>(sum) * (scale * (packed.row_scale(i) / 127.0f));
        return biased ? product + bias[i] : product;
    }

    bool near(float got, const std::vector<float>& inputs, int64_t i) const {
        double sum = biased ? bias[i] : 0.0, size = fabs(sum);
        for (int64_t k = 0; k < packed.shape.columns; ++k) {
            const double term = static_cast<double>(packed.row_scale(i)) * packed.value(packed.code(i, k)) * inputs[k];
            sum += term;
            size += fabs(term);
        }
        if (!(size < 1e35)) return true;  // sums may overflow before the scale makes them small
        return fabs(got - sum) <= 1e-5 * size;
    }
};

void compare_linear(Random& random, const Shape& shape) {
    const Linear linear(random, shape);
    compare_layouts(linear.packed);
    for_each_isa([&](const std::string& isa) {
        const Exact<float> y = linear.run(0, linear.tokens, 1);
        linear.check(y, isa);
        require(same(y, linear.run(0, linear.tokens, 3)), "threads change y, " + isa + ", " + describe(shape));
        for (int64_t token = 0; token < linear.tokens; ++token) {
            const Exact<float> alone = linear.run(token, 1, 1);
            for (int64_t i = 0; i < shape.rows; ++i)
                require(same(alone[i], y[token * shape.rows + i]),
                        "other tokens change y, " + isa + ", " + describe(shape));
        }
    });
}

void compare_decoded(Random& random, const Shape& shape) {
    const Packed packed(random, shape);
    const gq_weight weight = packed.c();
    Exact<int64_t> indices(random.between(0, 20));
    Exact<float> out(indices.size() * shape.columns);
    for (int64_t& index : indices) index = random.below(shape.rows);
    for_each_isa([&](const std::string& isa) {
        succeed(gq_decode_rows(&weight, indices.data(), indices.size(), out.data(), out.size()), "gq_decode_rows");
        for (int64_t i = 0; i < indices.size(); ++i)
            for (int64_t k = 0; k < shape.columns; ++k) {
                const float expected = packed.row_scale(indices[i]) * packed.value(packed.code(indices[i], k));
                const float got = out[i * shape.columns + k];
                require(same(got, expected), "decoded " + std::to_string(got) + ", not " + std::to_string(expected) +
                                                 ", on " + isa + ", " + describe(shape));
            }
    });
}

// Both states and the outputs, one after the other.
Exact<float> run_recurrent(Recurrent& layer, int32_t threads) {
    layer.of.threads = threads;
    for (const Exact<float>* array : {&layer.out, &layer.h, &layer.c})
        for (float& value : *array) value = NAN;
    succeed(gq_recurrent(&layer.of), "gq_recurrent");
    Exact<float> all(layer.out.size() + layer.h.size() + layer.c.size());
    float* to = all.data();
    for (const Exact<float>* array : {&layer.out, &layer.h, &layer.c})
        for (const float value : *array) *to++ = value;
    return all;
}

// Integers give the same bits everywhere; other sums differ a little, and more where that shifts a rounding of h.
void compare_recurrent(Random& random) {
    const bool integers = random.one_in(2);
    Recurrent layer(random, integers);
    succeed(gq_use_isa("portable"), "gq_use_isa");
    const Exact<float> expected = run_recurrent(layer, 1);
    for_each_isa([&](const std::string& isa) {
        const Exact<float> got = run_recurrent(layer, 1);
        require(integers ? same(got, expected) : close(got, expected, 0.05f), "a recurrent layer differs on " + isa);
        require(same(got, run_recurrent(layer, 3)), "threads change a recurrent layer on " + isa);
    });
}

struct Depthwise {
    Packed packed;
    int64_t batch, length, stride, padding, dilation, out_length;
    Exact<float> x, bias, y;

    static Shape shape(Random& random) {
        return {static_cast<int>(random.between(1, 8)), static_cast<int>(random.below(3)), 1, random.between(1, 40),
                random.between(1, 35),                  true};
    }

    explicit Depthwise(Random& random, int64_t more = 30)
        : packed(random, shape(random)),
          batch(random.between(0, 3)),
          stride(random.between(1, 3)),
          padding(random.between(0, 20)),
          dilation(random.between(1, 3)) {
        const int64_t span = (packed.shape.columns - 1) * dilation + 1;
        length = std::max<int64_t>(0, span - 2 * padding) + random.between(0, more);
        out_length = (length + 2 * padding - span) / stride + 1;
        x = random_reals(random, batch * length * packed.shape.rows);
        bias = random_reals(random, packed.shape.rows);
        y = Exact<float>(batch * out_length * packed.shape.rows);
    }

    void run(int32_t threads) const {
        const gq_weight weight = packed.c();
        succeed(gq_depthwise_conv1d(&weight, x.data(), x.size(), bias.data(), bias.size(), y.data(), y.size(), batch,
                                    length, stride, padding, dilation, threads),
                "gq_depthwise_conv1d");
    }

    double expected(int64_t sequence, int64_t t, int64_t row) const {
        double sum = bias[row];
        for (int64_t tap = 0; tap < packed.shape.columns; ++tap) {
            const int64_t moment = t * stride + tap * dilation - padding;
            if (moment < 0 || moment >= length) continue;
            const double weight = static_cast<double>(packed.row_scale(row)) * packed.value(packed.code(row, tap));
            sum += weight * x[(sequence * length + moment) * packed.shape.rows + row];
        }
        return sum;
    }
};

void compare_depthwise(Random& random) {
    const Depthwise conv(random);
    for_each_isa([&](const std::string& isa) {
        conv.run(static_cast<int32_t>(random.between(1, 3)));
        for (int64_t i = 0; i < conv.y.size(); ++i) {
            const int64_t rows = conv.packed.shape.rows, moment = i / rows;
            const double expected = conv.expected(moment / conv.out_length, moment % conv.out_length, i % rows);
            require(fabs(conv.y[i] - expected) <= 1e-4, "a convolution differs on " + isa);
        }
    });
}

struct Norm {
    static constexpr float EPSILON = 1e-5f;
    int64_t features, rows;
    Exact<float> x, weight, bias;

    explicit Norm(Random& random, int64_t most = 70) : features(random.between(1, most)), rows(random.between(1, 5)) {
        x = random_reals(random, rows * features);
        weight = random_reals(random, features);
        bias = random_reals(random, features);
    }

    Exact<float> run() const {
        Exact<float> y(x.size());
        succeed(gq_layer_norm(x.data(), x.size(), weight.data(), features, bias.data(), features, EPSILON, y.data(),
                              y.size()),
                "gq_layer_norm");
        return y;
    }

    double expected(int64_t row, int64_t k) const {
        const float* numbers = x.data() + row * features;
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < features; ++i) mean += numbers[i] / static_cast<double>(features);
        for (int64_t i = 0; i < features; ++i) variance += (numbers[i] - mean) * (numbers[i] - mean) / features;
        return (numbers[k] - mean) / sqrt(variance + EPSILON) * weight[k] + bias[k];
    }
};

// The same bits everywhere.
void compare_layer_norm(Random& random) {
    const Norm norm(random);
    succeed(gq_use_isa("portable"), "gq_use_isa");
    const Exact<float> expected = norm.run();
    for (int64_t i = 0; i < expected.size(); ++i)
        require(fabs(expected[i] - norm.expected(i / norm.features, i % norm.features)) <= 1e-3, "a norm is wrong");
    for_each_isa([&](const std::string& isa) { require(same(norm.run(), expected), "a norm differs on " + isa); });
}

struct Fake {
    int64_t rows, columns;
    FlatTable table;
    Exact<float> weight, scale, grad;
    float straight_through;

    explicit Fake(Random& random, int64_t most = 60)
        : rows(random.between(1, 5)),
          columns(random.between(1, most)),
          table(random, static_cast<int>(random.between(1, 8))),
          weight(random_reals(random, rows * columns)),
          scale(random.one_in(3) ? 1 : rows),
          grad(random_reals(random, rows * columns)),
          straight_through(random.one_in(2) ? 0.25f : 0.0f) {
        for (float& value : scale) value = random.one_in(5) ? 0.0f : 0.2f + fabsf(random.real());
    }

    float scale_of(int64_t i) const { return scale[i / (weight.size() / scale.size())]; }
    FakeQuantized of(int64_t i) const { return {table, weight[i], scale_of(i)}; }

    Exact<float> forward(bool soft, int32_t threads) const {
        Exact<float> out(weight.size());
        succeed(gq_fake_quantize(weight.data(), weight.size(), scale.data(), scale.size(), table.of.data(),
                                 table.of.size(), soft, out.data(), out.size(), threads),
                "gq_fake_quantize");
        return out;
    }

    Exact<uint8_t> encode(int32_t threads) const {
        Exact<uint8_t> codes(weight.size());
        succeed(gq_encode(weight.data(), weight.size(), scale.data(), scale.size(), table.of.data(), table.levels - 1,
                          codes.data(), codes.size(), threads),
                "gq_encode");
        return codes;
    }

    // The gradients of weight, scale and table in a row.
    Exact<float> backward(int32_t threads, bool with_table = true) const {
        const int64_t n = weight.size();
        Exact<float> dweight(n), dscale(scale.size()), dtable(table.of.size()), all(n + dscale.size() + dtable.size());
        succeed(gq_fake_quantize_backward(grad.data(), n, weight.data(), n, scale.data(), scale.size(), table.of.data(),
                                          table.of.size(), straight_through, dweight.data(), n, dscale.data(),
                                          dscale.size(), with_table ? dtable.data() : nullptr,
                                          with_table ? dtable.size() : 0, threads),
                "gq_fake_quantize_backward");
        float* to = all.data();
        for (const Exact<float>* array : {&dweight, &dscale, &dtable})
            for (const float value : *array) *to++ = value;
        return all;
    }

    // (gradient, the sum of its terms' sizes), as `backward` has them.
    std::vector<std::pair<double, double>> expected() const {
        const int64_t n = weight.size(), levels = table.levels, parts = n + scale.size() + 3 * levels - 1;
        std::vector<std::pair<double, double>> all(n + scale.size() + table.of.size());
        const auto add = [&](int64_t to, double term) { all[to].first += term, all[to].second += fabs(term); };
        for (int64_t i = 0; i < n; ++i) {
            const FakeQuantized at = of(i);
            const double g = grad[i], s = scale_of(i), through = g * s * at.d;
            const double m = (1.0 - straight_through) * at.slope + straight_through;
            add(i, g * m);
            add(n + i / (n / scale.size()), g * at.q);
            if (!at.side && s > 0) add(n + i / (n / scale.size()), -g * m * weight[i] / s);
            add(parts + at.cell, g * s);
            add(parts + levels - 1 + at.cell, g * s * at.sigma);
            add(parts + 2 * (levels - 1) + at.cell, through);
            add(parts + 3 * (levels - 1), through * at.y);
            add(parts + 3 * (levels - 1) + 1, table.curve(0) * through * at.slope_mu);
            if (at.side) add(parts + 3 * (levels - 1) + (at.side < 0 ? 2 : 3), table.curve(0) * through);
        }
        return all;
    }
};

// Codes and hard values to the bit.
void compare_fake(Random& random) {
    const Fake fake(random);
    const auto expected = fake.expected();
    for_each_isa([&](const std::string& isa) {
        const Exact<float> hard = fake.forward(false, 1), soft = fake.forward(true, 1), grads = fake.backward(1);
        const Exact<uint8_t> codes = fake.encode(1);
        for (int64_t i = 0; i < hard.size(); ++i) {
            const FakeQuantized at = fake.of(i);
            require(codes[i] == at.code, "a code is wrong on " + isa);
            const float value = fake.scale_of(i) * fake.table.value(at.code) + 0.0f;
            require(same(hard[i], value), "a hard value is wrong on " + isa);
            require(fabs(soft[i] - fake.scale_of(i) * at.q) <= 1e-5, "a soft value is wrong on " + isa);
        }
        for (size_t i = 0; i < expected.size(); ++i) {
            const double error = fabs(grads[i] - expected[i].first), most = 1e-3 * expected[i].second + 1e-6;
            require(error <= most, "gradient " + std::to_string(i) + " is off by " + std::to_string(error) + " on " +
                                       isa + ", " + std::to_string(fake.table.levels) + " levels");
        }
        const Exact<float> alone = fake.backward(1, false);
        for (int64_t i = 0; i < hard.size() + fake.scale.size(); ++i)
            require(same(alone[i], grads[i]), "the table's gradient changes others on " + isa);
    });
    for (float& value : fake.weight) value = random.any_real();
    for_each_isa([&](const std::string& isa) {
        const Exact<float> hard = fake.forward(false, 1), soft = fake.forward(true, 1), grads = fake.backward(1);
        for (int64_t i = 0; i < hard.size(); ++i) {
            const bool finite = std::isfinite(fake.weight[i]);
            require(std::isfinite(hard[i]) == finite && std::isfinite(soft[i]) == finite &&
                        std::isfinite(grads[i]) == finite,
                    "what is not finite gives something else on " + isa);
        }
    });
}

// Weights that several threads share.
void share_fake(Random& random) {
    const Fake fake(random, 30000);
    require(same(fake.forward(false, 1), fake.forward(false, 3)), "threads change hard values");
    require(same(fake.forward(true, 1), fake.forward(true, 3)), "threads change soft values");
    require(same(fake.backward(1), fake.backward(3)), "threads change gradients");
    const Exact<uint8_t> codes = fake.encode(1), shared = fake.encode(3);
    require(!memcmp(codes.data(), shared.data(), codes.size()), "threads change codes");
}

// Every width and codebook on a ragged shape first, then whatever comes.
void compare(uint64_t seed, int64_t rounds) {
    Random random(seed);
    for (int bits = 1; bits <= 8; ++bits)
        for (int kind = 0; kind < 3; ++kind) compare_linear(random, {bits, kind, 1, 19, 37, true});
    for (int64_t round = 0; round < rounds; ++round) {
        compare_quantized(random);
        compare_linear(random, random_shape(random));
        compare_decoded(random, random_shape(random));
        compare_recurrent(random);
        compare_depthwise(random);
        compare_layer_norm(random);
        compare_fake(random);
    }
    const std::vector<std::string> names = isas();
    printf("agree:");
    for (const std::string& name : names) printf(" %s", name.c_str());
    printf("\n");
}

// --- malformed arguments ---------------------------------------------------------------------------------------------

// POINTER: not NULL; OPTIONAL: NULL for none; COUNT: int64_t, from 0 to what memory holds; LENGTH: the same, and all
// that says how long an array is, so that too many cannot be told; CHOICE: int32_t.
enum Kind { POINTER, OPTIONAL, COUNT, LENGTH, CHOICE };

// An argument and where it lies.
struct Field {
    const char* name;
    Kind kind;
    void* at;

    size_t bytes() const { return kind == CHOICE ? 4 : 8; }
};

template <class T>
Field field(const char* name, Kind kind, T* at) {
    return {name, kind, const_cast<void*>(static_cast<const void*>(at))};
}

void add_weight(std::vector<Field>& fields, gq_weight& weight) {
    fields.push_back(field("panels", POINTER, &weight.panels));
    fields.push_back(field("panel_bytes", COUNT, &weight.panel_bytes));
    fields.push_back(field("codebook", POINTER, &weight.codebook));
    fields.push_back(field("codebook_bytes", COUNT, &weight.codebook_bytes));
    fields.push_back(field("scale", POINTER, &weight.scale));
    fields.push_back(field("scales", weight.scales == 1 ? LENGTH : COUNT, &weight.scales));
    fields.push_back(field("rows", COUNT, &weight.rows));
    fields.push_back(field("columns", COUNT, &weight.columns));
    fields.push_back(field("bits", CHOICE, &weight.bits));
    fields.push_back(field("groups", CHOICE, &weight.groups));
    fields.push_back(field("codebook_kind", CHOICE, &weight.codebook_kind));
}

// Makes the argument something else. True where it cannot be right now, whatever the others are.
bool spoil(Random& random, const Field& field) {
    if (field.kind == POINTER || field.kind == OPTIONAL) {
        memset(field.at, 0, sizeof(void*));
        return field.kind == POINTER;
    }
    if (field.kind == CHOICE) {
        static const int32_t values[] = {-1, 0, 1, 2, 3, 4, 5, 9, 1000, INT32_MAX, INT32_MIN};
        const int32_t value = values[random.below(11)];
        memcpy(field.at, &value, sizeof value);
        return value < 0;
    }
    int64_t value;
    memcpy(&value, field.at, sizeof value);
    const int64_t values[] = {-1,        INT64_MIN, INT64_MAX, int64_t{1} << 62, int64_t{1} << 45, INT64_MIN / 2,
                              value + 1, value - 1, 0,         2 * value,        -value - 1,       value / 2};
    value = field.kind == LENGTH ? values[random.below(6)] : values[random.below(12)];
    memcpy(field.at, &value, sizeof value);
    return value < 0 || value > int64_t{1} << 44;
}

// No more of the fields than can make each other right again by chance, were they to name more than there is.
void attack(Random& random, const std::string& function, const std::vector<Field>& fields,
            const std::function<int32_t()>& call) {
    succeed(call(), function);
    for (int attempt = 0; attempt < 20; ++attempt) {
        const Field& field = fields[random.below(static_cast<int64_t>(fields.size()))];
        char before[8];
        memcpy(before, field.at, field.bytes());
        const bool wrong = spoil(random, field);
        const int32_t status = call();
        const std::string where = function + ", " + field.name;
        require(status == 0 || status == -1, where + ": returned " + std::to_string(status));
        require(status == -1 || !wrong, where + ": was taken though it cannot be right");
        require(status == 0 || strlen(gq_error()) > 8, where + ": an error without a text");
        memcpy(field.at, before, field.bytes());
    }
    succeed(call(), function + ", again");
}

void fuzz_layouts(Random& random) {
    const Packed packed(random, random_shape(random));
    gq_weight weight = packed.c();
    const uint8_t* planes = packed.planes.data();
    Exact<uint8_t> copy(packed.planes.size());
    uint8_t* to = copy.data();
    int64_t plane_bytes = packed.planes.size();
    std::vector<Field> fields = {field("plane_bytes", COUNT, &plane_bytes)};
    add_weight(fields, weight);
    fields.erase(fields.begin() + 5, fields.begin() + 7);  // scales are none of a layout's business
    fields.push_back(field("planes", POINTER, &planes));
    attack(random, "gq_to_panels", fields, [&] { return gq_to_panels(planes, plane_bytes, &weight); });
    fields.back().at = &to;
    attack(random, "gq_to_planes", fields, [&] { return gq_to_planes(&weight, to, plane_bytes); });
    require(gq_to_panels(planes, plane_bytes, nullptr) == -1, "gq_to_panels takes NULL");
    require(gq_to_planes(nullptr, to, plane_bytes) == -1, "gq_to_planes takes NULL");
}

void fuzz_panel_bytes(Random& random) {
    const int64_t values[] = {-1, 0, 1, 17, INT64_MAX, INT64_MIN, int64_t{1} << 60, 4};
    const int32_t bits = static_cast<int32_t>(values[random.below(8)]);
    const int64_t rows = values[random.below(8)], columns = values[random.below(8)];
    const int32_t groups = static_cast<int32_t>(values[random.below(8)]);
    const int64_t bytes = gq_panel_bytes(bits, rows, columns, groups);
    require(bytes >= -1, "gq_panel_bytes gives less than -1");
    require(bytes == -1 || (bits >= 1 && bits <= 8 && rows >= 0 && columns >= 0 && groups >= 1),
            "gq_panel_bytes takes what cannot be");
    require(bytes >= 0 || strlen(gq_error()) > 8, "gq_panel_bytes gives an error without a text");
}

// Nothing says how long the arrays of this function are: only what is wrong in itself can be refused.
void fuzz_quantize(Random& random) {
    Exact<float> x = random_reals(random, 3 * 40), scale(3);
    Exact<int8_t> q(3 * 40);
    const int64_t bad[] = {-1, INT64_MIN, INT64_MAX};
    const int64_t wrong = bad[random.below(3)];
    require(gq_quantize_tokens(nullptr, 3, 40, q.data(), scale.data()) == -1, "gq_quantize_tokens takes NULL");
    require(gq_quantize_tokens(x.data(), 3, 40, nullptr, scale.data()) == -1, "gq_quantize_tokens takes NULL");
    require(gq_quantize_tokens(x.data(), 3, 40, q.data(), nullptr) == -1, "gq_quantize_tokens takes NULL");
    require(gq_quantize_tokens(x.data(), wrong, 40, q.data(), scale.data()) == -1, "gq_quantize_tokens: tokens");
    require(gq_quantize_tokens(x.data(), 3, wrong, q.data(), scale.data()) == -1, "gq_quantize_tokens: features");
}

void fuzz_linear(Random& random) {
    const Shape shape = random_shape(random);
    const Packed packed(random, shape);
    gq_weight weight = packed.c();
    const gq_weight* pointer = &weight;
    int64_t tokens = random.between(1, 5);
    Exact<float> inputs = random_reals(random, tokens * shape.columns), biases = random_reals(random, shape.rows);
    Exact<float> outputs(tokens * shape.rows);
    for (float& value : inputs) value = random.any_real();
    for (uint8_t& byte : packed.codebook) byte = static_cast<uint8_t>(random.bits());
    const float *x = inputs.data(), *bias = biases.data();
    float* y = outputs.data();
    int64_t x_count = inputs.size(), bias_count = biases.size(), y_count = outputs.size();
    int32_t activations = static_cast<int32_t>(random.below(3)), threads = 2;
    std::vector<Field> fields = {
        field("weight", POINTER, &pointer),      field("activations", CHOICE, &activations),
        field("x", POINTER, &x),                 field("x_count", COUNT, &x_count),
        field("bias", OPTIONAL, &bias),          field("bias_count", COUNT, &bias_count),
        field("y", POINTER, &y),                 field("y_count", COUNT, &y_count),
        field("tokens", COUNT, &tokens),         field("threads", CHOICE, &threads),
    };
    add_weight(fields, weight);
    attack(random, "gq_linear", fields, [&] {
        return gq_linear(pointer, activations, x, x_count, bias, bias_count, y, y_count, tokens, threads);
    });
}

void fuzz_decode(Random& random) {
    const Shape shape = random_shape(random);
    const Packed packed(random, shape);
    gq_weight weight = packed.c();
    const gq_weight* pointer = &weight;
    Exact<int64_t> numbers(random.between(1, 9));
    for (int64_t& number : numbers) number = random.below(shape.rows);
    Exact<float> rows(numbers.size() * shape.columns);
    const int64_t* indices = numbers.data();
    float* out = rows.data();
    int64_t count = numbers.size(), out_count = rows.size();
    std::vector<Field> fields = {field("weight", POINTER, &pointer), field("indices", POINTER, &indices),
                                 field("count", COUNT, &count), field("out", POINTER, &out),
                                 field("out_count", COUNT, &out_count)};
    add_weight(fields, weight);
    const auto call = [&] { return gq_decode_rows(pointer, indices, count, out, out_count); };
    attack(random, "gq_decode_rows", fields, call);
    const int64_t bad[] = {-1, shape.rows, INT64_MAX, INT64_MIN, int64_t{1} << 33};
    numbers[random.below(numbers.size())] = bad[random.below(5)];
    require(call() == -1, "gq_decode_rows takes an index out of range");
}

void fuzz_recurrent(Random& random) {
    Recurrent layer(random, random.one_in(2));
    gq_recurrent_arguments& of = layer.of;
    for (float& value : layer.x) value = random.any_real();
    of.threads = 2;
    const Kind lstm = of.c0 ? POINTER : OPTIONAL;
    std::vector<Field> fields = {
        field("ih", POINTER, &of.ih),
        field("hh", POINTER, &of.hh),
        field("hr", OPTIONAL, &of.hr),
        field("ih_activations", CHOICE, &of.ih_activations),
        field("hh_activations", CHOICE, &of.hh_activations),
        field("x", POINTER, &of.x),
        field("x_count", COUNT, &of.x_count),
        field("steps", COUNT, &of.steps),
        field("h0", POINTER, &of.h0),
        field("h0_count", COUNT, &of.h0_count),
        field("c0", lstm, &of.c0),
        field("sequences", COUNT, &of.sequences),
        field("bias_ih", of.bias_ih ? POINTER : OPTIONAL, &of.bias_ih),
        field("bias_hh", of.bias_hh ? POINTER : OPTIONAL, &of.bias_hh),
        field("segments", POINTER, &of.segments),
        field("segment_count", LENGTH, &of.segment_count),
        field("out", POINTER, &of.out),
        field("out_count", COUNT, &of.out_count),
        field("h", POINTER, &of.h),
        field("h_count", COUNT, &of.h_count),
        field("c", lstm, &of.c),
        field("threads", CHOICE, &of.threads),
    };
    if (of.c0) fields.push_back(field("c0_count", COUNT, &of.c0_count));
    if (of.c) fields.push_back(field("c_count", COUNT, &of.c_count));
    if (of.hr) fields.push_back(field("hr_activations", CHOICE, &of.hr_activations));
    if (of.bias_ih) fields.push_back(field("bias_ih_count", COUNT, &of.bias_ih_count));
    if (of.bias_hh) fields.push_back(field("bias_hh_count", COUNT, &of.bias_hh_count));
    add_weight(fields, layer.weights[0]);
    add_weight(fields, layer.weights[1]);
    if (of.hr) add_weight(fields, layer.weights[2]);
    attack(random, "gq_recurrent", fields, [&] { return gq_recurrent(&of); });
    for (int attempt = 0; attempt < 10; ++attempt) {  // what segments name must be there, and be there before
        int64_t& number = layer.segments[random.below(layer.segments.size())];
        const int64_t before = number, values[] = {-2, -1, 0, 1, before + 1, 1000, INT64_MAX, INT64_MIN};
        number = values[random.below(8)];
        const int32_t status = gq_recurrent(&of);
        require(status == 0 || (status == -1 && strlen(gq_error()) > 8), "gq_recurrent, segments");
        require(status == -1 || (number >= -1 && number < 1000), "gq_recurrent takes a segment that cannot be");
        number = before;
    }
    require(gq_recurrent(nullptr) == -1, "gq_recurrent takes NULL");
}

void fuzz_layer_norm(Random& random) {
    const Norm norm(random);
    for (float& value : norm.x) value = random.any_real();
    Exact<float> results(norm.x.size());
    const float *x = norm.x.data(), *weight = norm.weight.data(), *bias = norm.bias.data();
    float* y = results.data();
    int64_t x_count = norm.x.size(), weight_count = norm.features, bias_count = norm.features;
    int64_t y_count = results.size();
    std::vector<Field> fields = {
        field("x", POINTER, &x),           field("x_count", COUNT, &x_count),
        field("weight", POINTER, &weight), field("weight_count", COUNT, &weight_count),
        field("bias", POINTER, &bias),     field("bias_count", COUNT, &bias_count),
        field("y", POINTER, &y),           field("y_count", COUNT, &y_count),
    };
    attack(random, "gq_layer_norm", fields, [&] {
        return gq_layer_norm(x, x_count, weight, weight_count, bias, bias_count, Norm::EPSILON, y, y_count);
    });
}

void fuzz_depthwise(Random& random) {
    const Depthwise conv(random);
    if (!conv.x.size()) return;
    gq_weight weight = conv.packed.c();
    const gq_weight* pointer = &weight;
    const float *x = conv.x.data(), *bias = conv.bias.data();
    float* y = conv.y.data();
    int64_t x_count = conv.x.size(), bias_count = conv.bias.size(), y_count = conv.y.size(), batch = conv.batch;
    int64_t length = conv.length, stride = conv.stride, padding = conv.padding, dilation = conv.dilation;
    int32_t threads = 2;
    std::vector<Field> fields = {
        field("weight", POINTER, &pointer),   field("x", POINTER, &x),
        field("x_count", COUNT, &x_count),    field("bias", OPTIONAL, &bias),
        field("bias_count", COUNT, &bias_count), field("y", POINTER, &y),
        field("y_count", COUNT, &y_count),    field("batch", COUNT, &batch),
        field("length", COUNT, &length),      field("stride", COUNT, &stride),
        field("padding", COUNT, &padding),    field("dilation", COUNT, &dilation),
        field("threads", CHOICE, &threads),
    };
    add_weight(fields, weight);
    attack(random, "gq_depthwise_conv1d", fields, [&] {
        return gq_depthwise_conv1d(pointer, x, x_count, bias, bias_count, y, y_count, batch, length, stride, padding,
                                   dilation, threads);
    });
}

// What a table holds may be anything.
void fuzz_fake(Random& random) {
    const Fake fake(random);
    for (const Exact<float>* array : {&fake.weight, &fake.scale, &fake.table.of, &fake.grad})
        for (float& value : *array) value = random.any_real();
    Exact<float> results(fake.weight.size()), scales(fake.scale.size()), tables(fake.table.of.size());
    Exact<uint8_t> numbers(fake.weight.size());
    const float *weight = fake.weight.data(), *scale = fake.scale.data(), *table = fake.table.of.data();
    const float *grad = fake.grad.data(), *borders = table;
    float *out = results.data(), *dscale = scales.data(), *dtable = tables.data();
    uint8_t* codes = numbers.data();
    int64_t weight_count = fake.weight.size(), out_count = weight_count, grad_count = weight_count;
    int64_t code_count = weight_count, scale_count = fake.scale.size(), dscale_count = scale_count;
    int64_t table_count = fake.table.of.size(), dtable_count = table_count, border_count = fake.table.levels - 1;
    int32_t soft = random.one_in(2), threads = 2;
    const Field weights = field("weight", POINTER, &weight), sizes = field("weight_count", COUNT, &weight_count);
    const Field of_scale = field("scale", POINTER, &scale), thread = field("threads", CHOICE, &threads);
    attack(random, "gq_fake_quantize",
           {weights, sizes, of_scale, field("scales", LENGTH, &scale_count), field("table", POINTER, &table),
            field("table_count", LENGTH, &table_count), field("soft", CHOICE, &soft), field("out", POINTER, &out),
            field("out_count", COUNT, &out_count), thread},
           [&] {
               return gq_fake_quantize(weight, weight_count, scale, scale_count, table, table_count, soft, out,
                                       out_count, threads);
           });
    attack(random, "gq_encode",
           {weights, sizes, of_scale, field("scales", LENGTH, &scale_count), field("borders", POINTER, &borders),
            field("border_count", LENGTH, &border_count), field("codes", POINTER, &codes),
            field("code_count", COUNT, &code_count), thread},
           [&] {
               return gq_encode(weight, weight_count, scale, scale_count, borders, border_count, codes, code_count,
                                threads);
           });
    attack(random, "gq_fake_quantize_backward",
           {weights, sizes, of_scale, field("scales", COUNT, &scale_count), field("table", POINTER, &table),
            field("table_count", COUNT, &table_count), field("grad", POINTER, &grad),
            field("grad_count", COUNT, &grad_count), field("dweight", POINTER, &out),
            field("dweight_count", COUNT, &out_count), field("dscale", POINTER, &dscale),
            field("dscale_count", COUNT, &dscale_count), field("dtable", OPTIONAL, &dtable),
            field("dtable_count", COUNT, &dtable_count), thread},
           [&] {
               return gq_fake_quantize_backward(grad, grad_count, weight, weight_count, scale, scale_count, table,
                                                table_count, 0.1f, out, out_count, dscale, dscale_count, dtable,
                                                dtable_count, threads);
           });
}

void fuzz_the_rest(Random& random) {
    const std::string before = gq_isa();
    for (const char* name : {"", "avx", "portable,", "torch", "avx5120000000000000000000000000000000000000000000"})
        require(gq_use_isa(name) == -1 && strlen(gq_error()) > 8, std::string("gq_use_isa takes ") + name);
    require(gq_use_isa(nullptr) == -1, "gq_use_isa takes NULL");
    require(gq_isa() == before, "a refused instruction set is used");
    Exact<uint8_t> array(random.between(0, 5000));
    gq_advise_huge(array.data(), array.size());
    gq_advise_huge(nullptr, 1 << 22);
    gq_advise_huge(array.data(), random.one_in(2) ? -1 : INT64_MIN);
}

void fuzz(uint64_t seed, int64_t seconds) {
    using clock = std::chrono::steady_clock;
    const clock::time_point end = clock::now() + std::chrono::seconds(seconds);
    const std::vector<std::string> names = isas();
    Random random(seed);
    int64_t rounds = 0;
    for (; clock::now() < end || rounds < 20; ++rounds) {
        succeed(gq_use_isa(names[random.below(static_cast<int64_t>(names.size()))].c_str()), "gq_use_isa");
        fuzz_panel_bytes(random);
        fuzz_layouts(random);
        fuzz_quantize(random);
        fuzz_linear(random);
        fuzz_decode(random);
        fuzz_recurrent(random);
        fuzz_depthwise(random);
        fuzz_layer_norm(random);
        fuzz_fake(random);
        fuzz_the_rest(random);
    }
    printf("%lld rounds\n", (long long)rounds);
}

// --- threads ---------------------------------------------------------------------------------------------------------

// Layers that are large enough for more than one thread.
void call_everything(uint64_t seed, int64_t rounds) {
    Random random(seed);
    for (int64_t round = 0; round < rounds; ++round) {
        const int bits = static_cast<int>(random.between(1, 8)), kind = static_cast<int>(random.below(3));
        const Linear linear(random, {bits, kind, 1, 100, 140, true}, 20);
        require(same(linear.run(0, linear.tokens, 1), linear.run(0, linear.tokens, 3)), "threads change y");
        const bool lstm = random.one_in(2), projected = lstm && random.one_in(2);
        Recurrent layer(random, random.one_in(2), {lstm, projected, 30, 160, projected ? 150 : 160, 6, 2});
        require(same(run_recurrent(layer, 1), run_recurrent(layer, 3)), "threads change a recurrent layer");
        Depthwise(random, 1000).run(3);
        const Norm norm(random, 2000);
        require(same(norm.run(), norm.run()), "a norm is not repeatable");
        share_fake(random);
        require(gq_use_isa(nullptr) == -1 && strlen(gq_error()) > 8, "each thread has its own error");
    }
}

void from_several_threads(uint64_t seed, int64_t rounds) {
    std::vector<std::string> errors(3);
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < 3; ++i)
        threads.emplace_back([&, i] {
            try {
                call_everything(seed + i, rounds);
            } catch (const std::string& what) {
                errors[i] = what;
            }
        });
    for (std::thread& thread : threads) thread.join();
    for (const std::string& error : errors) require(error.empty(), error);
    printf("agree\n");
}

void in_a_child() {
    call_everything(1, 3);
    for (int generation = 0; generation < 3; ++generation) {
        const pid_t child = fork();
        require(child >= 0, "fork failed");
        if (!child) {
            alarm(60);  // threads that are no more are waited for without end
            try {
                call_everything(2, 3);
            } catch (const std::string&) {
                _exit(1);
            }
            _exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        require(status == 0, "a child hangs or differs: " + std::to_string(status));
        call_everything(3, 1);
    }
    printf("agree\n");
}

void run(const std::vector<std::string>& arguments) {
    const auto number = [&](size_t i) { return i < arguments.size() ? std::stoll(arguments[i]) : 1; };
    const std::string mode = arguments.empty() ? "" : arguments[0];
    if (mode == "compare") return compare(number(1), number(2));
    if (mode == "fuzz") return fuzz(number(1), number(2));
    if (mode == "threads") return from_several_threads(number(1), number(2));
    if (mode == "fork") return in_a_child();
    throw std::string("usage: c_interface compare|fuzz|threads|fork SEED COUNT");
}

}  // namespace

int main(int count, char** arguments) {
    try {
        run({arguments + 1, arguments + count});
    } catch (const std::string& what) {
        printf("%s\n", what.c_str());
        return 1;
    }
    return 0;
}
