// The table of known calls: signatures of arguments, and the steps that calls of a signature take.
#include "known_calls.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace nlhf {
namespace {

// ---- DLPack 1.x, dlpack.h ----------------------------------------------------------------------------------------------

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* tensor);  // 0; or -1 and a Python exception
  void* current_stream;
};

// ---- signatures --------------------------------------------------------------------------------------------------------

constexpr std::uintptr_t kAlignment = 16;  // bytes; compiled kernels assume that an address is a multiple, or not

// What a call's checks, its backend and its launches depend on, as words; and the tensors among its arguments.
class Signature {
 public:
  static constexpr size_t kMaxWords = 256, kMaxTensors = 24;

  const int64_t* begin() const { return words_; }
  const int64_t* end() const { return words_ + size_; }
  size_t tensors() const { return tensors_; }
  PyObject* tensor(size_t index) const { return objects_[index]; }
  std::uintptr_t address(size_t index) const { return addresses_[index]; }

  // Append; false where there is no room.
  bool add(int64_t word) {
    if (size_ == kMaxWords) return false;
    words_[size_++] = word;
    return true;
  }

  bool add(const char* text, Py_ssize_t length) {
    bool fits = add(length);
    for (Py_ssize_t at = 0; at < length && fits; at += 8) {
      int64_t word = 0;
      std::memcpy(&word, text + at, static_cast<size_t>(std::min<Py_ssize_t>(8, length - at)));
      fits = add(word);
    }
    return fits;
  }

  bool add(PyObject* object, const DLTensor& tensor) {
    if (tensors_ == kMaxTensors) return false;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
    objects_[tensors_] = object;
    addresses_[tensors_++] = address;
    const int64_t type = int64_t{tensor.code} << 24 | int64_t{tensor.bits} << 16 | tensor.lanes;
    bool fits = add(type << 32 | int64_t{tensor.ndim} << 1 | (address % kAlignment == 0)) &&
                add(int64_t{tensor.device_type} << 32 | static_cast<uint32_t>(tensor.device_id));
    for (int32_t dim = 0; dim < tensor.ndim; ++dim) fits = fits && add(tensor.shape[dim]) && add(tensor.strides[dim]);
    return fits;
  }

  uint64_t hash() const {
    uint64_t state = 0x9E3779B97F4A7C15u;
    for (const int64_t word : *this) {
      state = (state ^ static_cast<uint64_t>(word)) * 0xFF51AFD7ED558CCDu;
      state ^= state >> 32;
    }
    return state;
  }

 private:
  int64_t words_[kMaxWords];
  size_t size_ = 0;
  PyObject* objects_[kMaxTensors];  // borrowed from the arguments
  std::uintptr_t addresses_[kMaxTensors];
  size_t tensors_ = 0;
};

enum Kind : int64_t { kNone, kTensor, kList, kBool, kInteger, kReal, kText, kDtype };  // precedes each argument

// ---- what a known call does --------------------------------------------------------------------------------------------

// A value that differs from call to call; the numbers are those of class Source in core/prepared.py.
struct Slot {
  enum Source : int { input, result, scratch, now };
  Source source;
  size_t place;  // the index of an input, of a result, of a function in `now`; or bytes from the start of the working memory

  bool operator==(const Slot& other) const { return source == other.source && place == other.place; }
};

// An argument of a step: a constant, one of the call's slots, or a tuple of these.
struct Argument {
  enum Form { constant, slot, tuple };
  Form form = constant;
  py::object value;  // of a constant
  size_t slot_number = 0;
  std::vector<Argument> parts;
};

struct Step {
  py::object function;
  std::vector<Argument> arguments;
};

