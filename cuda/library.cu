// What the library says about itself: its version, messages for codes, the device, the test schedule.
#include "port.h"

int tamoe_abi(void) { return TAMOE_ABI; }

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

int tamoe_use_device(int device) {
#ifdef __CUDACC__
    return static_cast<int>(cudaSetDevice(device));
#else
    return device == 0 ? 0 : TAMOE_BAD_ARGUMENT;
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
