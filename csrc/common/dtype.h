// Element types of the tensors that kernels read and write in the caller's own type. The numbers are those of `DTYPES`
// in nlhf_kernels/core/native.py.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nlhf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int kDTypes = 3;

NLHF_HOST_DEVICE int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace nlhf
