// The arguments of mixture_sample, in the order of ops/mixture_sample/native.py.
#pragma once

#include "../common/binding.h"
#include "mixture_sample.h"

namespace nlhf {

// The models come first, as ((address, dtype, row stride), ...).
static MixtureSample read_mixture_sample(Arguments& arguments) {
  MixtureSample p{};
  Arguments models = arguments.nested();
  require(models.remaining() >= 1 && models.remaining() <= kMaxModels, "mixture_sample: models: expected 1 to 4");
  p.models = static_cast<int>(models.remaining());
  for (int m = 0; m < p.models; ++m) models.nested() >> p.logits[m].data >> p.logits[m].dtype >> p.logits[m].row_stride;
  arguments >> p.settings >> p.settings_stride >> p.filtered >> p.bias >> p.bias_stride >> p.uniforms;
  arguments >> p.seed >> p.seed_stride >> p.row_ids >> p.step >> p.step_stride >> p.stream;
  arguments >> p.rows >> p.vocabulary >> p.logprob_mask >> p.tokens >> p.logprobs >> p.ok;
  require(p.rows >= 0 && p.vocabulary >= 1, "mixture_sample: rows, vocabulary: expected at least 0 and 1");
  require(p.stream < 256, "mixture_sample: stream: expected at most 255");
  require(p.settings_stride == 0 || p.settings_stride == kWeights + p.models,
          "mixture_sample: settings_stride: expected 0 or 4 + models");
  require((p.seed_stride | p.step_stride) >> 1 == 0, "mixture_sample: seed_stride, step_stride: expected 0 or 1");
  require(p.rows == 0 || (p.settings && p.tokens && p.logprobs && p.ok),
          "mixture_sample: settings, tokens, logprobs, ok: expected addresses");
  require(p.rows == 0 || p.uniforms || (p.seed && p.row_ids && p.step),
          "mixture_sample: seed, row_ids, step: expected addresses, or uniforms");
  for (int m = 0; m < p.models; ++m) {
    require(p.rows == 0 || p.logits[m].data, "mixture_sample: logits: expected an address");
  }
  return p;
}

}  // namespace nlhf
