// Calls whose signature is known, made without Python code: core/calls.py says what a signature is, and has the same in
// Python.
//
// Addresses, dtypes, devices, sizes and strides of tensors are read through DLPack's interface for C, which torch.Tensor
// has since PyTorch 2.10: nothing of PyTorch is included or linked, and one binary serves every version.
#pragma once

#include <pybind11/pybind11.h>

namespace nlhf {

// Define the class KnownCalls in `module`.
void bind_known_calls(pybind11::module_& module);

}  // namespace nlhf
