// The Python module `_cpu`: takes raw pointers and runs the kernels at the best level of this machine.
//
// Nothing of torch is included or linked, so one binary serves every torch version. Operators have checked shapes,
// dtypes and devices (core/checks.py); the numbers that kernels index with are bounded here once more. Arguments are
// read while Python's lock is held, kernels run without it (common/binding.h).
#include <pybind11/pybind11.h>

#include "common/binding.h"
#include "common/known_calls.h"
#include "common/levels.h"
#include "decode_attention/decode_attention_binding.h"
#include "logprobs/logprobs_binding.h"
#include "mirror_descent/mirror_descent_binding.h"
#include "mixture_sample/mixture_sample_binding.h"
#include "row_uniforms/row_uniforms_binding.h"

namespace py = pybind11;

namespace {

// Every operation's last argument is the number of OpenMP threads.
int read_threads(nlhf::Arguments& arguments) {
  int threads;
  arguments >> threads;
  arguments.finish();
  return threads;
}

void row_uniforms(const py::args& values) {
  nlhf::Arguments arguments("row_uniforms", values);
  const nlhf::RowUniforms problem = nlhf::read_row_uniforms(arguments);
  const int threads = read_threads(arguments);
  nlhf::run_interruptible(problem.rows, 1, threads,
                          [&](nlhf::Part part) { NLHF_DISPATCH(row_uniforms, problem, part, threads) });
}

template <typename Real>
double game_cost(const nlhf::MirrorDescent<Real>& problem) {
  return static_cast<double>(problem.actions) * problem.actions * (problem.iterations + 1);
}

void mirror_descent(const py::args& values) {
  nlhf::Arguments arguments("mirror_descent", values);
  bool is_double;
  arguments >> is_double;
  if (is_double) {
    const auto problem = nlhf::read_mirror_descent<double>(arguments);
    const int threads = read_threads(arguments);
    nlhf::run_interruptible(problem.games, game_cost(problem), threads,
                            [&](nlhf::Part part) { NLHF_DISPATCH(mirror_descent_f64, problem, part, threads) });
  } else {
    const auto problem = nlhf::read_mirror_descent<float>(arguments);
    const int threads = read_threads(arguments);
    nlhf::run_interruptible(problem.games, game_cost(problem), threads,
                            [&](nlhf::Part part) { NLHF_DISPATCH(mirror_descent_f32, problem, part, threads) });
  }
}

void mixture_sample(const py::args& values) {
  nlhf::Arguments arguments("mixture_sample", values);
  const nlhf::MixtureSample problem = nlhf::read_mixture_sample(arguments);
  const int threads = read_threads(arguments);
  const double cost = static_cast<double>(problem.vocabulary) * problem.models * (problem.filtered ? 8 : 2);
  nlhf::run_interruptible(problem.rows, cost, threads,
                          [&](nlhf::Part part) { NLHF_DISPATCH(mixture_sample, problem, part, threads) });
}

void logprobs(const py::args& values) {
  nlhf::Arguments arguments("logprobs", values);
  const nlhf::Logprobs problem = nlhf::read_logprobs(arguments);
  const int threads = read_threads(arguments);
  nlhf::run_interruptible(problem.rows, 2.0 * static_cast<double>(problem.vocabulary), threads,
                          [&](nlhf::Part part) { NLHF_DISPATCH(logprobs, problem, part, threads) });
}

void logprobs_backward(const py::args& values) {
  nlhf::Arguments arguments("logprobs_backward", values);
  const nlhf::LogprobsBackward problem = nlhf::read_logprobs_backward(arguments);
  const int threads = read_threads(arguments);
  nlhf::run_interruptible(problem.forward.rows, 2.0 * static_cast<double>(problem.forward.vocabulary), threads,
                          [&](nlhf::Part part) { NLHF_DISPATCH(logprobs_backward, problem, part, threads) });
}

void decode_attention(const py::args& values) {
  nlhf::Arguments arguments("decode_attention", values);
  const nlhf::DecodeAttention problem = nlhf::read_decode_attention(arguments);
  const int threads = read_threads(arguments);
  const double cost = static_cast<double>(problem.heads) * problem.positions * (problem.dim + problem.value_dim);
  nlhf::run_interruptible(problem.rows, cost, threads,
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
  if (NLHF_SANITIZE[0] != '\0') info["sanitizers"] = NLHF_SANITIZE;
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
  nlhf::bind_known_calls(module);
  module.def("build_info", &build_info);
  module.def("best_level", [] { return level_name(nlhf::best_level()); });
  module.def("active_level", [] { return level_name(nlhf::active_level()); });
  module.def("set_level_cap", &set_level_cap, py::arg("level"));
}
