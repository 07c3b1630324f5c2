// Replaces NVIDIA's header of this name: CUDA sources compile as plain C++ (g++ -x c++, this folder first on the
// include path) and run on the CPU. It declares only what the kernels use; emulator.h describes the execution.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emulator.h"

// ------------------------------------------------------------------------------------------------ the language
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__  // empty, as libstdc++ spells an attribute like this
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one at a time, so shared memory can be static; one section for all variables lets the engine poison them
// before each block. Kernels that are templates need internal linkage (an anonymous namespace), or the section clashes.
#define __shared__ static __attribute__((section("emulated_shared")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = emulation::kWarp;

#define EMULATED_VECTORS(Scalar, name)                                                              \
  struct alignas(2 * sizeof(Scalar)) name##2 { Scalar x, y; };                                      \
  struct alignas(sizeof(Scalar) < 8 ? 4 * sizeof(Scalar) : 16) name##4 { Scalar x, y, z, w; };      \
  inline name##2 make_##name##2(Scalar x, Scalar y) { return {x, y}; }                              \
  inline name##4 make_##name##4(Scalar x, Scalar y, Scalar z, Scalar w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
#undef EMULATED_VECTORS

// ------------------------------------------------------------------------------- barriers and warp collectives
#define EMULATED_LOCATION const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATED_LOCATION) { emulation::block_barrier(false, {"__syncthreads", file, line}); }
inline int __syncthreads_count(int predicate, EMULATED_LOCATION) {
  return emulation::block_barrier(predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, EMULATED_LOCATION) {
  return emulation::block_barrier(predicate != 0, {"__syncthreads_or", file, line}) > 0;
}
inline int __syncthreads_and(int predicate, EMULATED_LOCATION) {
  return emulation::block_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATED_LOCATION) {
  emulation::warp_exchange(mask, 0, {"__syncwarp", file, line});
}
inline unsigned __activemask() {
  unsigned mask = 0;
  for (int lane = 0; lane < warpSize; ++lane) mask |= unsigned{emulation::lane_exists(lane)} << lane;
  return mask;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_LOCATION) {
  const uint64_t* votes = emulation::warp_exchange(mask, predicate != 0, {"__ballot_sync", file, line});
  unsigned ballot = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  }
  return ballot;
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATED_LOCATION) {
  const uint64_t own = static_cast<uint32_t>(value);
  const uint64_t* values = emulation::warp_exchange(mask, own, {"__reduce_max_sync", file, line});
  int largest = value;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (mask >> lane & 1) largest = std::max(largest, static_cast<int>(static_cast<uint32_t>(values[lane])));
  }
  return largest;
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_LOCATION) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_LOCATION) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

namespace emulation {

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

// Return the value of lane `source`; outside the caller's segment of `width` lanes, the caller's own. A source lane
// outside the mask is undefined in CUDA; here its value is 0xFF.., NaN in every floating-point type.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, SourceLocation location) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= sizeof(uint64_t), "what a shuffle can carry");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = warp_exchange(mask, bits, location);
  const int segment = lane() / width * width;
  if (source < segment || source >= segment + width) source = lane();
  bits = mask >> source & 1 ? values[source] : ~uint64_t{0};
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATED_LOCATION) {
  const int segment = emulation::lane() / width * width;
  const int wrapped = segment + (source % width + width) % width;
  return emulation::shuffle(mask, value, wrapped, width, {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATED_LOCATION) {
  const int source = emulation::lane() - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source, width, {"__shfl_up_sync", file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATED_LOCATION) {
  const int source = emulation::lane() + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source, width, {"__shfl_down_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, EMULATED_LOCATION) {
  return emulation::shuffle(mask, value, emulation::lane() ^ lane_mask, width, {"__shfl_xor_sync", file, line});
}
#undef EMULATED_LOCATION

// ------------------------------------------------------------------------------------- atomics, fences, loads
// One fiber runs at a time and yields only where it waits, so plain arithmetic is atomic.
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, value);
}
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address | value));
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return std::exchange(*address, *address == expected ? value : *address);
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return std::exchange(*address, *address >= limit ? 0u : *address + 1);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulation::yield(); }
template <typename T>
T __ldg(const T* address) { return *address; }
template <typename T>
T __ldcg(const T* address) { return *address; }
template <typename T>
T __ldcs(const T* address) { return *address; }
template <typename T>
void __stcs(T* address, std::common_type_t<T> value) { *address = value; }

// ------------------------------------------------------------------------------------------ scalar intrinsics
#define __expf expf  // macros: the C library declares functions of these names
#define __logf logf
#define __log2f log2f
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

namespace emulation {
template <typename To, typename From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulation
inline int __float_as_int(float x) { return emulation::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::same_bits<double>(x); }

template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }

// ------------------------------------------------------------------------------------------------ the host API
#define CUDART_VERSION 0  // build_info of an emulated module then shows version 0.0

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
typedef struct CUstream_st* cudaStream_t;

cudaError_t cudaDriverGetVersion(int* version);  // 0: the emulator needs no driver
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
const char* cudaGetErrorString(cudaError_t error);  // after a launch failure: what the kernel did wrong

namespace emulation {
cudaError_t set_dynamic_shared_limit(const void* kernel, cudaFuncAttribute attribute, int bytes);
cudaError_t launch(const void* kernel, const dim3& blocks, const dim3& threads, size_t shared_bytes,
                   const std::function<void()>& body);

template <typename... Parameters, size_t... kIndex>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kIndex...>) {
  kernel(*static_cast<Parameters*>(arguments[kIndex])...);
}
}  // namespace emulation

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return emulation::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), attribute, value);
}

// Run the kernel and return its error: launches on an emulated stream are synchronous.
template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return emulation::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, [=] {
    emulation::call(kernel, arguments, std::index_sequence_for<Parameters...>());
  });
}

// The part of the extensible launch that the kernels use. Blocks of a cluster run one after the other like any others.
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               std::common_type_t<Parameters>... arguments) {
  constexpr unsigned kPortableCluster = 8;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const dim3& cluster = config->attrs[i].val.clusterDim;
    const unsigned blocks = cluster.x * cluster.y * cluster.z;
    if (blocks == 0 || blocks > kPortableCluster || config->gridDim.x % cluster.x != 0 ||
        config->gridDim.y % cluster.y != 0 || config->gridDim.z % cluster.z != 0) {
      return cudaErrorInvalidConfiguration;
    }
  }
  void* addresses[sizeof...(Parameters) + 1] = {&arguments...};
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, addresses, config->dynamicSmemBytes,
                          config->stream);
}