struct Known {
  std::vector<int64_t> signature;
  py::object run;           // inputs -> the result, in Python
  bool has_steps = false;   // whether what follows may be done in its place
  py::object ready;         // () -> whether it may now; or None
  py::object allocate;      // (shape, strides, dtype) -> a tensor
  std::vector<py::tuple> allocations;  // its arguments
  size_t results = 0;       // of the allocations; one more is the working memory
  std::vector<py::object> now;  // () -> a value that is the same for all steps of a call
  std::vector<Slot> slots;  // all that the steps use
  std::vector<Step> steps;
};

// Return an argument's value, given those of the slots.
py::object evaluate(const Argument& argument, const std::vector<py::object>& slots) {
  if (argument.form == Argument::constant) return argument.value;
  if (argument.form == Argument::slot) return slots[argument.slot_number];
  py::tuple parts(argument.parts.size());
  for (size_t i = 0; i < argument.parts.size(); ++i) parts[i] = evaluate(argument.parts[i], slots);
  return std::move(parts);
}

// ---- the table ---------------------------------------------------------------------------------------------------------

class KnownCalls {
 public:
  // capsule: torch.Tensor's exchange interface. tensor_types: classes that report what PyTorch does. slot_type: of
  // arguments that are addresses. limit: most signatures; they are forgotten when there are more.
  KnownCalls(const py::object& capsule, py::tuple tensor_types, py::object dtype_type, py::object slot_type,
             size_t limit)
      : tensor_types_(std::move(tensor_types)), dtype_type_(std::move(dtype_type)), slot_type_(std::move(slot_type)),
        capsule_(capsule), limit_(limit) {
    const void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!api) throw py::error_already_set();
    api_ = static_cast<const DLPackExchangeAPI*>(api);
    if (api_->major != 1 || !api_->tensor_from_object) throw py::value_error("KnownCalls: expected DLPack 1");
  }

  // Return the result of a call of a known signature, NotImplemented for others. `gradients`: None inside an operator;
  // else whether gradients are recorded, and what PyTorch's dispatcher would do to a tensor makes the call unknown.
  py::object run(const py::tuple& inputs, const py::tuple& context, const py::object& gradients) {
    Signature signature;
    const auto unknown = [] { return py::reinterpret_borrow<py::object>(Py_NotImplemented); };
    if (!read(inputs, signature) || !read(context, signature)) return unknown();
    const std::shared_ptr<Known> known = find(signature);
    if (!known || (!gradients.is_none() && needs_dispatcher(signature, gradients.ptr() == Py_True))) return unknown();
    if (!known->has_steps || (!known->ready.is_none() && !known->ready().cast<bool>())) return known->run(inputs);
    return run_steps(*known, signature, inputs);
  }

  // Keep how calls of this signature run: `run` in Python; `prepared`, or None: see core/prepared.py.
  void learn(const py::tuple& inputs, const py::tuple& context, py::object run, const py::object& prepared) {
    Signature signature;
    if (!read(inputs, signature) || !read(context, signature)) return;
    auto known = std::make_shared<Known>();
    known->signature.assign(signature.begin(), signature.end());
    known->run = std::move(run);
    if (!prepared.is_none()) read_prepared(prepared, signature, *known);
    if (known_.size() >= limit_) known_.clear();
    const auto [first, last] = known_.equal_range(signature.hash());
    for (auto entry = first; entry != last; ++entry) {
      if (entry->second->signature == known->signature) {
        entry->second = known;
        return;
      }
    }
    known_.emplace(signature.hash(), std::move(known));
  }

  size_t size() const { return known_.size(); }

 private:
  bool read(const py::tuple& values, Signature& signature) const {
    for (const py::handle value : values) {
      if (!read(value.ptr(), signature)) return false;
    }
    return true;
  }

  // False for other types, for subclasses of Tensor, which may report anything, and for tensors that are not dense.
  bool read(PyObject* value, Signature& signature) const {
    if (value == Py_None) return signature.add(kNone);
    if (is_tensor(value)) {
      DLTensor tensor;
      if (api_->tensor_from_object(value, &tensor) != 0) {
        PyErr_Clear();
        return false;
      }
      if (tensor.ndim > 0 && !tensor.strides) return false;
      return signature.add(kTensor) && signature.add(value, tensor);
    }
    if (PyBool_Check(value)) return signature.add(kBool) && signature.add(value == Py_True);
    if (PyLong_CheckExact(value)) {
      int overflow;
      const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
      return !overflow && signature.add(kInteger) && signature.add(number);
    }
    if (PyFloat_CheckExact(value)) {
      const double number = PyFloat_AS_DOUBLE(value);
      int64_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      return signature.add(kReal) && signature.add(bits);
    }
    if (PyUnicode_CheckExact(value)) {
      Py_ssize_t length;
      const char* text = PyUnicode_AsUTF8AndSize(value, &length);
      if (!text) PyErr_Clear();
      return text && signature.add(kText) && signature.add(text, length);
    }
    if (reinterpret_cast<PyObject*>(Py_TYPE(value)) == dtype_type_.ptr()) {  // PyTorch has one object for each dtype
      return signature.add(kDtype) && signature.add(static_cast<int64_t>(reinterpret_cast<std::intptr_t>(value)));
    }
    if (!PyList_CheckExact(value) || !signature.add(kList) || !signature.add(PyList_GET_SIZE(value))) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
      if (!is_tensor(PyList_GET_ITEM(value, i)) || !read(PyList_GET_ITEM(value, i), signature)) return false;
    }
    return true;
  }

  bool is_tensor(PyObject* value) const {
    for (const py::handle type : tensor_types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(value)) == type.ptr()) return true;
    }
    return false;
  }

  std::shared_ptr<Known> find(const Signature& signature) const {
    const auto [first, last] = known_.equal_range(signature.hash());
    for (auto entry = first; entry != last; ++entry) {
      const auto& other = entry->second->signature;
      if (std::equal(signature.begin(), signature.end(), other.begin(), other.end())) return entry->second;
    }
    return nullptr;
  }

  bool needs_dispatcher(const Signature& signature, bool gradients) const {
    const auto is_true = [](PyObject* answer) {
      if (!answer) throw py::error_already_set();
      return py::reinterpret_steal<py::object>(answer).ptr() == Py_True;
    };
    for (size_t i = 0; i < signature.tensors(); ++i) {
      PyObject* tensor = signature.tensor(i);
      if (gradients && is_true(PyObject_GetAttr(tensor, requires_grad_.ptr()))) return true;
      if (is_true(PyObject_CallMethodNoArgs(tensor, is_neg_.ptr()))) return true;  // a sign not yet in the memory
    }
    return false;
  }

  py::object run_steps(const Known& known, const Signature& signature, const py::tuple& inputs) const {
    std::vector<py::object> tensors;
    std::vector<std::uintptr_t> addresses;
    tensors.reserve(known.allocations.size()), addresses.reserve(known.allocations.size());
    for (const py::tuple& arguments : known.allocations) {
      PyObject* tensor = PyObject_Call(known.allocate.ptr(), arguments.ptr(), nullptr);
      if (!tensor) throw py::error_already_set();
      tensors.push_back(py::reinterpret_steal<py::object>(tensor));
      DLTensor facts;
      if (api_->tensor_from_object(tensor, &facts) != 0) throw py::error_already_set();
      addresses.push_back(reinterpret_cast<std::uintptr_t>(facts.data) + facts.byte_offset);
      if (addresses.back() % kAlignment != 0) return known.run(inputs);  // kernels were compiled for others
    }
    std::vector<py::object> slots;
    slots.reserve(known.slots.size());
    for (const auto& [source, place] : known.slots) {
      if (source == Slot::now) {
        slots.push_back(known.now[place]());
      } else {
        const std::uintptr_t address = source == Slot::input    ? signature.address(place)
                                       : source == Slot::result ? addresses[place]
                                                                : addresses[known.results] + place;
        slots.push_back(py::reinterpret_steal<py::object>(PyLong_FromUnsignedLongLong(address)));
      }
    }
    std::vector<PyObject*> arguments;
    std::vector<py::object> tuples;  // made for this call
    for (const Step& step : known.steps) {
      arguments.clear();
      for (const Argument& argument : step.arguments) {
        if (argument.form == Argument::tuple) tuples.push_back(evaluate(argument, slots));
        arguments.push_back(argument.form == Argument::constant ? argument.value.ptr()
                            : argument.form == Argument::slot   ? slots[argument.slot_number].ptr()
                                                                : tuples.back().ptr());
      }
      PyObject* nothing = PyObject_Vectorcall(step.function.ptr(), arguments.data(), arguments.size(), nullptr);
      if (!nothing) throw py::error_already_set();
      Py_DECREF(nothing);
    }
    if (known.results == 0) return py::none();
    if (known.results == 1) return tensors[0];
    py::tuple results(known.results);
    for (size_t i = 0; i < known.results; ++i) results[i] = std::move(tensors[i]);
    return std::move(results);
  }

  void read_prepared(const py::object& prepared, const Signature& signature, Known& known) const {
    known.allocate = prepared.attr("allocate");
    for (const py::handle arguments : prepared.attr("allocations")) {
      known.allocations.push_back(arguments.cast<py::tuple>());
    }
    known.results = prepared.attr("results").cast<size_t>();
    for (const py::handle function : prepared.attr("now")) {
      known.now.push_back(py::reinterpret_borrow<py::object>(function));
    }
    for (const py::handle step : prepared.attr("steps")) {
      const auto [function, arguments] = step.cast<std::pair<py::object, py::tuple>>();
      known.steps.push_back({function, read_argument(arguments, known.slots).parts});
    }
    for (const auto& [source, place] : known.slots) {
      const bool exists = source == Slot::input    ? place < signature.tensors()
                          : source == Slot::result ? place < known.results
                          : source == Slot::now    ? place < known.now.size()
                                                   : known.results < known.allocations.size();
      if (!exists) throw py::value_error("KnownCalls: expected slots of tensors and values that the call has");
    }
    known.ready = prepared.attr("ready");
    known.has_steps = true;
  }

  Argument read_argument(const py::handle value, std::vector<Slot>& slots) const {
    Argument argument;
    if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == slot_type_.ptr()) {
      const Slot slot{static_cast<Slot::Source>(value.attr("source").cast<int>()), value.attr("place").cast<size_t>()};
      const auto place = std::find(slots.begin(), slots.end(), slot);
      argument.form = Argument::slot;
      argument.slot_number = static_cast<size_t>(place - slots.begin());
      if (place == slots.end()) slots.push_back(slot);
    } else if (PyTuple_CheckExact(value.ptr())) {
      for (const py::handle part : value) argument.parts.push_back(read_argument(part, slots));
      const auto is_constant = [](const Argument& part) { return part.form == Argument::constant; };
      const bool varies = !std::all_of(argument.parts.begin(), argument.parts.end(), is_constant);
      argument.form = varies ? Argument::tuple : Argument::constant;
      argument.value = py::reinterpret_borrow<py::object>(value);
    } else {
      argument.value = py::reinterpret_borrow<py::object>(value);
    }
    return argument;
  }

  py::tuple tensor_types_;
  py::object dtype_type_, slot_type_;
  py::str is_neg_{"is_neg"}, requires_grad_{"requires_grad"};
  py::object capsule_;  // owns what api_ points to
  const DLPackExchangeAPI* api_;
  size_t limit_;
  std::unordered_multimap<uint64_t, std::shared_ptr<Known>> known_;
};

}  // namespace

void bind_known_calls(py::module_& module) {
  py::class_<KnownCalls>(module, "KnownCalls")
      .def(py::init<py::object, py::tuple, py::object, py::object, size_t>())
      .def("run", &KnownCalls::run)
      .def("learn", &KnownCalls::learn)
      .def("__len__", &KnownCalls::size);
}

}  // namespace nlhf
