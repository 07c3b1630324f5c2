// What the bindings share: bounds on the numbers that kernels index with, and calls that Ctrl-C can end.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "levels.h"

namespace nlhf {

// Operators check their arguments (core/checks.py); this is for calls of a module's function itself. Python gets a
// ValueError.
static void require(bool holds, const char* expected) {
  if (!holds) throw std::invalid_argument(expected);
}

// Runs work(part of the rows) without Python's lock, part after part, and in between lets Python's signal handlers run:
// Ctrl-C ends a call of many seconds between two parts. `cost` is a row's, in elements read or multiplications made.
template <typename Work>
static void interruptibly(int64_t rows, double cost, int threads, const Work& work) {
  constexpr double kPart = 1 << 27;  // a thread's share of a part: tenths of a second
  const auto share = static_cast<int64_t>(std::max(1.0, kPart / std::max(cost, 1.0)));
  const int64_t part = share * std::max(threads, 1);
  const pybind11::gil_scoped_release unlocked;
  for (int64_t first = 0; first < rows; first += part) {
    if (first > 0) {
      const pybind11::gil_scoped_acquire locked;
      if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    }
    work(Part{first, std::min(first + part, rows)});
  }
}

}  // namespace nlhf
