// The Python module `_cpu`: raw pointers in, kernels of the best level this machine runs behind.
//
// Nothing of torch is included or linked, so one binary serves every torch version. Operators have checked shapes,
// dtypes and devices (core/checks.py); here the numbers that kernels index with are bounded once more. Tuples are read
// under Python's lock, the work is done without it (common/binding.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/levels.h"
#include "decode_attention/decode_attention_binding.h"
#include "logprobs/logprobs_binding.h"
#include "mirror_descent/mirror_descent_binding.h"
#include "mixture_sample/mixture_sample_binding.h"
#include "row_uniforms/row_uniforms_binding.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void row_uniforms(std::uintptr_t seed, int64_t seed_stride, std::uintptr_t row_ids, std::uintptr_t step,
                  int64_t step_stride, uint32_t stream, int64_t rows, std::uintptr_t out, int threads) {
  const auto problem = nlhf::row_uniforms_problem(seed, seed_stride, row_ids, step, step_stride, stream, rows, out);
  nlhf::interruptibly(rows, 1, threads, [&](nlhf::Part part) { NLHF_DISPATCH(row_uniforms, problem, part, threads) });
}

void mirror_descent(bool is_double, std::uintptr_t log_policy, std::uintptr_t preference,
                    std::uintptr_t log_reference, std::uintptr_t tau, int64_t tau_stride, std::uintptr_t step_sizes,
                    int64_t games, int64_t actions, int64_t iterations, int opponent, std::uintptr_t log_opponent,
                    std::uintptr_t out, int threads) {
  const double cost = static_cast<double>(actions) * actions * (iterations + 1);
  if (is_double) {
    const auto problem =
        nlhf::mirror_descent_problem<double>(log_policy, preference, log_reference, tau, tau_stride, step_sizes, games,
                                             actions, iterations, opponent, log_opponent, out);
    nlhf::interruptibly(games, cost, threads,
                        [&](nlhf::Part part) { NLHF_DISPATCH(mirror_descent_f64, problem, part, threads) });
  } else {
    const auto problem =
        nlhf::mirror_descent_problem<float>(log_policy, preference, log_reference, tau, tau_stride, step_sizes, games,
                                            actions, iterations, opponent, log_opponent, out);
    nlhf::interruptibly(games, cost, threads,
                        [&](nlhf::Part part) { NLHF_DISPATCH(mirror_descent_f32, problem, part, threads) });
  }
}

void mixture_sample(const py::tuple& models, std::uintptr_t settings, int64_t settings_stride, bool filtered,
                    std::uintptr_t bias, int64_t bias_stride, std::uintptr_t uniforms, std::uintptr_t seed,
                    int64_t seed_stride, std::uintptr_t row_ids, std::uintptr_t step, int64_t step_stride,
                    uint32_t stream, int64_t rows, int64_t vocabulary, uint32_t wanted, std::uintptr_t tokens,
                    std::uintptr_t logprobs, std::uintptr_t ok, int threads) {
  const nlhf::MixtureSample problem = nlhf::mixture_sample_problem(
      models, settings, settings_stride, filtered, bias, bias_stride, uniforms, seed, seed_stride, row_ids, step,
      step_stride, stream, rows, vocabulary, wanted, tokens, logprobs, ok);
  const double cost = static_cast<double>(vocabulary) * problem.models * (filtered ? 8 : 2);
  nlhf::interruptibly(rows, cost, threads,
                      [&](nlhf::Part part) { NLHF_DISPATCH(mixture_sample, problem, part, threads) });
}

void logprobs(const py::tuple& policy, const py::tuple& reference, std::uintptr_t targets, std::uintptr_t beta,
              int64_t beta_stride, double temperature, uint32_t wanted, int64_t rows, int64_t vocabulary,
              std::uintptr_t values, std::uintptr_t normalizers, int threads) {
  const nlhf::Logprobs problem = nlhf::logprobs_problem(policy, reference, targets, beta, beta_stride, temperature,
                                                        wanted, rows, vocabulary, values, normalizers);
  const double cost = 2.0 * static_cast<double>(vocabulary);
  nlhf::interruptibly(rows, cost, threads, [&](nlhf::Part part) { NLHF_DISPATCH(logprobs, problem, part, threads) });
}

void logprobs_backward(const py::tuple& policy, const py::tuple& reference, std::uintptr_t targets,
                       std::uintptr_t beta, int64_t beta_stride, double temperature, uint32_t wanted, int64_t rows,
                       int64_t vocabulary, std::uintptr_t values, std::uintptr_t normalizers, std::uintptr_t upstream,
                       std::uintptr_t out, int64_t out_stride, int threads) {
  const nlhf::Logprobs forward = nlhf::logprobs_problem(policy, reference, targets, beta, beta_stride, temperature,
                                                        wanted, rows, vocabulary, values, normalizers);
  nlhf::require(rows == 0 || (upstream != 0 && out != 0), "logprobs_backward: upstream, out: expected addresses");
  const nlhf::LogprobsBackward problem{forward, pointer<const float>(upstream), pointer<void>(out), out_stride};
  const double cost = 2.0 * static_cast<double>(vocabulary);
  nlhf::interruptibly(rows, cost, threads,
                      [&](nlhf::Part part) { NLHF_DISPATCH(logprobs_backward, problem, part, threads) });
}

void decode_attention(int dtype, const std::array<std::uintptr_t, 3>& tensors,
                      const std::array<int64_t, 3>& key_strides, const std::array<int64_t, 3>& value_strides,
                      std::uintptr_t starts, std::uintptr_t ends, std::uintptr_t sinks,
                      const std::array<int64_t, 7>& sizes, float scale, float softcap, std::uintptr_t out,
                      int threads) {
  const nlhf::DecodeAttention problem = nlhf::decode_attention_problem(
      dtype, tensors, key_strides, value_strides, starts, ends, sinks, sizes, scale, softcap, out);
  const double cost = static_cast<double>(problem.heads) * problem.positions * (problem.dim + problem.value_dim);
  nlhf::interruptibly(problem.rows, cost, threads,
                      [&](nlhf::Part part) { NLHF_DISPATCH(decode_attention, problem, part, threads) });
}

const char* level_name(nlhf::Level level) {
  switch (level) {
    case nlhf::Level::avx512: return "avx512";
    case nlhf::Level::avx2: return "avx2";
    default: return "baseline";
  }
}

void set_level_cap(const std::string& name) {
  for (const nlhf::Level level : {nlhf::Level::baseline, nlhf::Level::avx2, nlhf::Level::avx512}) {
    if (name == level_name(level)) return nlhf::cap_level(level);
  }
  throw py::value_error("level: expected baseline, avx2 or avx512, got '" + name + "'");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = NLHF_COMPILER;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(NLHF_X86_LEVELS)
  info["levels"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["levels"] = py::make_tuple("baseline");
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "C++ kernels for the CPU; called by nlhf_kernels.ops, not by users";
  module.def("row_uniforms", &row_uniforms);
  module.def("mirror_descent", &mirror_descent);
  module.def("mixture_sample", &mixture_sample);
  module.def("logprobs", &logprobs);
  module.def("logprobs_backward", &logprobs_backward);
  module.def("decode_attention", &decode_attention);
  module.def("build_info", &build_info);
  module.def("best_level", [] { return level_name(nlhf::best_level()); });
  module.def("active_level", [] { return level_name(nlhf::active_level()); });
  module.def("set_level_cap", &set_level_cap, py::arg("level"));
}
