// What the C functions check of their arguments. A failure is an exception inside the library, -1 with a text outside.

#pragma once

#include <stdint.h>

#include <exception>
#include <string>

#include "gq_native.h"
#include "isa.h"

namespace gq {

void set_error(const char* text) noexcept;  // what gq_error() gives to this thread

[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs the body of a C function.
template <class Body>
int32_t guarded(const Body& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {  // also of the memory that there is not
        set_error(error.what());
        return -1;
    }
}

int64_t elements(int64_t a, int64_t b);  // a times b; refused where 64 bits do not hold it

// What an argument is called: itself, or a field of what is called `of`.
struct Name {
    const char *of, *field;

    Name(const char* argument) : of(""), field(argument) {}
    Name(const char* of, const char* field) : of(of), field(field) {}
    std::string text() const { return *of ? of + std::string(".") + field : field; }
};

void check_count(Name name, int64_t count, int64_t wanted);
void check_array(Name name, const void* array, int64_t count, int64_t wanted);  // NULL only where it is empty
void check_between(Name name, int64_t value, int64_t low, int64_t high);
void check_activations(Name name, int32_t activations);

// A weight's bytes as panels; `name` may be "".
int64_t check_shape(const char* name, int32_t bits, int64_t rows, int64_t columns, int32_t groups);

Weight check_codes(const char* name, const gq_weight* weight);  // all but the scale
Weight check_weight(const char* name, const gq_weight* weight);
void check_integers(const char* name, const Weight& weight, int32_t activations);  // that no sum of them overflows

}  // namespace gq
