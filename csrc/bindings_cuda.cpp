// The Python module `_cuda`: takes raw device pointers and a stream and launches kernels on the current device.
//
// Compiled by the host compiler alone; nothing of torch is included or linked, so one binary serves every torch
// version, and nothing of CUDA is called at import, so the module imports where there is no driver. Operators have
// checked shapes, dtypes and devices (core/checks.py); the numbers that kernels index with are bounded here once more.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/binding.h"
#include "mirror_descent/mirror_descent_binding.h"
#include "mixture_sample/mixture_sample_binding.h"
#include "row_uniforms/row_uniforms_binding.h"

namespace py = pybind11;

namespace {

void require_success(const char* operation, int status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(operation) + ": CUDA error " + std::to_string(status) + " (" +
                           cudaGetErrorString(static_cast<cudaError_t>(status)) + ")");
}

// Launch without Python's lock; the last argument is the CUDA stream.
template <typename Launch>
void launch(const char* operation, nlhf::Arguments& arguments, const Launch& launch_on) {
  void* cuda_stream;
  arguments >> cuda_stream;
  arguments.finish();
  const py::gil_scoped_release unlocked;
  require_success(operation, launch_on(cuda_stream));
}

void row_uniforms(const py::args& values) {
  nlhf::Arguments arguments("row_uniforms", values);
  const nlhf::RowUniforms problem = nlhf::read_row_uniforms(arguments);
  int threads;
  arguments >> threads;
  launch("row_uniforms", arguments, [&](void* stream) { return nlhf::row_uniforms_cuda(problem, threads, stream); });
}

void read_plan(nlhf::Arguments& arguments, nlhf::MirrorDescentPlan& plan) {
  arguments >> plan.parts >> plan.threads;
  nlhf::require(plan.parts >= 1 && plan.threads >= 32 && plan.threads <= 512 && plan.threads % 32 == 0,
                "mirror_descent: plan: expected parts of at least 1 and threads of 32, 64, ... 512");
}

void mirror_descent(const py::args& values) {
  nlhf::Arguments arguments("mirror_descent", values);
  bool is_double;
  arguments >> is_double;
  nlhf::MirrorDescentPlan plan;
  void* workspace;
  if (is_double) {
    const auto problem = nlhf::read_mirror_descent<double>(arguments);
    read_plan(arguments, plan);
    arguments >> workspace;
    launch("mirror_descent", arguments,
           [&](void* stream) { return nlhf::mirror_descent_f64_cuda(problem, plan, workspace, stream); });
  } else {
    const auto problem = nlhf::read_mirror_descent<float>(arguments);
    read_plan(arguments, plan);
    arguments >> workspace;
    launch("mirror_descent", arguments,
           [&](void* stream) { return nlhf::mirror_descent_f32_cuda(problem, plan, workspace, stream); });
  }
}

py::tuple mirror_descent_plan(bool is_double, int64_t games, int64_t actions) {
  nlhf::MirrorDescentPlan plan;
  require_success("mirror_descent_plan", nlhf::mirror_descent_plan(is_double, games, actions, &plan));
  return py::make_tuple(plan.parts, plan.threads);
}

void read_plan(nlhf::Arguments& arguments, nlhf::MixtureSamplePlan& plan) {
  arguments >> plan.tile_steps >> plan.part_tiles >> plan.ex2 >> plan.arrival >> plan.lookahead;
  nlhf::require(plan.tile_steps >= 1 && plan.tile_steps <= 4 && plan.part_tiles >= 1,
                "mixture_sample: plan: expected tile_steps from 1 to 4 and part_tiles of at least 1");
  const auto one_or_two = [](int number) { return number == 1 || number == 2; };
  nlhf::require(plan.ex2 >= 6 && plan.ex2 <= 8 && one_or_two(plan.arrival) && one_or_two(plan.lookahead),
                "mixture_sample: plan: expected ex2 from 6 to 8, arrival and lookahead of 1 or 2");
}

void mixture_sample(const py::args& values) {
  nlhf::Arguments arguments("mixture_sample", values);
  const nlhf::MixtureSample problem = nlhf::read_mixture_sample(arguments);
  nlhf::MixtureSamplePlan plan;
  void *workspace, *counters;
  read_plan(arguments, plan);
  arguments >> workspace >> counters;
  launch("mixture_sample", arguments, [&](void* stream) {
    return nlhf::mixture_sample_cuda(problem, plan, workspace, counters, stream);
  });
}

py::tuple mixture_sample_plan(int64_t rows, int64_t vocabulary) {
  nlhf::MixtureSamplePlan plan;
  require_success("mixture_sample_plan", nlhf::mixture_sample_plan(rows, vocabulary, &plan));
  return py::make_tuple(plan.tile_steps, plan.part_tiles, plan.ex2, plan.arrival, plan.lookahead);
}

// For benchmarks. Returns the number of parts that a row was divided into.
int64_t mixture_sample_floor(const py::args& values) {
  nlhf::Arguments arguments("mixture_sample_floor", values);
  const nlhf::MixtureSample problem = nlhf::read_mixture_sample(arguments);
  nlhf::MixtureSamplePlan plan;
  float* out;
  read_plan(arguments, plan);
  arguments >> out;
  launch("mixture_sample_floor", arguments,
         [&](void* stream) { return nlhf::mixture_sample_floor_cuda(problem, plan, out, stream); });
  return nlhf::mixture_sample_parts(problem.vocabulary, plan);
}

// The newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without a driver.
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
  module.def("row_uniforms", &row_uniforms);
  module.def("mirror_descent", &mirror_descent);
  module.def("mirror_descent_plan", &mirror_descent_plan);
  module.def("mirror_descent_workspace", &nlhf::mirror_descent_workspace);
  module.def("mixture_sample_workspace", &nlhf::mixture_sample_workspace);
  module.def("mixture_sample_counters", &nlhf::mixture_sample_counters);
  module.def("mixture_sample", &mixture_sample);
  module.def("mixture_sample_plan", &mixture_sample_plan);
  module.def("mixture_sample_floor", &mixture_sample_floor);
  module.def("build_info", &build_info);
  module.def("driver_version", &driver_version);
}
