// Runs every CPU kernel on four OpenMP threads, from two threads of the caller at once, as Python threads may call them;
// results must equal those on one thread, bit for bit. For ThreadSanitizer: `python -m tests.support.sanitized --threads`.
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/decode_attention/decode_attention.h"
#include "../../csrc/logprobs/logprobs.h"
#include "../../csrc/mirror_descent/mirror_descent.h"
#include "../../csrc/mixture_sample/mixture_sample.h"
#include "../../csrc/row_uniforms/row_uniforms.h"

namespace {

using Bytes = std::vector<unsigned char>;

template <typename T>
void append(Bytes& bytes, const T* values, size_t count) {
  const auto* from = reinterpret_cast<const unsigned char*>(values);
  bytes.insert(bytes.end(), from, from + count * sizeof(T));
}

std::vector<float> randoms(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random() % 1000) / 200 - 2;
  return values;
}

Bytes row_uniforms(int threads) {
  const int64_t rows = 9000;
  std::vector<int64_t> ids(rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = i;
  const int64_t seed = 7, step = 3;
  std::vector<double> out(rows);
  const nlhf::RowUniforms problem{&seed, 0, ids.data(), &step, 0, 1, rows, out.data()};
  NLHF_DISPATCH(row_uniforms, problem, (nlhf::Part{0, rows}), threads);
  Bytes bytes;
  append(bytes, out.data(), out.size());
  return bytes;
}

// Few rows go over the tiles of a row, many rows over the rows; with and without filters.
Bytes mixture_sample(int64_t rows, bool filtered, int threads) {
  const int64_t vocabulary = 40000;
  const std::vector<float> policy = randoms(rows * vocabulary, 1), reference = randoms(rows * vocabulary, 2);
  const std::vector<float> settings{0.9f, 50.0f, 0.9f, 0.01f, 0.7f, 0.3f};
  const std::vector<double> uniforms(rows, 0.4);
  std::vector<int64_t> tokens(rows);
  std::vector<float> logprobs(3 * rows);
  const auto ok = std::make_unique<bool[]>(rows);
  nlhf::MixtureSample problem{};
  problem.models = 2;
  problem.logits[0] = {policy.data(), nlhf::DType::f32, vocabulary};
  problem.logits[1] = {reference.data(), nlhf::DType::f32, vocabulary};
  problem.settings = settings.data(), problem.filtered = filtered, problem.uniforms = uniforms.data();
  problem.rows = rows, problem.vocabulary = vocabulary, problem.logprob_mask = 7;
  problem.tokens = tokens.data(), problem.logprobs = logprobs.data(), problem.ok = ok.get();
  NLHF_DISPATCH(mixture_sample, problem, (nlhf::Part{0, rows}), threads);
  Bytes bytes;
  append(bytes, tokens.data(), tokens.size());
  append(bytes, logprobs.data(), logprobs.size());
  return bytes;
}

Bytes logprobs(int threads) {
  const int64_t rows = 12, vocabulary = 9000;
  std::vector<float> policy = randoms(rows * vocabulary, 3);
  const std::vector<float> reference = randoms(rows * vocabulary, 4), upstream(nlhf::kOutputs * rows, 0.5f);
  std::vector<int64_t> targets(rows, 5);
  targets[3] = nlhf::kIgnoredTarget;
  const float beta = 0.3f;
  std::vector<float> values(nlhf::kOutputs * rows), normalizers(nlhf::kNormalizers * rows);
  const uint32_t all = nlhf::kWithEntropy | nlhf::kWithKl | nlhf::kWithMixture;
  const nlhf::Logprobs problem{{policy.data(), nlhf::DType::f32, vocabulary, 1, 0},
                               {reference.data(), nlhf::DType::f32, vocabulary, 1, 0},
                               targets.data(), &beta, 0, 1.0, all, rows, vocabulary, values.data(), normalizers.data()};
  NLHF_DISPATCH(logprobs, problem, (nlhf::Part{0, rows}), threads);
  const nlhf::LogprobsBackward backward{problem, upstream.data(), policy.data(), vocabulary};  // over the logits
  NLHF_DISPATCH(logprobs_backward, backward, (nlhf::Part{0, rows}), threads);
  Bytes bytes;
  append(bytes, values.data(), values.size());
  append(bytes, policy.data(), policy.size());
  return bytes;
}

Bytes mirror_descent(int threads) {
  const int64_t games = 9, actions = 40, iterations = 12;
  const std::vector<float> policy = randoms(games * actions, 5), reference = randoms(games * actions, 6);
  const std::vector<float> preference = randoms(games * actions * actions, 7), steps(iterations, 0.3f);
  const float tau = 0.1f;
  std::vector<float> out(games * actions);
  const nlhf::MirrorDescent<float> problem{policy.data(), preference.data(), reference.data(), &tau, 0, steps.data(),
                                           games, actions, iterations, nlhf::Opponent::mixture, nullptr, out.data()};
  NLHF_DISPATCH(mirror_descent_f32, problem, (nlhf::Part{0, games}), threads);
  Bytes bytes;
  append(bytes, out.data(), out.size());
  return bytes;
}

Bytes decode_attention(int threads) {
  const int64_t rows = 3, heads = 8, kv_heads = 2, positions = 150, dim = 64;
  const std::vector<float> query = randoms(rows * heads * dim, 8), cache = randoms(rows * kv_heads * positions * dim, 9);
  const std::vector<int64_t> ends{150, 17, 90};
  std::vector<float> out(rows * heads * dim);
  nlhf::DecodeAttention problem{};
  problem.dtype = nlhf::DType::f32;
  problem.query = query.data();
  problem.keys = problem.values = {cache.data(), kv_heads * positions * dim, positions * dim, dim};
  problem.ends = ends.data();
  problem.rows = rows, problem.heads = heads, problem.kv_heads = kv_heads, problem.positions = positions;
  problem.dim = problem.value_dim = dim, problem.window = positions, problem.scale = 0.1f, problem.out = out.data();
  NLHF_DISPATCH(decode_attention, problem, (nlhf::Part{0, rows}), threads);
  Bytes bytes;
  append(bytes, out.data(), out.size());
  return bytes;
}

std::vector<Bytes> all(int threads) {
  return {row_uniforms(threads),           mixture_sample(2, false, threads), mixture_sample(2, true, threads),
          mixture_sample(9, false, threads), mixture_sample(9, true, threads),  logprobs(threads),
          mirror_descent(threads),         decode_attention(threads)};
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<Bytes> expected = all(1);
  std::atomic<int> wrong{0};
  const auto work = [&] {
    for (int round = 0; round < 3; ++round) wrong += all(4) != expected;
  };
  std::thread first(work), second(work);
  for (const nlhf::Level level : {nlhf::Level::baseline, nlhf::Level::avx512}) nlhf::cap_level(level);  // while they run
  first.join();
  second.join();
  if (wrong > 0) return std::printf("%s: %d rounds differ from one thread\n", arguments[0], wrong.load()), 1;
  std::puts("clean");
  return 0;
}
