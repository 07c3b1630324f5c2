// logprobs: from the logits of one or two models, log-probabilities of given tokens, entropy, KL; and their gradient.
//
// The contract is nlhf_kernels/ops/logprobs/layout.py; the oracle is oracle.py, its equations are in README.md.
#pragma once

#include <cstdint>

#include "../common/levels.h"

namespace nlhf {

enum class LogitType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct ModelLogits {
  const void* data;  // (rows, vocabulary), the columns contiguous; null: there is no such model
  LogitType type;
  int64_t row_stride;  // in elements; may exceed the vocabulary
  float scale;         // a score is scale * x or, with a softcap, softcap * tanh(scale * x / softcap)
  float softcap;       // 0: none
};

constexpr int64_t kIgnoredTarget = -100;

// Rows of `values` and of its gradient, rows of `normalizers`, bits of `wanted`: layout.py in C++.
enum Output : int { kPolicy = 0, kReference = 1, kEntropy = 2, kKl = 3, kMixture = 4, kOutputs = 5 };
enum Normalizer : int { kPolicyNormalizers = 0, kReferenceNormalizers = 2, kMixtureNormalizers = 4, kNormalizers = 6 };
enum Want : uint32_t { kWantEntropy = 1, kWantKl = 2, kWantMixture = 4 };

struct Logprobs {
  ModelLogits policy;
  ModelLogits reference;
  const int64_t* targets;  // (rows)
  const float* beta;       // null where no mixture is wanted
  int64_t beta_stride;     // 0: one for all rows
  double temperature;
  uint32_t wanted;
  int64_t rows;
  int64_t vocabulary;
  float* values;       // (kOutputs, rows); read by backward
  float* normalizers;  // (kNormalizers, rows); read by backward
};

struct LogprobsBackward {
  Logprobs forward;
  const float* upstream;  // (kOutputs, rows)
  void* out;              // (rows, vocabulary), of the policy's type; may be the policy's logits themselves
  int64_t out_stride;
};

NLHF_DECLARE_CPU(logprobs, Logprobs)
NLHF_DECLARE_CPU(logprobs_backward, LogprobsBackward)

}  // namespace nlhf
