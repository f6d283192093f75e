// Which instruction sets there are, which this processor has, and which is used.

#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gq {

extern const Isa isa_avx512, isa_avxvnni, isa_avx2, isa_neon, isa_portable;  // of the isa_*.cpp that were built

namespace {

#if defined(__x86_64__)
// Registers a, b, c and d that CPUID gives for a leaf, zeros for one that it does not have.
struct Cpuid {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool all(uint64_t bits, std::initializer_list<int> wanted) {
    for (const int bit : wanted)
        if (!(bits >> bit & 1)) return false;
    return true;
}

// Which registers the system saves: bits 1 and 2 for AVX, 5 to 7 for AVX-512.
uint64_t saved_registers() {
    if (!all(Cpuid(1, 0).c, {27})) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

[[maybe_unused]] bool has_avx2() {  // and FMA
    return all(saved_registers(), {1, 2}) && all(Cpuid(1, 0).c, {12, 28}) && all(Cpuid(7, 0).b, {5});
}
[[maybe_unused]] bool has_avxvnni() { return has_avx2() && all(Cpuid(7, 1).a, {4}); }
[[maybe_unused]] bool has_avx512() {  // F, BW and VL; VBMI and VNNI
    const Cpuid features(7, 0);
    return has_avx2() && all(saved_registers(), {5, 6, 7}) && all(features.b, {16, 30, 31}) && all(features.c, {1, 11});
}
#elif defined(__aarch64__) && defined(__linux__)
[[maybe_unused]] bool has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#else
[[maybe_unused]] bool has_neon() { return true; }  // every 64-bit ARM processor of Apple has the dot products
#endif

std::vector<const Isa*> find() {
    std::vector<const Isa*> found;
#if defined(GQ_HAS_AVX512)
    if (has_avx512()) found.push_back(&isa_avx512);
#endif
#if defined(GQ_HAS_AVXVNNI)
    if (has_avxvnni()) found.push_back(&isa_avxvnni);
#endif
#if defined(GQ_HAS_AVX2)
    if (has_avx2()) found.push_back(&isa_avx2);
#endif
#if defined(GQ_HAS_NEON)
    if (has_neon()) found.push_back(&isa_neon);
#endif
    found.push_back(&isa_portable);
    return found;
}

const std::vector<const Isa*>& available() {
    static const std::vector<const Isa*> found = find();
    return found;
}

std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{available().front()};
    return isa;
}

std::string join_names() {
    std::string names;
    for (const Isa* isa : available()) names += (names.empty() ? "" : ",") + std::string(isa->name);
    return names;
}

const std::string& names() {
    static const std::string joined = join_names();
    return joined;
}

}  // namespace

const Isa& current_isa() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace gq

const char* gq_isas(void) { return gq::names().c_str(); }

const char* gq_isa(void) { return gq::current_isa().name; }

int32_t gq_use_isa(const char* name) {
    return gq::guarded([&] {
        if (!name) gq::refuse("name must not be NULL");
        for (const gq::Isa* isa : gq::available())
            if (!std::strcmp(isa->name, name)) return gq::chosen().store(isa);
        gq::refuse("name must be one of %s, got %.40s", gq_isas(), name);
    });
}
