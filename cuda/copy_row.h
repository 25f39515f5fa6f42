// One warp copies one row.
#pragma once

#include "port.h"

namespace rows {

constexpr int in_flight = 4;  // loads before the first store, to hide their latency

template <class Word>
__device__ __forceinline__ Word load(const Word* address) {
    return *address;
}

__device__ __forceinline__ uint4 load(const uint4* address) { return port::load_once(address); }

template <class Word>
__device__ __forceinline__ void copy(const Word* from, Word* to, int64_t words, int lane) {
    int64_t word = lane;
    for (; word + (in_flight - 1) * port::warp_size < words; word += in_flight * port::warp_size) {
        Word part[in_flight];
#pragma unroll
        for (int i = 0; i < in_flight; ++i) part[i] = load(from + word + i * port::warp_size);
#pragma unroll
        for (int i = 0; i < in_flight; ++i) to[word + i * port::warp_size] = part[i];
    }
    for (; word < words; word += port::warp_size) to[word] = load(from + word);
}

}  // namespace rows
