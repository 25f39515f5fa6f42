// What is no kernel: version, messages for codes, the device, the test schedule, memory between processes.
#include "port.h"

#define QUOTED(text) #text
#define VALUE_QUOTED(macro) QUOTED(macro)
#ifndef TAMOE_SOURCES
#define TAMOE_SOURCES
#endif

int tamoe_abi(void) { return TAMOE_ABI; }

const char* tamoe_sources(void) { return VALUE_QUOTED(TAMOE_SOURCES); }

const char* tamoe_message(int code) {
    switch (code) {
        case 0: return "no error";
        case TAMOE_BAD_ARGUMENT: return "a size, dtype or pointer that the kernel does not take";
        case TAMOE_TOO_LARGE: return "more experts or choices than the kernel is made for";
        default: break;
    }
#ifdef __CUDACC__
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
    return code == TAMOE_SHIM_FAILED ? shim::last_error.c_str() : "unknown code";
#endif
}

#ifdef __CUDACC__
// A code, which the next launch would find as its own if the runtime kept it.
static int told(cudaError_t code) {
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    return static_cast<int>(code);
}
#endif

int tamoe_use_device(int device) {
#ifdef __CUDACC__
    return told(cudaSetDevice(device));
#else
    return device == 0 ? 0 : TAMOE_BAD_ARGUMENT;
#endif
}

#ifdef __CUDACC__
static __global__ void ready_kernel() {}
#endif

int tamoe_ready(void) {
#ifdef __CUDACC__
    cudaFuncAttributes attributes;
    return told(cudaFuncGetAttributes(&attributes, ready_kernel));  // loads the code for this device
#else
    return 0;
#endif
}

int tamoe_shim_seed(uint64_t seed) {
#ifdef __CUDACC__
    return seed == 0 ? 0 : TAMOE_BAD_ARGUMENT;
#else
    shim::seed() = seed;
    return 0;
#endif
}

int tamoe_share_memory(int64_t bytes, void** address, void* handle) {
#ifdef __CUDACC__
    static_assert(sizeof(cudaIpcMemHandle_t) == TAMOE_HANDLE_BYTES, "what peers hand to each other");
    *address = nullptr;
    cudaError_t code = cudaMalloc(address, static_cast<size_t>(bytes));
    if (code == cudaSuccess) code = cudaMemset(*address, 0, static_cast<size_t>(bytes));
    if (code == cudaSuccess) code = cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), *address);
    if (code == cudaSuccess) code = cudaDeviceSynchronize();
    if (code != cudaSuccess && *address != nullptr) {
        cudaFree(*address);
        *address = nullptr;
    }
    return told(code);
#else
    static_cast<void>(bytes), static_cast<void>(address), static_cast<void>(handle);
    return TAMOE_BAD_ARGUMENT;
#endif
}

int tamoe_map_memory(const void* handle, void** address) {
#ifdef __CUDACC__
    const auto peer = *static_cast<const cudaIpcMemHandle_t*>(handle);
    return told(cudaIpcOpenMemHandle(address, peer, cudaIpcMemLazyEnablePeerAccess));
#else
    static_cast<void>(handle), static_cast<void>(address);
    return TAMOE_BAD_ARGUMENT;
#endif
}

int tamoe_unmap_memory(void* address) {
#ifdef __CUDACC__
    return told(cudaIpcCloseMemHandle(address));
#else
    static_cast<void>(address);
    return TAMOE_BAD_ARGUMENT;
#endif
}
