// The arguments of logprobs and of its backward, in the order of ops/logprobs/native.py.
#pragma once

#include "../common/binding.h"
#include "logprobs.h"

namespace nlhf {

// A model comes as (address, dtype, row stride, scale, softcap); the address is 0 where there is no such model.
static void read_model(Arguments& arguments, ModelLogits& model) {
  arguments.nested() >> model.data >> model.dtype >> model.row_stride >> model.scale >> model.softcap;
}

static Logprobs read_logprobs(Arguments& arguments) {
  Logprobs p{};
  read_model(arguments, p.policy);
  read_model(arguments, p.reference);
  arguments >> p.targets >> p.beta >> p.beta_stride >> p.temperature >> p.output_mask >> p.rows >> p.vocabulary;
  arguments >> p.values >> p.normalizers;
  require(p.rows >= 0 && p.vocabulary >= 1, "logprobs: rows, vocabulary: expected at least 0 and 1");
  require(p.rows == 0 || (p.policy.data && p.targets && p.values && p.normalizers),
          "logprobs: policy, targets, values, normalizers: expected addresses");
  require(p.rows == 0 || p.reference.data || (p.output_mask & (kWithKl | kWithMixture)) == 0,
          "logprobs: output_mask: KL and mixture need the reference");
  require(p.rows == 0 || p.beta || (p.output_mask & kWithMixture) == 0,
          "logprobs: output_mask: the mixture needs beta");
  require(p.beta_stride >> 1 == 0, "logprobs: beta_stride: expected 0 or 1");
  return p;
}

static LogprobsBackward read_logprobs_backward(Arguments& arguments) {
  LogprobsBackward p{};
  p.forward = read_logprobs(arguments);
  arguments >> p.upstream >> p.out >> p.out_stride;
  require(p.forward.rows == 0 || (p.upstream && p.out), "logprobs_backward: upstream, out: expected addresses");
  return p;
}

}  // namespace nlhf
