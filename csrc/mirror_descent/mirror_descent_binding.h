// The arguments of mirror_descent as they come from Python (ops/mirror_descent/native.py), for both bindings.
#pragma once

#include "../common/binding.h"
#include "mirror_descent.h"

namespace nlhf {

template <typename Real>
static MirrorDescent<Real> mirror_descent_problem(std::uintptr_t log_policy, std::uintptr_t preference,
                                                  std::uintptr_t log_reference, std::uintptr_t tau,
                                                  int64_t tau_stride, std::uintptr_t step_sizes, int64_t games,
                                                  int64_t actions, int64_t iterations, int opponent,
                                                  std::uintptr_t log_opponent, std::uintptr_t out) {
  require(games >= 0 && actions >= 1 && iterations >= 0,
          "mirror_descent: games, actions, iterations: expected at least 0, 1 and 0");
  require(opponent >= 0 && opponent <= static_cast<int>(Opponent::given),
          "mirror_descent: opponent: expected 0, 1 or 2");
  require(tau_stride >> 1 == 0, "mirror_descent: tau_stride: expected 0 or 1");
  require(games == 0 || (log_policy != 0 && preference != 0 && log_reference != 0 && tau != 0 && out != 0),
          "mirror_descent: expected addresses");
  require(games == 0 || iterations == 0 || step_sizes != 0, "mirror_descent: step_sizes: expected an address");
  require(games == 0 || log_opponent != 0 || opponent != static_cast<int>(Opponent::given),
          "mirror_descent: log_opponent: expected an address where the opponent is given");
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
