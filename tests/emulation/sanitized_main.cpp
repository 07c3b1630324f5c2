// Runs the operations over small shapes in heap buffers of exactly their size, so that AddressSanitizer and
// UndefinedBehaviorSanitizer check every access. A program of its own, because a sanitizer must be loaded before
// everything else. Results only have to be probabilities here; other tests check their values.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/mirror_descent/mirror_descent.h"
#include "../../csrc/mixture_sample/mixture_sample.h"
#include "../../csrc/row_uniforms/row_uniforms.h"

extern "C" void emulation_set_device(int device);
extern "C" void emulation_set_seed(uint64_t seed);

namespace {

int run_uniforms(int64_t rows) {
  const std::vector<int64_t> seed(1, -5), ids(rows, int64_t{1} << 40), steps(rows, 3);
  std::vector<double> out(rows);
  const nlhf::RowUniforms problem{seed.data(), 0, ids.data(), steps.data(), 1, 2, rows, out.data()};
  return nlhf::row_uniforms_cuda(problem, 256, nullptr);
}

using Plan = nlhf::MirrorDescentPlan;
int launch(const nlhf::MirrorDescent<float>& p, Plan plan, void* workspace) {
  return nlhf::mirror_descent_f32_cuda(p, plan, workspace, nullptr);
}
int launch(const nlhf::MirrorDescent<double>& p, Plan plan, void* workspace) {
  return nlhf::mirror_descent_f64_cuda(p, plan, workspace, nullptr);
}

template <typename Real>
int run_games(int64_t games, int64_t actions, int64_t iterations, bool opponent_is_mixture, Plan plan = {1, 512}) {
  std::mt19937 random(1);
  const auto vector = [&](int64_t size) {
    std::vector<Real> values(size);
    for (Real& value : values) value = static_cast<Real>(random() % 1000) / 1000;
    return values;
  };
  const auto policy = vector(games * actions), reference = vector(games * actions);
  const auto preference = vector(games * actions * actions), tau = vector(1), steps = vector(iterations);
  std::vector<Real> out(games * actions, Real(NAN));
  const nlhf::MirrorDescent<Real> problem{policy.data(), preference.data(), reference.data(), tau.data(), 0,
                                          steps.data(), games, actions, iterations,
                                          opponent_is_mixture ? nlhf::Opponent::mixture : nlhf::Opponent::policy,
                                          nullptr, out.data()};
  std::vector<unsigned char> workspace(
      nlhf::mirror_descent_workspace(sizeof(Real) == sizeof(double), games, actions, plan.parts), 0xFF);
  const int status = launch(problem, plan, workspace.data());
  if (status != 0) return status;
  for (int64_t game = 0; game < games; ++game) {
    double total = 0;
    for (int64_t a = 0; a < actions; ++a) total += std::exp(static_cast<double>(out[game * actions + a]));
    if (!(std::fabs(total - 1) < 1e-4)) return -1;
  }
  return 0;
}

enum class Dtypes { f32, mixed, bf16 };

// Two models in buffers of exactly their size; logits take few values, so that filters see ties. Models of bfloat16 have
// no bias, and their plan looks ahead: unfiltered, they run the versions of the loop for plain rows.
int run_sampler(int64_t rows, int64_t vocabulary, bool filtered, Dtypes dtypes) {
  std::mt19937 random(2);
  // Logits are read in blocks of 16 bytes; the last one may extend beyond the tensor.
  const int64_t logits = (rows * vocabulary + 7) / 8 * 8;
  std::vector<float> policy(logits), reference(logits), logprobs(3 * rows);
  std::vector<uint16_t> narrow(logits);
  for (float& logit : policy) logit = static_cast<float>(random() % 40) / 4;
  for (float& logit : reference) logit = static_cast<float>(random() % 40) / 4;
  for (uint16_t& logit : narrow) logit = static_cast<uint16_t>(0x3F80 + random() % 64);
  const std::vector<float> settings{0.9f, 50.0f, 0.9f, 0.01f, 0.7f, 0.3f}, bias(vocabulary, 0.5f);
  const std::vector<double> uniforms(rows, 1.0);
  std::vector<int64_t> tokens(rows);
  const auto ok = std::make_unique<bool[]>(rows);
  std::vector<unsigned char> workspace(nlhf::mixture_sample_workspace(rows, vocabulary, 2, filtered), 0xFF);
  nlhf::MixtureSample problem{};
  problem.models = 2;
  problem.logits[0] = {policy.data(), nlhf::DType::f32, vocabulary};
  problem.logits[1] = {reference.data(), nlhf::DType::f32, vocabulary};
  if (dtypes != Dtypes::f32) problem.logits[1] = {narrow.data(), nlhf::DType::bf16, vocabulary};
  if (dtypes == Dtypes::bf16) problem.logits[0] = problem.logits[1];
  problem.settings = settings.data(), problem.filtered = filtered;
  problem.bias = dtypes == Dtypes::bf16 ? nullptr : bias.data(), problem.uniforms = uniforms.data();
  problem.rows = rows, problem.vocabulary = vocabulary, problem.logprob_mask = 7;
  problem.tokens = tokens.data(), problem.logprobs = logprobs.data(), problem.ok = ok.get();
  nlhf::MixtureSamplePlan plan;
  if (nlhf::mixture_sample_plan(rows, vocabulary, &plan) != 0) return -1;
  if (dtypes == Dtypes::bf16) plan.ex2 = 7, plan.lookahead = 2;
  if (dtypes != Dtypes::mixed) {
    std::vector<float> highest(rows * 2 * nlhf::mixture_sample_parts(vocabulary, plan));
    if (nlhf::mixture_sample_floor_cuda(problem, plan, highest.data(), nullptr) != 0) return -1;
  }
  const int status = nlhf::mixture_sample_cuda(problem, plan, workspace.data(), nullptr, nullptr);
  if (status != 0) return status;
  for (int64_t row = 0; row < rows; ++row) {
    if (!ok[row] || tokens[row] < 0 || tokens[row] >= vocabulary || !(logprobs[2 * rows + row] <= 0)) return -1;
  }
  return 0;
}

}  // namespace

int main() {
  for (const int device : {0, 1}) {
    emulation_set_device(device);
    emulation_set_seed(7 + device);
    for (const int64_t rows : {0, 1, 255, 257}) {
      if (run_uniforms(rows) != 0) return std::printf("row_uniforms failed with %d rows\n", int(rows)), 1;
    }
    for (const int64_t actions : {1, 31, 33, 64, 127, 130, 300}) {
      int status = run_games<float>(2, actions, 2, actions % 2) + run_games<double>(2, actions, 2, actions % 2);
      status |= run_games<float>(2, actions, 3, actions % 2, {3, 64}) | run_games<double>(1, actions, 2, false, {7, 96});
      if (status != 0) return std::printf("mirror_descent failed with %d actions\n", int(actions)), 1;
    }
    if (run_games<float>(70, 3, 2, true) != 0) return std::printf("mirror_descent failed with 70 games\n"), 1;
  }
  for (const int64_t vocabulary : {1, 7, 513, 1024, 9001}) {
    for (const int device : {0, 1}) {
      emulation_set_device(device);
      int status = 0;
      for (const bool filtered : {false, true}) {
        for (const Dtypes dtypes : {Dtypes::f32, Dtypes::mixed, Dtypes::bf16}) {
          status |= run_sampler(2, vocabulary, filtered, dtypes);
        }
      }
      if (status != 0) return std::printf("mixture_sample failed with %d tokens\n", int(vocabulary)), 1;
    }
  }
  std::puts("clean");
  return 0;
}
