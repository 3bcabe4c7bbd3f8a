// AdamW is bound by memory: seven numbers move for each parameter, and half a one more for a copy.
#include "cpu/adamw.h"
#include "cpu/vec.h"

namespace fastformer::cpu::FASTFORMER_ISA {
namespace {

struct Element {
  Vec param, exp_avg, exp_avg_sq;
};

FASTFORMER_INLINE Element update(Element e, Vec grad, const AdamwStep &step) {
  e.exp_avg = fma(grad - e.exp_avg, splat(step.rest1), e.exp_avg);
  e.exp_avg_sq = fma(grad * grad, splat(step.rest2), e.exp_avg_sq * step.beta2);
  const Vec denominator = fma(sqrt(e.exp_avg_sq), splat(step.root_size), splat(step.eps));
  e.param = fma(e.exp_avg / denominator, splat(-step.size), e.param * step.decay);
  return e;
}

void adamw_step(float *param, const float *grad, float *exp_avg, float *exp_avg_sq, bf16 *copy,
                int64_t n, const AdamwStep &step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Element e =
        update({load(param + i), load(exp_avg + i), load(exp_avg_sq + i)}, load(grad + i), step);
    store(param + i, e.param);
    store(exp_avg + i, e.exp_avg);
    store(exp_avg_sq + i, e.exp_avg_sq);
    if (copy)
      store(copy + i, e.param);
  }
  if (const int64_t tail = n - i) {
    const Element e =
        update({load(param + i, tail), load(exp_avg + i, tail), load(exp_avg_sq + i, tail)},
               load(grad + i, tail), step);
    store(param + i, e.param, tail);
    store(exp_avg + i, e.exp_avg, tail);
    store(exp_avg_sq + i, e.exp_avg_sq, tail);
    if (copy)
      store(copy + i, e.param, tail);
  }
}

} // namespace

extern const AdamwKernels adamw_kernels;
const AdamwKernels adamw_kernels = {adamw_step};

} // namespace fastformer::cpu::FASTFORMER_ISA
