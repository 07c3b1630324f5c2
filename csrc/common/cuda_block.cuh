// Block primitives: warp and block reductions, and the block's dynamic shared memory.
//
// Everything is `static`, as in host_device.h: nothing here has a name that a linker could merge.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#define NLHF_DEVICE static __device__ __forceinline__

namespace nlhf {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Return the block's dynamic shared memory, 16-byte aligned. One spelling for all kernels: CUDA lets a translation unit
// declare the array under one type only, and the emulated runtime returns the memory from a call.
template <typename T>
NLHF_DEVICE T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char nlhf_dynamic_shared[];
  return reinterpret_cast<T*>(nlhf_dynamic_shared);
#else
  return static_cast<T*>(emulation::dynamic_shared());
#endif
}

struct Sum {
  template <typename T>
  NLHF_DEVICE T combine(T a, T b) {
    return a + b;
  }
  template <typename T>
  NLHF_DEVICE T identity() {
    return T(0);
  }
};

// NaN loses against any number; the sum of exponentials that follows a maximum is NaN then.
struct Max {
  template <typename T>
  NLHF_DEVICE T combine(T a, T b) {
    return std::fmax(a, b);
  }
  template <typename T>
  NLHF_DEVICE T identity() {
    return -T(INFINITY);
  }
};

// Over aligned groups of `kLanes` lanes; every lane gets its group's result, the same bits in each. All 32 lanes call.
template <typename Operation, int kLanes = kWarpSize, typename T>
NLHF_DEVICE T warp_reduce(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = Operation::combine(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

template <int kLanes = kWarpSize, typename T>
NLHF_DEVICE T warp_sum(T value) {
  return warp_reduce<Sum, kLanes>(value);
}

template <int kLanes = kWarpSize, typename T>
NLHF_DEVICE T warp_max(T value) {
  return warp_reduce<Max, kLanes>(value);
}

// The maximum of floats over the warp, none of which is NaN, by one instruction on integers of the same order.
NLHF_DEVICE float warp_max_ordered(float value) {
  const auto flip_if_negative = [](int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); };
  return __int_as_float(flip_if_negative(__reduce_max_sync(kWholeWarp, flip_if_negative(__float_as_int(value)))));
}

// Four sums over a warp in 6 shuffles instead of 20: each exchange also halves the number of sums a lane still
// carries. Lane l returns the total of values[l / 8].
template <typename T>
NLHF_DEVICE T warp_sum_of_four(const T (&values)[4]) {
  const int lane = threadIdx.x % kWarpSize;
  const bool upper_half = lane & 16, upper_quarter = lane & 8;
  const T own0 = upper_half ? values[2] : values[0], other0 = upper_half ? values[0] : values[2];
  const T own1 = upper_half ? values[3] : values[1], other1 = upper_half ? values[1] : values[3];
  const T pair0 = own0 + __shfl_xor_sync(kWholeWarp, other0, 16);
  const T pair1 = own1 + __shfl_xor_sync(kWholeWarp, other1, 16);
  const T own = upper_quarter ? pair1 : pair0, other = upper_quarter ? pair0 : pair1;
  return warp_sum<8>(own + __shfl_xor_sync(kWholeWarp, other, 8));
}

// Over a one-dimensional block of whole warps; every thread gets the result. One barrier inside: what a thread wrote
// before the call is visible to the block after it. `scratch` (32 values, shared) may be reused only once a further
// barrier has passed, since slow warps still read it when fast ones return.
template <typename Operation, typename T>
NLHF_DEVICE T block_reduce(T value, T* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = warp_reduce<Operation>(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce<Operation>(lane < warps ? scratch[lane] : Operation::template identity<T>());
}

template <typename T>
NLHF_DEVICE T block_sum(T value, T* scratch) {
  return block_reduce<Sum>(value, scratch);
}

template <typename T>
NLHF_DEVICE T block_max(T value, T* scratch) {
  return block_reduce<Max>(value, scratch);
}

}  // namespace nlhf
