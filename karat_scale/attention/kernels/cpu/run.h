// Shares a pass (forward or backward, in float32 or in pairs of bfloat16) out over heads, items and threads.
//
// A pass has static functions: how many floats a head's packed parameters and gradients take, how to pack them, and
// what to do with one item of the batch. Its Scratch is a thread's own memory.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>

#include "call.h"
#include "memory.h"

namespace {

constexpr long SUMMANDS = 32; // parts the gradient of a head's parameters is summed from, over heads

// The memory of a call: packed parameters and sums of as many heads as are worked on at once, and each thread's own.
template <class Pass>
class Room {
 public:
  Room(const Call& c, const typename Pass::Shape& s, long shared, long sums, long own)
      : group(std::max(1l, std::min(s.heads, (long)c.threads))), coefficients_(round_up(Pass::coefficients(s), 16)),
        projector_(round_up(Pass::projector(s), 16)), head_(coefficients_ + projector_ + sums),
        shared_(round_up(shared, 16)) {
    Arena needed;
    typename Pass::Scratch(s, needed);
    own_ = own + needed.used();
    base_ = memory.zeros(group * head_ + shared_ + c.threads * own_);
  }

  const long group; // heads

  bool is_there() const { return base_; }
  float* coefficients(long h) const { return base_ + h % group * head_; }
  float* projector(long h) const { return coefficients(h) + coefficients_; }
  float* sums(long h) const { return projector(h) + projector_; }
  float* shared() const { return base_ + group * head_; }
  float* own(long thread) const { return shared() + shared_ + thread * own_; }

 private:
  const long coefficients_, projector_, head_, shared_;
  long own_;
  float* base_;
};

template <class Pass>
int run_forward(const Call& c) {
  const typename Pass::Shape s(c);
  const Room<Pass> room(c, s, 0, 0, 0);
  if (!room.is_there()) return 1;
#pragma omp parallel num_threads(c.threads)
  {
    Arena arena(room.own(omp_get_thread_num()));
    const typename Pass::Scratch mine(s, arena);
    for (long first = 0; first < s.heads; first += room.group) {
      const long end = std::min(first + room.group, s.heads);
#pragma omp for schedule(dynamic)
      for (long h = first; h < end; h++) Pass::pack(c, s, h, room.coefficients(h), room.projector(h));
#pragma omp for schedule(dynamic)
      for (long t = first * s.batch; t < end * s.batch; t++) {
        const long h = t / s.batch, b = t % s.batch;
        Pass::run(c, s, mine, room.coefficients(h), room.projector(h), b, h);
      }
    }
  }
  memory.release_if_large();
  return 0;
}

// Of a head.
inline long grad_bias_size(const Call& c) {
  return (c.grad_bias.query ? c.tokens : 1) * (c.grad_bias.key ? c.tokens : 1);
}

// Adds the sums of one part of the batch to those of a head, or begins them with the first part.
inline void add_part(const float* part, float* total, long count, bool first) {
  for (long i = 0; i < count; i++) total[i] = first ? part[i] : total[i] + part[i];
}

// Writes the gradients of a head's parameters from their sums, which are padded and in the order of the pass.
template <class Pass>
void write_gradients(const Call& c, const typename Pass::Shape& s, const HeadGradients& sums, long grad_feature,
                     long h) {
  for (long q = 0; q < s.tokens; q++)
    for (long p = 0; p < s.rank; p++) {
      const float* from = sums.coefficients + Pass::grad_coefficient(s, p, q);
      const long to = s.coefficient(h, p, q, 0);
      for (long m = 0; m < s.grid; m++) {
        c.grad_cosines[to + m] = from[m * grad_feature];
        c.grad_sines[to + m] = from[(s.grid + m) * grad_feature];
      }
      c.grad_projector[(h * s.tokens + q) * s.rank + p] = sums.projector[q * s.unit_step + p];
    }
}

// The gradients are summed over a fixed split of the batch and in its order, so the number of threads changes no bit.
template <class Pass>
int run_backward(const Call& c) {
  const typename Pass::Shape s(c);
  const long parts = std::max(1l, std::min(s.batch, (SUMMANDS + s.heads - 1) / s.heads));
  const long grad_feature = round_up(Pass::grad_feature(s), 16), grad_projector = round_up(Pass::grad_projector(s), 16);
  const long grad_coefficients = s.features() * grad_feature, head_size = grad_coefficients + grad_projector;
  const long bias_size = c.grad_bias.data && !c.grad_bias.batch ? grad_bias_size(c) : 0;
  const long sums_size = head_size + round_up(bias_size, 16);
  const Room<Pass> room(c, s, s.heads, head_size, sums_size);
  if (!room.is_there()) return 1;
  int* const done = reinterpret_cast<int*>(room.shared()); // parts of each head
  long next;
#pragma omp parallel num_threads(c.threads)
  {
    float *own = room.own(omp_get_thread_num()), *own_bias = bias_size ? own + head_size : nullptr;
    const HeadGradients sums{own, own + grad_coefficients, own_bias, nullptr};
    Arena arena(own + sums_size);
    const typename Pass::Scratch mine(s, arena);
    for (long first = 0; first < s.heads; first += room.group) {
      const long heads = std::min(room.group, s.heads - first);
#pragma omp for schedule(dynamic)
      for (long h = first; h < first + heads; h++) Pass::pack(c, s, h, room.coefficients(h), room.projector(h));
#pragma omp single
      next = 0;
      for (;;) {
        // In this order, so that the parts a thread waits for are being computed.
        long t;
#pragma omp atomic capture
        t = next++;
        if (t >= heads * parts) break;
        const long h = first + t % heads, part = t / heads;
        clear(own, sums_size);
        for (long b = s.batch * part / parts; b < s.batch * (part + 1) / parts; b++)
          Pass::run(c, s, mine, room.coefficients(h), room.projector(h), sums, b, h);
        while (__atomic_load_n(done + h, __ATOMIC_ACQUIRE) < part) sched_yield();
        float* total = room.sums(h);
        add_part(own, total, head_size, part == 0);
        add_part(own_bias, static_cast<float*>(c.grad_bias.data) + h * bias_size, bias_size, part == 0);
        if (part == parts - 1)
          write_gradients<Pass>(c, s, {total, total + grad_coefficients, nullptr, nullptr}, grad_feature, h);
        __atomic_store_n(done + h, part + 1, __ATOMIC_RELEASE);
      }
#pragma omp barrier
    }
  }
  memory.release_if_large();
  return 0;
}

} // namespace
