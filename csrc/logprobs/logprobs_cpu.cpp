// logprobs on the CPU: each thread takes one row at a time. Forward reads the logits once, backward reads them once and
// writes once. Both are bound by memory, so loops over a tile prefetch the next one. Equation numbers are those of the
// op's README.md.
#include "logprobs.h"

#include <cfloat>
#include <cmath>

#include "scores.h"
#include "sums.h"

namespace nlhf {
namespace NLHF_LEVEL {
namespace {

struct Scratch {
  alignas(64) float policy[kTile];
  alignas(64) float reference[kTile];
  alignas(64) float mixture[kTile];
  alignas(64) float gradient[kTile];
};

float inverse_of(double temperature) {
  const float inverse = static_cast<float>(1 / temperature);
  return inverse < FLT_MAX ? inverse : FLT_MAX;  // 0 * inf is NaN
}

// A row's inputs and the outputs requested.
struct RowInputs {
  ScoreRow policy, reference;
  bool has_reference;
  float beta;
  bool has_mixture;
  uint32_t output_mask;
  double temperature;
  float inverse;
  int64_t vocabulary;
};

RowInputs row_inputs(const Logprobs& p, int64_t row) {
  RowInputs inputs{};
  inputs.policy = score_row(p.policy, row);
  inputs.has_reference = p.reference.data != nullptr;
  if (inputs.has_reference) inputs.reference = score_row(p.reference, row);
  inputs.has_mixture = inputs.has_reference && (p.output_mask & kWithMixture) != 0;
  if (inputs.has_mixture) inputs.beta = p.beta[row * p.beta_stride];
  inputs.output_mask = p.output_mask;
  inputs.temperature = p.temperature;
  inputs.inverse = inverse_of(p.temperature);
  inputs.vocabulary = p.vocabulary;
  return inputs;
}

RowSums sums_of_row(const RowInputs& inputs, Scratch& scratch) {
  const bool entropy = (inputs.output_mask & kWithEntropy) != 0;
  const bool kl = inputs.has_reference && (inputs.output_mask & kWithKl) != 0;
  RowSums sums;
  for (int64_t first = 0; first < inputs.vocabulary; first += kTile) {
    const int64_t count = inputs.vocabulary - first < kTile ? inputs.vocabulary - first : kTile;
    const ScoreTile u = load_scores(inputs.policy, first, count, scratch.policy);
    const ScoreTile v = inputs.has_reference ? load_scores(inputs.reference, first, count, scratch.reference) : u;
    if (kl) {
      add_moments<true>(sums, u, v, inputs.temperature, inputs.inverse);
    } else {
      if (entropy) {
        add_moments<false>(sums, u, u, inputs.temperature, inputs.inverse);
      } else {
        add_tile(sums.policy, u, inputs.temperature, inputs.inverse);
      }
      if (inputs.has_reference) add_tile(sums.reference, v, inputs.temperature, inputs.inverse);
    }
    if (inputs.has_mixture) {
      const ScoreTile m = load_mixture(u, v, inputs.beta, scratch.mixture);
      add_tile(sums.mixture, m, inputs.temperature, inputs.inverse);
    }
  }
  return sums;
}

// NaN for a row of -inf only, which has no distribution, as in PyTorch's softmax.
double log_sum(const Series& series) { return series.top == -INFINITY ? NAN : std::log(series.sum); }

double log_probability(float score, const Series& series, double temperature) {
  return (static_cast<double>(score) - series.top) / temperature - log_sum(series);
}

void forward_row(const Logprobs& p, int64_t row, Scratch& scratch) {
  const int64_t target = p.targets[row];
  const bool inside = target >= 0 && target < p.vocabulary;
  double values[kOutputs] = {}, normalizers[kNormalizers] = {};
  if (inside) {
    const RowInputs inputs = row_inputs(p, row);
    const RowSums sums = sums_of_row(inputs, scratch);
    const auto store_normalizers = [&](int first, const Series& series) {
      normalizers[first + 1] = log_sum(series);
      normalizers[first] = normalizers[first + 1] == normalizers[first + 1] ? series.top : NAN;  // NaN: all of the row
    };
    const float score = score_at(inputs.policy, target);
    store_normalizers(kPolicyNormalizers, sums.policy);
    values[kPolicy] = log_probability(score, sums.policy, p.temperature);
    if ((p.output_mask & kWithEntropy) != 0) values[kEntropy] = log_sum(sums.policy) - sums.moment / sums.policy.sum;
    if (inputs.has_reference) {
      store_normalizers(kReferenceNormalizers, sums.reference);
      values[kReference] = log_probability(score_at(inputs.reference, target), sums.reference, p.temperature);
    }
    if (inputs.has_reference && (p.output_mask & kWithKl) != 0) {
      const double kl = sums.gap / sums.policy.sum - log_sum(sums.policy) + log_sum(sums.reference);
      values[kKl] = kl < 0 ? 0 : kl;
    }
    if (inputs.has_mixture) {
      const float mixture = mixture_at(score, score_at(inputs.reference, target), inputs.beta);
      store_normalizers(kMixtureNormalizers, sums.mixture);
      values[kMixture] = log_probability(mixture, sums.mixture, p.temperature);
    }
  } else if (target != kIgnoredTarget) {
    for (double& value : values) value = NAN;
    for (double& normalizer : normalizers) normalizer = NAN;
  }
  for (int i = 0; i < kOutputs; ++i) p.values[i * p.rows + row] = static_cast<float>(values[i]);
  for (int i = 0; i < kNormalizers; ++i) p.normalizers[i * p.rows + row] = static_cast<float>(normalizers[i]);
}

// The gradient of a row with respect to its scores u, as backward computes it: with a and b as in RowSums,
//   exp(a) (constant + by_policy a + by_reference b) - mixture exp((m - top) / temperature), and `target` on top there.
// The factors include the sums of exponentials and 1 / temperature.
struct Gradient {
  float tops[3];  // of policy, reference, mixture
  float constant, by_policy, by_reference, mixture, target;
};

// Equations 5 to 8 with their products expanded. A factor whose upstream is 0 is 0, also beside infinity and NaN.
Gradient gradient_of(const LogprobsBackward& p, const RowInputs& inputs, int64_t row) {
  const Logprobs& f = p.forward;
  const auto value = [&](Output output) { return static_cast<double>(f.values[output * f.rows + row]); };
  const auto normalizer = [&](int which) { return static_cast<double>(f.normalizers[which * f.rows + row]); };
  const auto upstream = [&](Output output, bool requested) {
    return requested ? static_cast<double>(p.upstream[output * f.rows + row]) : 0.0;
  };
  const double policy = upstream(kPolicy, true);
  const double entropy = upstream(kEntropy, (f.output_mask & kWithEntropy) != 0);
  const double kl = upstream(kKl, inputs.has_reference && (f.output_mask & kWithKl) != 0);
  const double of_mixture = upstream(kMixture, inputs.has_mixture);
  const double mixture = of_mixture * (1 - static_cast<double>(inputs.beta));
  const double log_sum = normalizer(kPolicyNormalizers + 1);
  double constant = -policy;
  if (entropy != 0) constant -= entropy * (value(kEntropy) - log_sum);
  if (kl != 0) constant += kl * (normalizer(kReferenceNormalizers + 1) - log_sum - value(kKl));
  const double scale = 1 / inputs.temperature, p_scale = scale * std::exp(-log_sum);
  Gradient gradient{};
  for (int i = 0; i < 3; ++i) gradient.tops[i] = static_cast<float>(normalizer(2 * i));
  gradient.constant = static_cast<float>(constant * p_scale);
  if (kl != entropy) gradient.by_policy = static_cast<float>((kl - entropy) * p_scale);  // 0 also beside NaN,
  if (kl != 0) gradient.by_reference = static_cast<float>(-kl * p_scale);                // and not read then
  const double mixture_sum = normalizer(kMixtureNormalizers + 1);
  if (of_mixture != 0) gradient.mixture = static_cast<float>(mixture * scale * std::exp(-mixture_sum));
  gradient.target = static_cast<float>((policy + mixture) * scale);
  return gradient;
}

// noexcept from here on: where g++ cannot deduce it, its exception tables contain a symbol that the linker would merge
// across levels (tests/test_build.py).

// out = constant * exp(a)
void policy_gradient(const Gradient& g, const ScoreTile& u, float inverse, float* out) noexcept {
  const Floats top = broadcast(g.tops[0]);
  for (int64_t i = 0; i < padded(u.count); i += kLanes) {
    fetch_ahead(u, i);
    store(out + i, exp_nonpositive((load(u.scores + i) - top) * inverse) * g.constant);
  }
}

void moment_gradient(const Gradient& g, const ScoreTile& u, const ScoreTile& v, float inverse, float* out) noexcept {
  const Floats top_u = broadcast(g.tops[0]), top_v = broadcast(g.tops[1]);
  for (int64_t i = 0; i < padded(u.count); i += kLanes) {
    fetch_ahead(u, i);
    fetch_ahead(v, i);
    const Floats a = (load(u.scores + i) - top_u) * inverse, b = (load(v.scores + i) - top_v) * inverse;
    const Floats mass = exp_nonpositive(a);
    store(out + i, mass == 0.0f ? Floats{} : mass * (g.constant + g.by_policy * a + g.by_reference * b));
  }
}

void add_mixture_gradient(const Gradient& g, const ScoreTile& m, float inverse, float* out) noexcept {
  const Floats top = broadcast(g.tops[2]);
  for (int64_t i = 0; i < padded(m.count); i += kLanes) {
    store(out + i, load(out + i) - exp_nonpositive((load(m.scores + i) - top) * inverse) * g.mixture);
  }
}

// Turn the gradient by the scores into the gradient by the logits (equation 1).
void apply_slope(const ScoreRow& row, const ScoreTile& u, float* out) noexcept {
  const float inverse = row.softcap == 0 ? 0.0f : 1 / row.softcap;
  for (int64_t i = 0; i < padded(u.count); i += kLanes) {
    const Floats score = load(u.scores + i);
    const Floats saturation = score == -INFINITY ? Floats{} : score * inverse;  // no softcap bounds it: -inf * 0 is NaN
    store(out + i, load(out + i) * (1.0f - saturation * saturation) * row.scale);
  }
}

// Compute a tile's gradient in scratch and store it when it is complete: `out` may be the logits themselves.
void gradient_row(const RowInputs& inputs, const Gradient& g, int64_t target, char* out, Scratch& scratch) noexcept {
  const bool moments = g.by_policy != 0 || g.by_reference != 0;
  const bool sloped = inputs.policy.scale != 1 || inputs.policy.softcap != 0;
  const bool reads_reference = g.by_reference != 0 || (g.mixture != 0 && inputs.beta != 0);
  for (int64_t first = 0; first < inputs.vocabulary; first += kTile) {
    const int64_t count = inputs.vocabulary - first < kTile ? inputs.vocabulary - first : kTile;
    const ScoreTile u = load_scores(inputs.policy, first, count, scratch.policy);
    const ScoreTile v = reads_reference ? load_scores(inputs.reference, first, count, scratch.reference) : u;
    if (moments) {
      moment_gradient(g, u, v, inputs.inverse, scratch.gradient);
    } else {
      policy_gradient(g, u, inputs.inverse, scratch.gradient);
    }
    if (g.mixture != 0) {
      const ScoreTile m = load_mixture(u, v, inputs.beta, scratch.mixture);
      add_mixture_gradient(g, m, inputs.inverse, scratch.gradient);
    }
    if (target >= first && target < first + count) scratch.gradient[target - first] += g.target;
    if (sloped) apply_slope(inputs.policy, u, scratch.gradient);
    store_gradients(scratch.gradient, count, inputs.policy.dtype, out + first * bytes_of(inputs.policy.dtype));
  }
}

bool has_upstream(const LogprobsBackward& p, int64_t row) {
  for (int i = 0; i < kOutputs; ++i) {
    if (i != kReference && p.upstream[i * p.forward.rows + row] != 0) return true;
  }
  return false;
}

void backward_row(const LogprobsBackward& p, int64_t row, Scratch& scratch) {
  const Logprobs& f = p.forward;
  const int64_t target = f.targets[row], bytes = bytes_of(f.policy.dtype);
  char* out = static_cast<char*>(p.out) + row * p.out_stride * bytes;
  if (target == kIgnoredTarget || !has_upstream(p, row)) {
    std::memset(out, 0, f.vocabulary * bytes);
    return;
  }
  const RowInputs inputs = row_inputs(f, row);
  gradient_row(inputs, gradient_of(p, inputs, row), target, out, scratch);
}

template <auto one_row, typename Problem>
void over_rows(const Problem& problem, Part rows, int64_t vocabulary, int threads) {
  // Starting threads takes microseconds, about as long as this many exponentials on one thread.
  const bool worth_sharing = rows.count() * vocabulary > (int64_t{1} << 15);
  // Ignored rows may come in runs, so the schedule is dynamic; short rows are scheduled eight at a time.
  const int64_t chunk = vocabulary < 4096 ? 8 : 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && rows.count() > 1 && worth_sharing)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t row = rows.first; row < rows.last; ++row) one_row(problem, row, scratch);
  }
}

}  // namespace

void logprobs(const Logprobs& problem, Part rows, int threads) {
  over_rows<forward_row>(problem, rows, problem.vocabulary, threads);
}

void logprobs_backward(const LogprobsBackward& problem, Part rows, int threads) {
  over_rows<backward_row>(problem, rows, problem.forward.vocabulary, threads);
}

}  // namespace NLHF_LEVEL
}  // namespace nlhf
