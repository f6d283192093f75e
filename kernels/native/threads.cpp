#include "threads.h"

#include <algorithm>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace gq {
namespace {

constexpr int SPINS = 4000;                       // some 50 microseconds, longer than from step to step of a layer
constexpr int64_t FEWEST_MULTIPLICATIONS = 1 << 17;  // a few microseconds: what waking a thread costs

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until ready(), giving way to other threads after a while: they may be the ones waited for.
template <class Ready>
void spin(const Ready& ready) {
    for (int i = 0; !ready(); ++i) {
        pause();
        if (i > SPINS) std::this_thread::yield();
    }
}

// One job at a time; the caller has part 0. Workers are started when they are first needed.
class Pool {
   public:
    bool enter() { return busy_.try_lock(); }
    void leave() { busy_.unlock(); }

    void run(int count, void (*body)(const void*, int, int), const void* context) {
        count = start(count);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = body;
            context_ = context;
            count_ = count;
            std::fegetenv(&environment_);
            left_.store(count - 1, std::memory_order_relaxed);
            job_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        body(context, 0, count);
        spin([&] { return left_.load(std::memory_order_acquire) == 0; });
    }

   private:
    // Workers for that many parts, or as many as the system grants; the number of parts.
    int start(int count) {
        try {
            for (; workers_ < count - 1; ++workers_) std::thread(&Pool::work, this, workers_ + 1, job_.load()).detach();
        } catch (const std::exception&) {
        }
        return std::min(count, workers_ + 1);
    }

    void work(int index, uint64_t done) {
        for (;;) {
            for (int i = 0; i < SPINS && job_.load(std::memory_order_acquire) == done; ++i) pause();
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != done; });
            done = job_.load(std::memory_order_relaxed);
            const auto body = body_;
            const auto context = context_;
            const int count = count_;
            const std::fenv_t environment = environment_;
            lock.unlock();
            if (index >= count) continue;
            std::fesetenv(&environment);
            body(context, index, count);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> job_{0};
    std::atomic<int> left_{0};
    int workers_ = 0;
    void (*body_)(const void*, int, int) = nullptr;
    const void* context_ = nullptr;
    int count_ = 0;
    std::fenv_t environment_;  // the caller's: whether subnormal numbers count as 0
};

// The pool lives as long as the process. A forked child has none of its threads and makes its own; what it inherits is
// forgotten, locked or not.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* found = current.load(std::memory_order_acquire);
    if (found) return *found;
    Pool* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
}

#if !defined(_WIN32)
const int forgotten_by_children = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

}  // namespace

int worthwhile(int threads, int64_t multiplications) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, multiplications / FEWEST_MULTIPLICATIONS)));
}

void parallel_call(int threads, void (*body)(const void* context, int index, int count), const void* context) {
    static const int processors = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    const int count = std::min(threads, processors);
    Pool& shared = pool();
    if (count == 1 || !shared.enter()) return body(context, 0, 1);
    shared.run(count, body, context);
    shared.leave();
}

void Barrier::wait(int count) {
    const int round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
    } else {
        spin([&] { return round_.load(std::memory_order_acquire) != round; });
    }
}

}  // namespace gq
