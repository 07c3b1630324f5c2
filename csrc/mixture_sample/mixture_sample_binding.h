// The arguments of mixture_sample as they come from Python (ops/mixture_sample/native.py), for both bindings.
#pragma once

#include <pybind11/pybind11.h>

#include "../common/binding.h"
#include "mixture_sample.h"

namespace nlhf {

// Positional: models as ((address, dtype, row stride), ...), then the fields of MixtureSample in their order.
inline MixtureSample mixture_sample_problem(const pybind11::tuple& models, std::uintptr_t settings,
                                            int64_t settings_stride, bool filtered, std::uintptr_t bias,
                                            int64_t bias_stride, std::uintptr_t uniforms, std::uintptr_t seed,
                                            int64_t seed_stride, std::uintptr_t row_ids, std::uintptr_t step,
                                            int64_t step_stride, uint32_t stream, int64_t rows, int64_t vocabulary,
                                            uint32_t wanted, std::uintptr_t tokens, std::uintptr_t logprobs,
                                            std::uintptr_t ok) {
  require(models.size() >= 1 && models.size() <= kMaxModels, "mixture_sample: models: expected 1 to 4");
  require(rows >= 0 && vocabulary >= 1, "mixture_sample: rows, vocabulary: expected at least 0 and 1");
  require(stream < 256, "mixture_sample: stream: expected at most 255");
  require(rows == 0 || (settings != 0 && tokens != 0 && logprobs != 0 && ok != 0),
          "mixture_sample: settings, tokens, logprobs, ok: expected addresses");
  require(rows == 0 || uniforms != 0 || (seed != 0 && row_ids != 0 && step != 0),
          "mixture_sample: seed, row_ids, step: expected addresses, or uniforms");
  MixtureSample problem{};
  problem.models = static_cast<int>(models.size());
  require(settings_stride == 0 || settings_stride == kWeights + problem.models,
          "mixture_sample: settings_stride: expected 0 or 4 + models");
  require((seed_stride | step_stride) >> 1 == 0, "mixture_sample: seed_stride, step_stride: expected 0 or 1");
  for (int m = 0; m < problem.models; ++m) {
    const auto model = models[m].cast<pybind11::tuple>();
    const int dtype = model[1].cast<int>();
    require(dtype >= 0 && dtype <= 2, "mixture_sample: dtype: expected 0, 1 or 2");
    problem.logits[m] = {reinterpret_cast<const void*>(model[0].cast<std::uintptr_t>()), static_cast<Float>(dtype),
                         model[2].cast<int64_t>()};
    require(rows == 0 || problem.logits[m].data != nullptr, "mixture_sample: logits: expected an address");
  }
  problem.settings = reinterpret_cast<const float*>(settings);
  problem.settings_stride = settings_stride;
  problem.filtered = filtered;
  problem.bias = reinterpret_cast<const float*>(bias);
  problem.bias_stride = bias_stride;
  problem.uniforms = reinterpret_cast<const double*>(uniforms);
  problem.seed = reinterpret_cast<const int64_t*>(seed);
  problem.seed_stride = seed_stride;
  problem.row_ids = reinterpret_cast<const int64_t*>(row_ids);
  problem.step = reinterpret_cast<const int64_t*>(step);
  problem.step_stride = step_stride;
  problem.stream = stream;
  problem.rows = rows;
  problem.vocabulary = vocabulary;
  problem.wanted = wanted;
  problem.tokens = reinterpret_cast<int64_t*>(tokens);
  problem.logprobs = reinterpret_cast<float*>(logprobs);
  problem.ok = reinterpret_cast<bool*>(ok);
  return problem;
}

}  // namespace nlhf
