// Threads that wait for work: all calls of the library share them.

#pragma once

#include <stdint.h>

#include <atomic>

namespace gq {

// As many threads as are worth waking for that many multiplications.
int worthwhile(int threads, int64_t multiplications);

// `parallel` with the body as a function and what it works on.
void parallel_call(int threads, void (*body)(const void* context, int index, int count), const void* context);

// Calls body(index, count) once for every 0 <= index < count, at the same time, and waits for all of them. The count is
// at least 1 and at most `threads`: fewer where the machine has fewer, 1 where another call keeps them busy. The body
// must not throw.
template <class Body>
void parallel(int threads, const Body& body) {
    if (threads <= 1) return body(0, 1);
    parallel_call(
        threads, [](const void* context, int index, int count) { (*static_cast<const Body*>(context))(index, count); },
        &body);
}

// Where the `count` threads of a parallel body meet: none passes before all have come. Any number of times.
class Barrier {
   public:
    void wait(int count);

   private:
    std::atomic<int> waiting_{0}, round_{0};
};

}  // namespace gq
