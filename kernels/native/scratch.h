// Working memory that a thread keeps from call to call, so that no call of a stream allocates.

#pragma once

#include <stdint.h>

#include <memory>
#include <new>

namespace gq {

template <class T>
class Scratch {
   public:
    // Room for that many numbers, 64-byte aligned, at first zeros. What was in it is lost where it grows.
    T* reserve(int64_t count) {
        if (count > capacity_) {
            data_.reset();
            capacity_ = 0;
            data_.reset(new (std::align_val_t{64}) T[count]());
            capacity_ = count;
        }
        return data_.get();
    }

    T* data() const { return data_.get(); }

   private:
    struct Delete {
        void operator()(T* data) const { operator delete[](data, std::align_val_t{64}); }
    };

    std::unique_ptr<T[], Delete> data_;
    int64_t capacity_ = 0;
};

}  // namespace gq
