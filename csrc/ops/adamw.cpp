// Binding of the op adamw_step.
#include "ops/binding.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastformer {
namespace {

constexpr int64_t kGrain = 32768; // the fewest elements that are worth a thread

// One parameter, and what is known of its step.
struct Parameter {
  float *param;
  const float *grad;
  float *exp_avg, *exp_avg_sq;
  cpu::bf16 *copy;
  int64_t first, size; // its elements among those of all parameters
  cpu::AdamwStep step;
};

// Updates the elements [begin, end) of all parameters, which are sorted by `first`.
void update(const std::vector<Parameter> &parameters, int64_t begin, int64_t end) {
  const auto kernel = cpu_kernels().adamw->step;
  auto p = std::upper_bound(parameters.begin(), parameters.end(), begin,
                            [](int64_t at, const Parameter &one) { return at < one.first; });
  for (--p; p != parameters.end() && p->first < end; ++p) {
    const int64_t from = std::max<int64_t>(begin - p->first, 0);
    const int64_t to = std::min(end - p->first, p->size);
    kernel(p->param + from, p->grad + from, p->exp_avg + from, p->exp_avg_sq + from,
           p->copy ? p->copy + from : nullptr, to - from, p->step);
  }
}

float *float_data(const char *name, const Tensor &t, int64_t numel) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel,
      "adamw_step: ", name, " must be contiguous float32 on the CPU, of the parameter's size");
  return static_cast<float *>(t.mutable_data_ptr());
}

// One more than `t`, which becomes that when `write` says so.
double next_step(const Tensor &t, bool write) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1, "adamw_step: steps must be numbers on the CPU");
  void *data = t.mutable_data_ptr();
  if (t.scalar_type() == ScalarType::Double) {
    double *number = static_cast<double *>(data);
    return write ? ++*number : *number + 1.0;
  }
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "adamw_step: steps must be floating point");
  float *number = static_cast<float *>(data);
  return write ? ++*number : *number + 1.0f;
}

void adamw_step_cpu(const std::vector<Tensor> &params, const std::vector<Tensor> &grads,
                    const std::vector<Tensor> &exp_avgs, const std::vector<Tensor> &exp_avg_sqs,
                    const std::vector<Tensor> &steps, const std::vector<Tensor> &copies, double lr,
                    double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count &&
                      exp_avg_sqs.size() == count && steps.size() == count &&
                      (copies.empty() || copies.size() == count),
                  "adamw_step: the lists must have one length, or none for copies");
  std::vector<Tensor> dense; // keeps what had to be made contiguous
  std::vector<Parameter> parameters;
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t n = params[i].numel();
    dense.push_back(torch::stable::contiguous(grads[i]));
    const double t = next_step(steps[i], false);
    Parameter one{};
    one.param = float_data("params", params[i], n);
    one.grad = float_data("grads", dense.back(), n);
    one.exp_avg = float_data("exp_avgs", exp_avgs[i], n);
    one.exp_avg_sq = float_data("exp_avg_sqs", exp_avg_sqs[i], n);
    if (!copies.empty()) {
      const Tensor &copy = copies[i];
      STD_TORCH_CHECK(copy.is_cpu() && copy.scalar_type() == ScalarType::BFloat16 &&
                          copy.is_contiguous() && copy.numel() == n,
                      "adamw_step: copies must be contiguous bfloat16, of the parameters' sizes");
      one.copy = static_cast<cpu::bf16 *>(copy.mutable_data_ptr());
    }
    one.step.decay = static_cast<float>(1.0 - lr * weight_decay);
    one.step.rest1 = static_cast<float>(1.0 - beta1);
    one.step.beta2 = static_cast<float>(beta2);
    one.step.rest2 = static_cast<float>(1.0 - beta2);
    one.step.size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
    one.step.root_size = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
    one.step.eps = static_cast<float>(eps);
    one.first = total;
    one.size = n;
    total += n;
    if (n > 0)
      parameters.push_back(one);
  }
  for (const Tensor &step : steps)
    next_step(step, true); // only now that nothing is left to be refused
  torch::stable::parallel_for(0, total, kGrain,
                              [&](int64_t begin, int64_t end) { update(parameters, begin, end); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("adamw_step.cpu", TORCH_BOX(&adamw_step_cpu));
}

} // namespace fastformer
