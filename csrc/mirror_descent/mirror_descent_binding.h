// The arguments of mirror_descent, in the order of ops/mirror_descent/native.py; whether Real is double comes first and
// is read by the binding.
#pragma once

#include "../common/binding.h"
#include "mirror_descent.h"

namespace nlhf {

template <typename Real>
static MirrorDescent<Real> read_mirror_descent(Arguments& arguments) {
  MirrorDescent<Real> p{};
  arguments >> p.log_policy >> p.preference >> p.log_reference >> p.tau >> p.tau_stride >> p.step_sizes >> p.games;
  arguments >> p.actions >> p.iterations >> p.opponent >> p.log_opponent >> p.out;
  require(p.games >= 0 && p.actions >= 1 && p.iterations >= 0,
          "mirror_descent: games, actions, iterations: expected at least 0, 1 and 0");
  require(p.opponent >= Opponent::policy && p.opponent <= Opponent::fixed,
          "mirror_descent: opponent: expected 0, 1 or 2");
  require(p.tau_stride >> 1 == 0, "mirror_descent: tau_stride: expected 0 or 1");
  require(p.games == 0 || (p.log_policy && p.preference && p.log_reference && p.tau && p.out),
          "mirror_descent: expected addresses");
  require(p.games == 0 || p.iterations == 0 || p.step_sizes, "mirror_descent: step_sizes: expected an address");
  require(p.games == 0 || p.log_opponent || p.opponent != Opponent::fixed,
          "mirror_descent: log_opponent: expected an address where the opponent is fixed");
  return p;
}

}  // namespace nlhf
