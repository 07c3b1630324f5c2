// The Python module `_cuda`: raw device pointers and a stream in, kernels launched on the current device behind.
//
// Compiled by the host compiler alone; nothing of torch is included or linked, so one binary serves every torch
// version, and nothing of CUDA is called at import, so the module imports where there is no driver. Operators have
// checked shapes, dtypes and devices (core/checks.py); here the numbers that kernels index with are bounded once more.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "mirror_descent/mirror_descent_binding.h"
#include "mixture_sample/mixture_sample_binding.h"
#include "row_uniforms/row_uniforms_binding.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require_success(const char* operation, int status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(operation) + ": CUDA error " + std::to_string(status) + " (" +
                           cudaGetErrorString(static_cast<cudaError_t>(status)) + ")");
}

void row_uniforms(std::uintptr_t seed, int64_t seed_stride, std::uintptr_t row_ids, std::uintptr_t step,
                  int64_t step_stride, uint32_t stream_id, int64_t rows, std::uintptr_t out,
                  std::uintptr_t cuda_stream) {
  const auto problem = nlhf::row_uniforms_problem(seed, seed_stride, row_ids, step, step_stride, stream_id, rows, out);
  require_success("row_uniforms", nlhf::row_uniforms_cuda(problem, pointer<void>(cuda_stream)));
}

void mirror_descent(bool is_double, std::uintptr_t log_policy, std::uintptr_t preference,
                    std::uintptr_t log_reference, std::uintptr_t tau, int64_t tau_stride, std::uintptr_t step_sizes,
                    int64_t games, int64_t actions, int64_t iterations, int opponent, std::uintptr_t log_opponent,
                    std::uintptr_t out, std::uintptr_t cuda_stream) {
  int status;
  if (is_double) {
    const auto problem =
        nlhf::mirror_descent_problem<double>(log_policy, preference, log_reference, tau, tau_stride, step_sizes, games,
                                             actions, iterations, opponent, log_opponent, out);
    status = nlhf::mirror_descent_f64_cuda(problem, pointer<void>(cuda_stream));
  } else {
    const auto problem =
        nlhf::mirror_descent_problem<float>(log_policy, preference, log_reference, tau, tau_stride, step_sizes, games,
                                            actions, iterations, opponent, log_opponent, out);
    status = nlhf::mirror_descent_f32_cuda(problem, pointer<void>(cuda_stream));
  }
  require_success("mirror_descent", status);
}

// Takes what mixture_sample_problem takes, then the addresses of workspace and counters and the stream.
template <typename... Fields>
auto mixture_sample(nlhf::MixtureSample (*problem_of)(Fields...)) {
  return [problem_of](Fields... fields, std::uintptr_t workspace, std::uintptr_t counters,
                      std::uintptr_t cuda_stream) {
    const nlhf::MixtureSample problem = problem_of(fields...);  // reads Python objects, so before the lock is released
    const py::gil_scoped_release unlocked;
    const int status = nlhf::mixture_sample_cuda(problem, pointer<void>(workspace), pointer<void>(counters),
                                                 pointer<void>(cuda_stream));
    require_success("mixture_sample", status);
  };
}

// The newest CUDA that the driver serves, as 1000 * major + 10 * minor; 0 without a driver.
int driver_version() {
  int version = 0;
  require_success("driver_version", cudaDriverGetVersion(&version));
  return version;
}

py::dict build_info() {
  py::dict info;
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["architectures"] = NLHF_CUDA_ARCHITECTURES;
  info["compiler"] = NLHF_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels; called by nlhf_kernels.ops, not by users";
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("row_uniforms", &row_uniforms, Unlocked());
  module.def("mirror_descent", &mirror_descent, Unlocked());
  module.def("mixture_sample_workspace", &nlhf::mixture_sample_workspace);
  module.def("mixture_sample_counters", &nlhf::mixture_sample_counters);
  module.def("mixture_sample", mixture_sample(&nlhf::mixture_sample_problem));
  module.def("build_info", &build_info);
  module.def("driver_version", &driver_version);
}
