// Shares a pass (forward or backward, in float32 or in pairs of bfloat16) out over heads, items and threads.
//
// A pass has static functions: how many floats a head's packed parameters and gradients take, how to pack them, and
// what to do with one item of the batch. Its Scratch is a thread's own memory.

#pragma once

#include <omp.h>

#include <algorithm>

#include "call.h"
#include "memory.h"

namespace {

constexpr long SUMMANDS = 32; // parts the gradient of a head's parameters is summed from, over heads

template <class Pass>
int run_forward(const Call& c) {
  const typename Pass::Shape s(c);
  Arena needed;
  typename Pass::Scratch(s, needed);
  const long coefficients = round_up(Pass::coefficients(s), 16), projector = round_up(Pass::projector(s), 16);
  float* packed = memory.zeros(s.heads * (coefficients + projector) + c.threads * needed.used());
  if (!packed) return 1;
  float* projectors = packed + s.heads * coefficients;
  float* scratch = projectors + s.heads * projector;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (long h = 0; h < s.heads; h++) Pass::pack(c, s, h, packed + h * coefficients, projectors + h * projector);
    Arena arena(scratch + omp_get_thread_num() * needed.used());
    const typename Pass::Scratch mine(s, arena);
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * s.batch; t++) {
      const long h = t / s.batch, b = t % s.batch;
      Pass::run(c, s, mine, packed + h * coefficients, projectors + h * projector, b, h);
    }
  }
  memory.release_if_large();
  return 0;
}

// The first of `parts` vectors takes the sum of all, added in their order.
void sum_parts(float* data, long size, long stride, long parts) {
  for (long part = 1; part < parts; part++)
    for (long i = 0; i < size; i++) data[i] += data[part * stride + i];
}

// The gradients are summed over a fixed split of the batch, so the number of threads changes no bit.
template <class Pass>
int run_backward(const Call& c) {
  const typename Pass::Shape s(c);
  Arena needed;
  typename Pass::Scratch(s, needed);
  const long parts = std::max(1l, std::min(s.batch, (SUMMANDS + s.heads - 1) / s.heads));
  const long coefficients = round_up(Pass::coefficients(s), 16), projector = round_up(Pass::projector(s), 16);
  const long grad_feature = round_up(Pass::grad_feature(s), 16), grad_projector = round_up(Pass::grad_projector(s), 16);
  const long grad_size = s.features() * grad_feature + grad_projector;
  float* packed =
      memory.zeros(s.heads * (coefficients + projector + parts * grad_size) + c.threads * needed.used());
  if (!packed) return 1;
  float* projectors = packed + s.heads * coefficients;
  float* grads = projectors + s.heads * projector;
  float* scratch = grads + s.heads * parts * grad_size;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp for schedule(dynamic)
    for (long h = 0; h < s.heads; h++) Pass::pack(c, s, h, packed + h * coefficients, projectors + h * projector);
    Arena arena(scratch + omp_get_thread_num() * needed.used());
    const typename Pass::Scratch mine(s, arena);
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * parts; t++) {
      const long h = t / parts, part = t % parts;
      float* grad = grads + t * grad_size;
      for (long b = s.batch * part / parts; b < s.batch * (part + 1) / parts; b++)
        Pass::run(c, s, mine, packed + h * coefficients, projectors + h * projector, grad,
                  grad + s.features() * grad_feature, b, h);
    }
#pragma omp for schedule(dynamic)
    for (long t = 0; t < s.heads * (s.features() + 1); t++) {
      const long h = t / (s.features() + 1), f = t % (s.features() + 1);
      float* sums = grads + h * parts * grad_size + f * grad_feature;
      if (f < s.features()) {
        sum_parts(sums, grad_feature, grad_size, parts);
        float* out = f < s.grid ? c.grad_cosines : c.grad_sines;
        for (long p = 0; p < s.rank; p++)
          for (long q = 0; q < s.tokens; q++)
            out[s.coefficient(h, p, q, f % s.grid)] = sums[Pass::grad_coefficient(s, p, q)];
      } else {
        sum_parts(sums, grad_projector, grad_size, parts);
        for (long q = 0; q < s.tokens; q++)
          for (long p = 0; p < s.rank; p++)
            c.grad_projector[(h * s.tokens + q) * s.rank + p] = sums[q * s.unit_step + p];
      }
    }
  }
  memory.release_if_large();
  return 0;
}

} // namespace
