// The arguments of mirror_descent as they come from Python (ops/mirror_descent/native.py), for both bindings.
#pragma once

#include "mirror_descent.h"

namespace nlhf {

template <typename Real>
static MirrorDescent<Real> mirror_descent_problem(std::uintptr_t log_policy, std::uintptr_t preference,
                                                  std::uintptr_t log_reference, std::uintptr_t tau,
                                                  int64_t tau_stride, std::uintptr_t step_sizes, int64_t games,
                                                  int64_t actions, int64_t iterations, int opponent,
                                                  std::uintptr_t log_opponent, std::uintptr_t out) {
  MirrorDescent<Real> problem{};
  problem.log_policy = reinterpret_cast<const Real*>(log_policy);
  problem.preference = reinterpret_cast<const Real*>(preference);
  problem.log_reference = reinterpret_cast<const Real*>(log_reference);
  problem.tau = reinterpret_cast<const Real*>(tau);
  problem.tau_stride = tau_stride;
  problem.step_sizes = reinterpret_cast<const Real*>(step_sizes);
  problem.games = games;
  problem.actions = actions;
  problem.iterations = iterations;
  problem.opponent = static_cast<Opponent>(opponent);
  problem.log_opponent = reinterpret_cast<const Real*>(log_opponent);
  problem.out = reinterpret_cast<Real*>(out);
  return problem;
}

}  // namespace nlhf
