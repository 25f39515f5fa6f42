// Everything in which the GPU build (nvcc) and the CPU build for tests (g++, shim.h) differ: types, launch,
// dynamic shared memory, and the few loads, stores and fences that need inline PTX. Kernels use nothing
// of the kind themselves.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "shim.h"
#endif

#include "kernels.h"

namespace port {

constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr int warp_size = 32;

#ifdef __CUDACC__

using Stream = cudaStream_t;
using bfloat16 = __nv_bfloat16;
using float16 = __half;
constexpr int64_t max_blocks = 8192;  // some 60 a multiprocessor; beyond it kernels stride

__device__ __forceinline__ float widen(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float16 value) { return __half2float(value); }
__device__ __forceinline__ bfloat16 narrow(float value, bfloat16) { return __float2bfloat16_rn(value); }
__device__ __forceinline__ float16 narrow(float value, float16) { return __float2half_rn(value); }

// Never fused into one multiply-add: sums must have the bits of the PyTorch implementation.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// Rows are read once: they need no place in the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// A plain store of a uint4 is split up again where the compiler knows how its parts were made.
__device__ __forceinline__ void store_whole(uint4* address, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t clock_ns() {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
}

// Stops the kernel; the next call into CUDA reports it.
__device__ __forceinline__ void refuse(const char*) { __trap(); }

inline int clear(void* address, size_t bytes, void* stream) {
    return static_cast<int>(cudaMemsetAsync(address, 0, bytes, static_cast<Stream>(stream)));
}

#define PORT_DYNAMIC_SHARED(type, name)                            \
    extern __shared__ __align__(16) unsigned char port_shared[]; \
    type* name = reinterpret_cast<type*>(port_shared)

// The kernel's name in brackets, then grid, block, bytes of shared memory, stream, arguments; the code.
#define PORT_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                          \
    (kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),  \
              static_cast<port::Stream>(stream)>>>(__VA_ARGS__),                                           \
     static_cast<int>(cudaGetLastError()))

#else

using bfloat16 = shim::Bfloat16;
using float16 = shim::Float16;
constexpr int64_t max_blocks = 3;  // few, so that tests make kernels stride

using shim::widen;
inline bfloat16 narrow(float value, bfloat16) { return shim::to_bfloat16(value); }
inline float16 narrow(float value, float16) { return shim::to_float16(value); }
// The build says -ffp-contract=off.
inline float multiply(float a, float b) { return a * b; }
inline double multiply(double a, double b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline double add(double a, double b) { return a + b; }

inline uint4 load_once(const uint4* address) { return *address; }
inline void store_whole(uint4* address, uint4 value) { *address = value; }

// A flag is where another process may go on, so the CPU is offered to it.
inline void store_release(uint64_t* address, uint64_t value) {
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
    sched_yield();
    if (shim::seed()) shim::yield();
}

inline uint64_t load_acquire(const uint64_t* address) {
    const uint64_t value = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    sched_yield();
    shim::yield();  // so that spins make progress
    return value;
}

inline uint64_t clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

inline void refuse(const char* message) { shim::fail(message); }

inline int clear(void* address, size_t bytes, void*) {
    std::memset(address, 0, bytes);
    return 0;
}

#define PORT_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::shim::block->shared)

#define PORT_LAUNCH(kernel, blocks, threads, shared, stream, ...)                                         \
    (static_cast<void>(stream),                                                                           \
     ::shim::launch(dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),            \
                    static_cast<size_t>(shared), [=] { kernel(__VA_ARGS__); })                            \
         ? 0                                                                                              \
         : TAMOE_SHIM_FAILED)

#endif

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float narrow(float value, float) { return value; }
__device__ __forceinline__ double narrow(double value, double) { return value; }

// The dtype in which sums of T are made.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

// Blocks for so many units of work; the kernel strides over what is more.
inline int64_t blocks_for(int64_t units, int64_t units_per_block) {
    const int64_t blocks = (units + units_per_block - 1) / units_per_block;
    return blocks < max_blocks ? blocks : max_blocks;
}

inline bool aligned(const void* address, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

}  // namespace port
