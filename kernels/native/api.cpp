// What of the C interface belongs to no kernel.

#include "gq_native.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

int32_t gq_abi(void) { return GQ_ABI; }

void gq_advise_huge(void* array, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(array) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(bytes)) / page * page;
    if (array && bytes > 0 && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)array, (void)bytes;
#endif
}
