#include "checks.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace gq {
namespace {

thread_local char error_text[512] = "";

int64_t entry_bytes(int32_t kind) { return kind == GQ_FLOAT32 ? 4 : 1; }

}  // namespace

void set_error(const char* text) noexcept { std::snprintf(error_text, sizeof error_text, "%s", text); }

void refuse(const char* format, ...) {
    char text[sizeof error_text];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw std::invalid_argument(text);
}

int64_t elements(int64_t a, int64_t b) {
    int64_t result;
    if (__builtin_mul_overflow(a, b, &result))
        refuse("sizes are too large: %lld times %lld", (long long)a, (long long)b);
    return result;
}

void check_between(Name name, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    refuse("%s must be from %lld to %lld, got %lld", name.text().c_str(), (long long)low, (long long)high,
           (long long)value);
}

void check_count(Name name, int64_t count, int64_t wanted) {
    if (count == wanted) return;
    refuse("%s must have %lld elements, got %lld", name.text().c_str(), (long long)wanted, (long long)count);
}

void check_array(Name name, const void* array, int64_t count, int64_t wanted) {
    check_count(name, count, wanted);
    if (!array && count) refuse("%s must not be NULL", name.text().c_str());
}

void check_activations(Name name, int32_t activations) {
    check_between(name, activations, GQ_NONE, GQ_ACTIVATIONS_E4M3);
}

int64_t check_shape(const char* name, int32_t bits, int64_t rows, int64_t columns, int32_t groups) {
    constexpr int64_t most = int64_t{1} << 40;  // rows and columns can be padded without a care
    check_between({name, "bits"}, bits, 1, 8);
    check_between({name, "rows"}, rows, 0, most);
    check_between({name, "columns"}, columns, 0, most);
    check_between({name, "groups"}, groups, 1, INT32_MAX);
    if (rows % groups)
        refuse("%s must divide the %lld rows, got %d", Name(name, "groups").text().c_str(), (long long)rows, groups);
    const Weight weight{nullptr, nullptr, nullptr, 0, rows, columns, bits, groups, GQ_FLOAT32};
    return elements(weight.blocks(), weight.block_bytes());
}

Weight check_codes(const char* name, const gq_weight* weight) {
    if (!weight) refuse("%s must not be NULL", name);
    const int64_t bytes = check_shape(name, weight->bits, weight->rows, weight->columns, weight->groups);
    check_between({name, "codebook_kind"}, weight->codebook_kind, GQ_FLOAT32, GQ_E4M3);
    check_array({name, "panels"}, weight->panels, weight->panel_bytes, bytes);
    check_array({name, "codebook"}, weight->codebook, weight->codebook_bytes,
                (int64_t{1} << weight->bits) * entry_bytes(weight->codebook_kind));
    return {weight->panels,  weight->codebook, weight->scale,  weight->scales != 1, weight->rows,
            weight->columns, weight->bits,     weight->groups, weight->codebook_kind};
}

Weight check_weight(const char* name, const gq_weight* weight) {
    const Weight checked = check_codes(name, weight);
    check_array({name, "scale"}, weight->scale, weight->scales, weight->scales == 1 ? 1 : weight->rows);
    return checked;
}

void check_integers(const char* name, const Weight& weight, int32_t activations) {
    if (weight.codebook_kind == GQ_INT8 && activations == GQ_ACTIVATIONS_INT8)
        check_between({name, "columns"}, weight.columns, 0, 1 << 17);  // of products below 2^14
}

}  // namespace gq

const char* gq_error(void) { return gq::error_text; }
