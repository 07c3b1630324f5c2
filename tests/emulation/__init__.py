"""The CUDA sources on the CPU: an emulated runtime, and kernels that test it."""
