// Shared by the two bindings: reading a call's positional arguments into a problem struct, bounds on the numbers that
// kernels index with, and interruption by Ctrl-C.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "dtype.h"
#include "levels.h"

namespace nlhf {

// Raise a ValueError in Python. Operators check their arguments (core/checks.py); this guards direct calls of a
// module's functions.
static void require(bool condition, const char* expectation) {
  if (!condition) throw std::invalid_argument(expectation);
}

// The positional arguments of one call, read in order: `arguments >> problem.rows >> problem.out`. A field's type says
// how its argument is read: a pointer from an address, an enum from its number, a number from a number. A problem's
// fields are thus spelled once, in the order in which Python passes them (ops/*/native.py).
class Arguments {
 public:
  // `name`: of the operation, for error messages.
  Arguments(const char* name, pybind11::tuple values) : name_(name), values_(std::move(values)) {}

  size_t remaining() const { return values_.size() - position_; }

  template <typename Field>
  Arguments& operator>>(Field& field) {
    if constexpr (std::is_pointer_v<Field>) {
      field = reinterpret_cast<Field>(next<std::uintptr_t>("an address"));
    } else if constexpr (std::is_same_v<Field, DType>) {
      const int number = next<int>("a dtype's number");
      if (number < 0 || number >= kDTypes) fail<std::invalid_argument>("dtype: expected 0, 1 or 2");
      field = static_cast<DType>(number);
    } else if constexpr (std::is_enum_v<Field>) {
      field = static_cast<Field>(next<int>("an enum's number"));
    } else {
      field = next<Field>(std::is_floating_point_v<Field> ? "a number" : "an integer in range");
    }
    return *this;
  }

  // The next argument, a tuple, to be read in order itself.
  Arguments nested() { return {name_, next<pybind11::tuple>("a tuple")}; }

  // Every call ends with this, so that no argument is ignored.
  void finish() const {
    if (remaining() != 0) fail<pybind11::type_error>("expected " + std::to_string(position_) + " arguments, got " +
                                                     std::to_string(values_.size()));
  }

 private:
  template <typename T>
  T next(const char* expectation) {
    if (remaining() == 0) fail<pybind11::type_error>("expected more than " + std::to_string(position_) + " arguments");
    const pybind11::handle value = values_[position_++];
    pybind11::detail::make_caster<T> caster;
    if (!caster.load(value, true)) {
      fail<pybind11::type_error>("argument " + std::to_string(position_) + ": expected " + expectation + ", got " +
                                 pybind11::repr(value).cast<std::string>());
    }
    return pybind11::detail::cast_op<T>(caster);
  }

  template <typename Error>
  [[noreturn]] void fail(const std::string& message) const {
    throw Error(std::string(name_) + ": " + message);
  }

  const char* name_;
  pybind11::tuple values_;
  size_t position_ = 0;
};

// Run work(part of the rows) without Python's lock, one part after the other, and run Python's signal handlers between
// two parts, so that Ctrl-C ends a call of many seconds. `cost`: elements read or multiplications done for one row.
template <typename Work>
static void run_interruptible(int64_t rows, double cost, int threads, const Work& work) {
  constexpr double kThreadCost = 1 << 27;  // of one part and thread: tenths of a second
  const auto rows_a_thread = static_cast<int64_t>(std::max(1.0, kThreadCost / std::max(cost, 1.0)));
  const int64_t part = rows_a_thread * std::max(threads, 1);
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
