// Fourier-KArAt attention for CPUs: H = sum_f f(A) C_f^T and O = H (W^T V), and psi(A) V for the content form.
//
// Inputs are float32, bfloat16 or float16; scores, harmonics and sums are float32. Where the CPU multiplies bfloat16, its
// products' operands are rounded to it (pair_*.h), unless there is a bias or a mask; all else is multiplied in float32.
// Results do not depend on the number of threads. Beside inputs and outputs only H is kept: backward computes scores and
// features again.
//
// For aarch64, GCC would order instructions before it gives out registers, and so need more than the 32 there are.
// Build with: -fno-schedule-insns

#include "backward.h"
#include "forward.h"
#include "run.h"

#if defined(__AVX512BF16__)
#include "pair_backward.h"
#include "pair_forward.h"
#endif

namespace {

#if defined(__AVX512BF16__)

// Over a handful of tokens or units the roundings of features do not average out against sums that happen to cancel.
bool takes_pairs(const Call& c) { return c.tokens >= 32 && c.rank >= 4 && !c.psi && !c.bias.data && !c.mask.data; }

int forward_bfloat16(const Call& c) {
  return takes_pairs(c) ? run_forward<PairForward>(c) : run_forward<Forward<bfloat16>>(c);
}

int backward_bfloat16(const Call& c) {
  return takes_pairs(c) ? run_backward<PairBackward>(c) : run_backward<Backward<bfloat16>>(c);
}

#else

int forward_bfloat16(const Call& c) { return run_forward<Forward<bfloat16>>(c); }
int backward_bfloat16(const Call& c) { return run_backward<Backward<bfloat16>>(c); }

#endif

} // namespace

// 0, or 1 where memory ran out. dtype: 0 float32, 1 bfloat16, 2 float16.
extern "C" int karat_forward(const Call* c) {
  return c->dtype == 0   ? run_forward<Forward<float>>(*c)
         : c->dtype == 1 ? forward_bfloat16(*c)
                         : run_forward<Forward<float16>>(*c);
}

extern "C" int karat_backward(const Call* c) {
  return c->dtype == 0   ? run_backward<Backward<float>>(*c)
         : c->dtype == 1 ? backward_bfloat16(*c)
                         : run_backward<Backward<float16>>(*c);
}
