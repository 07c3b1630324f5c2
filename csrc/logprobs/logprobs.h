// logprobs: log-probabilities of target tokens, entropy and KL from the logits of one or two models; and the gradient.
//
// The contract is nlhf_kernels/ops/logprobs/layout.py; the oracle is oracle.py, its equations are in README.md.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/levels.h"

namespace nlhf {

struct ModelLogits {
  const void* data;  // (rows, vocabulary), the columns contiguous; null: there is no such model
  DType dtype;
  int64_t row_stride;  // in elements; may exceed the vocabulary
  float scale;         // a score is scale * x or, with a softcap, softcap * tanh(scale * x / softcap)
  float softcap;       // 0: none
};

constexpr int64_t kIgnoredTarget = -100;

// Rows of `values` and of its gradient, rows of `normalizers`, bits of `output_mask`: the same as in layout.py.
enum Output : int { kPolicy = 0, kReference = 1, kEntropy = 2, kKl = 3, kMixture = 4, kOutputs = 5 };
enum Normalizer : int { kPolicyNormalizers = 0, kReferenceNormalizers = 2, kMixtureNormalizers = 4, kNormalizers = 6 };
enum OutputBit : uint32_t { kWithEntropy = 1, kWithKl = 2, kWithMixture = 4 };

struct Logprobs {
  ModelLogits policy;
  ModelLogits reference;
  const int64_t* targets;  // (rows)
  const float* beta;       // null without kWithMixture
  int64_t beta_stride;     // 0: one for all rows
  double temperature;
  uint32_t output_mask;
  int64_t rows;
  int64_t vocabulary;
  float* values;       // (kOutputs, rows); read by backward
  float* normalizers;  // (kNormalizers, rows); read by backward
};

struct LogprobsBackward {
  Logprobs forward;  // a target that is no column has no share in its row's gradient: it may lie in another slice
  const float* upstream;  // (kOutputs, rows)
  void* out;              // (rows, vocabulary), of the policy's type; may be the policy's logits themselves
  int64_t out_stride;
};

NLHF_DECLARE_CPU(logprobs, Logprobs)
NLHF_DECLARE_CPU(logprobs_backward, LogprobsBackward)

}  // namespace nlhf
