// NLHF_HOST_DEVICE: qualifiers of functions that are compiled for the host and, by nvcc, for the device.
//
// Functions are `static`: the same header is compiled into objects of different instruction sets, and the linker merges
// functions with external linkage into one copy, which may be the AVX-512 one on a machine without AVX-512.
#pragma once

#if defined(__CUDACC__)
#define NLHF_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define NLHF_HOST_DEVICE static inline
#endif
