// The arguments of logprobs as they come from Python (ops/logprobs/native.py).
#pragma once

#include <pybind11/pybind11.h>

#include "../common/binding.h"
#include "logprobs.h"

namespace nlhf {

// A model as (address, type, row stride, scale, softcap); the address is 0 where there is none.
inline ModelLogits model_logits(const pybind11::tuple& model) {
  const int type = model[1].cast<int>();
  require(type >= 0 && type <= 2, "logprobs: type: expected 0, 1 or 2");
  return {reinterpret_cast<const void*>(model[0].cast<std::uintptr_t>()), static_cast<LogitType>(type),
          model[2].cast<int64_t>(), model[3].cast<float>(), model[4].cast<float>()};
}

// Positional: the fields of Logprobs in their order.
inline Logprobs logprobs_problem(const pybind11::tuple& policy, const pybind11::tuple& reference,
                                 std::uintptr_t targets, std::uintptr_t beta, int64_t beta_stride, double temperature,
                                 uint32_t wanted, int64_t rows, int64_t vocabulary, std::uintptr_t values,
                                 std::uintptr_t normalizers) {
  Logprobs problem{};
  problem.policy = model_logits(policy);
  problem.reference = model_logits(reference);
  require(rows >= 0 && vocabulary >= 1, "logprobs: rows, vocabulary: expected at least 0 and 1");
  require(rows == 0 || (problem.policy.data != nullptr && targets != 0 && values != 0 && normalizers != 0),
          "logprobs: policy, targets, values, normalizers: expected addresses");
  require(rows == 0 || problem.reference.data != nullptr || (wanted & (kWantKl | kWantMixture)) == 0,
          "logprobs: wanted: KL and mixture need the reference");
  require(rows == 0 || beta != 0 || (wanted & kWantMixture) == 0, "logprobs: wanted: the mixture needs beta");
  require(beta_stride >> 1 == 0, "logprobs: beta_stride: expected 0 or 1");
  problem.targets = reinterpret_cast<const int64_t*>(targets);
  problem.beta = reinterpret_cast<const float*>(beta);
  problem.beta_stride = beta_stride;
  problem.temperature = temperature;
  problem.wanted = wanted;
  problem.rows = rows;
  problem.vocabulary = vocabulary;
  problem.values = reinterpret_cast<float*>(values);
  problem.normalizers = reinterpret_cast<float*>(normalizers);
  return problem;
}

}  // namespace nlhf
