// The memory that a call works in.

#pragma once

#include <cstdlib>
#include <cstring>

namespace {

inline long round_up(long n, long unit) { return (n + unit - 1) / unit * unit; }

inline void clear(float* data, long floats) { std::memset(data, 0, floats * 4); }

// Zeroed memory, handed out in pieces. Taken once with no memory behind it, it tells how much is needed.
class Arena {
 public:
  explicit Arena(float* base = nullptr) : base_(base) {}
  float* take(long floats) {
    float* piece = base_ ? base_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return piece;
  }
  long used() const { return used_; }

 private:
  float* base_;
  long used_ = 0;
};

// Memory that a thread keeps from call to call: fresh pages from the system cost more than zeroing old ones. It has room
// for twice what was asked for, as backward asks for more than forward: pages take memory only once they are used.
class Memory {
 public:
  ~Memory() { std::free(data_); }

  // `floats` zeros, or null where memory ran out. They are the caller's until the next call.
  float* zeros(long floats) {
    if (floats > size_) {
      release();
      data_ = static_cast<float*>(std::aligned_alloc(64, round_up(2 * floats, 16) * 4));
      if (!data_) return nullptr;
      size_ = 2 * floats;
    }
    std::memset(data_, 0, floats * 4);
    return data_;
  }

  void release_if_large() {
    if (size_ > KEPT) release();
  }

 private:
  static constexpr long KEPT = 1 << 24; // 64 MiB, of which half may be used
  float* data_ = nullptr;
  long size_ = 0;

  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
};

thread_local Memory memory;

} // namespace
