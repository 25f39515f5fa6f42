// Weighted sums of rows in a given order, and their gradients.
//
// A warp makes one sum over one stretch of columns: each lane holds 16 bytes of it. The order of the terms
// is the caller's, products and the sum are rounded as the PyTorch implementation rounds them, so both
// agree bit for bit. Only a weight's gradient, a dot product, has an order of its own.
#include "port.h"

namespace {

using port::Wide;

constexpr int threads = 256;
constexpr int warps = threads / port::warp_size;

// Elements that one access moves.
template <class T, int count>
struct Part {
    T element[count];
};

template <class T, int count>
__device__ __forceinline__ Part<T, count> load(const T* address) {
    Part<T, count> part;
    if constexpr (count == 1) {
        part.element[0] = *address;
    } else {
        static_assert(sizeof(part) == sizeof(uint4));
        const uint4 word = *reinterpret_cast<const uint4*>(address);
        memcpy(&part, &word, sizeof(word));
    }
    return part;
}

template <class T, int count>
__device__ __forceinline__ void store(T* address, const Part<T, count>& part) {
    if constexpr (count == 1) {
        *address = part.element[0];
    } else {
        uint4 word;
        memcpy(&word, &part, sizeof(word));
        port::store_whole(reinterpret_cast<uint4*>(address), word);
    }
}

__device__ __forceinline__ void check(int64_t begin, int64_t end, int64_t num_terms) {
    if (begin < 0 || begin > end || end > num_terms) port::refuse("offsets fall, or go beyond the terms");
}

// Sum and first column of each unit of work; units are dealt to warps in turn.
struct Units {
    int64_t stretches, end, stride, unit;
    int lane;

    __device__ __forceinline__ Units(int64_t num_sums, int64_t width, int count)
        : stretches((width + port::warp_size * count - 1) / (port::warp_size * count)),
          end(num_sums * stretches),
          stride(static_cast<int64_t>(gridDim.x) * warps),
          unit(static_cast<int64_t>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / port::warp_size),
          lane(static_cast<int>(threadIdx.x) % port::warp_size) {}
    __device__ __forceinline__ int64_t sum() const { return unit / stretches; }
    __device__ __forceinline__ int64_t column(int count) const {
        return (unit % stretches * port::warp_size + lane) * count;
    }
};

template <class T, int count, bool weighted>
__global__ void __launch_bounds__(threads)
    combine_kernel(const T* __restrict__ row, int64_t num_rows, const int64_t* __restrict__ offset,
                   const int64_t* __restrict__ index, int64_t num_terms,
                   const typename Wide<T>::type* __restrict__ weight,
                   T* __restrict__ out, int64_t num_sums, int64_t width) {
    using W = typename Wide<T>::type;
    for (Units units(num_sums, width, count); units.unit < units.end; units.unit += units.stride) {
        const int64_t s = units.sum(), column = units.column(count), end = offset[s + 1];
        check(offset[s], end, num_terms);
        if (column >= width) continue;
        W sum[count] = {};
        for (int64_t begin = offset[s], j = begin; j < end; ++j) {
            const int64_t from = index[j];
            if (from < 0 || from >= num_rows) port::refuse("a term's index is out of range");
            const Part<T, count> part = load<T, count>(row + from * width + column);
            const W factor = weighted ? weight[j] : W(1);
#pragma unroll
            for (int i = 0; i < count; ++i) {
                W term = port::widen(part.element[i]);
                if (weighted) term = port::widen(port::narrow(port::multiply(term, factor), T{}));
                sum[i] = j == begin ? term : port::add(sum[i], term);  // 0 + -0 would lose the sign
            }
        }
        Part<T, count> part;
#pragma unroll
        for (int i = 0; i < count; ++i) part.element[i] = port::narrow(sum[i], T{});
        store(out + s * width + column, part);
    }
}

template <class T, int count, bool weighted>
__global__ void __launch_bounds__(threads)
    grad_row_kernel(const T* __restrict__ grad, int64_t num_rows, const int64_t* __restrict__ offset,
                    const int64_t* __restrict__ index, int64_t num_terms,
                   const typename Wide<T>::type* __restrict__ weight,
                    T* __restrict__ grad_row, int64_t num_sums, int64_t width) {
    for (Units units(num_sums, width, count); units.unit < units.end; units.unit += units.stride) {
        const int64_t s = units.sum(), column = units.column(count), end = offset[s + 1];
        check(offset[s], end, num_terms);
        if (column >= width) continue;
        const Part<T, count> part = load<T, count>(grad + s * width + column);
        for (int64_t j = offset[s]; j < end; ++j) {
            const int64_t to = index[j];
            if (to < 0 || to >= num_rows) port::refuse("a term's index is out of range");
            Part<T, count> term = part;
            if constexpr (weighted) {
#pragma unroll
                for (int i = 0; i < count; ++i)
                    term.element[i] = port::narrow(port::multiply(port::widen(part.element[i]), weight[j]), T{});
            }
            store(grad_row + to * width + column, term);
        }
    }
}

template <class T, int count>
__global__ void __launch_bounds__(threads, 4)
    grad_weight_kernel(const T* __restrict__ grad, const T* __restrict__ row, int64_t num_rows,
                       const int64_t* __restrict__ offset, const int64_t* __restrict__ index, int64_t num_terms,
                       typename Wide<T>::type* __restrict__ grad_weight, int64_t num_sums, int64_t width) {
    using W = typename Wide<T>::type;
    const int lane = static_cast<int>(threadIdx.x) % port::warp_size;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
    int64_t s = static_cast<int64_t>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / port::warp_size;
    for (; s < num_sums; s += stride) {
        const int64_t end = offset[s + 1];
        check(offset[s], end, num_terms);
        for (int64_t j = offset[s]; j < end; ++j) {
            const int64_t from = index[j];
            if (from < 0 || from >= num_rows) port::refuse("a term's index is out of range");
            W dot = 0;
#pragma unroll 2  // more would not fit the registers
            for (int64_t column = lane * count; column < width; column += port::warp_size * count) {
                const Part<T, count> a = load<T, count>(grad + s * width + column);
                const Part<T, count> b = load<T, count>(row + from * width + column);
#pragma unroll
                for (int i = 0; i < count; ++i) dot += port::widen(a.element[i]) * port::widen(b.element[i]);
            }
            for (int by = port::warp_size / 2; by > 0; by /= 2) dot += __shfl_xor_sync(port::all_lanes, dot, by);
            if (lane == 0) grad_weight[j] = dot;
        }
    }
}

struct Sizes {
    int64_t num_rows, num_terms, num_sums, width;
    const int64_t *offset, *index;
    const void* weight;
    void* stream;

    int64_t blocks(int count) const {
        return port::blocks_for(num_sums * ((width + port::warp_size * count - 1) / (port::warp_size * count)), warps);
    }
};

template <class T, int count, bool weighted>
int combine(const void* row, void* out, const Sizes& z) {
    const T* row_T = static_cast<const T*>(row);
    T* out_T = static_cast<T*>(out);
    const auto* weight = static_cast<const typename Wide<T>::type*>(z.weight);
    return PORT_LAUNCH((combine_kernel<T, count, weighted>), z.blocks(count), threads, 0, z.stream, row_T, z.num_rows,
                       z.offset, z.index, z.num_terms, weight, out_T, z.num_sums, z.width);
}

template <class T, int count, bool weighted>
int backward(const void* grad, const void* row, void* grad_row, void* grad_weight, const Sizes& z) {
    using W = typename Wide<T>::type;
    const T *grad_T = static_cast<const T*>(grad), *row_T = static_cast<const T*>(row);
    T* grad_row_T = static_cast<T*>(grad_row);
    W* grad_weight_W = static_cast<W*>(grad_weight);
    const W* weight = static_cast<const W*>(z.weight);
    int code = 0;
    if (z.width > 0)
        code = PORT_LAUNCH((grad_row_kernel<T, count, weighted>), z.blocks(count), threads, 0, z.stream, grad_T,
                           z.num_rows, z.offset, z.index, z.num_terms, weight, grad_row_T, z.num_sums, z.width);
    if (code || !weighted) return code;
    return PORT_LAUNCH((grad_weight_kernel<T, count>), port::blocks_for(z.num_sums, warps), threads, 0, z.stream,
                       grad_T, row_T, z.num_rows, z.offset, z.index, z.num_terms, grad_weight_W, z.num_sums, z.width);
}

// Whether every row of these tensors starts at 16 bytes.
template <class T, class... Pointer>
bool wide_access(int64_t width, Pointer... pointer) {
    return width * static_cast<int64_t>(sizeof(T)) % 16 == 0 && (port::aligned(pointer, 16) && ...);
}

template <class T>
int combine_any(const void* row, void* out, const Sizes& z) {
    constexpr int count = 16 / sizeof(T);
    if (wide_access<T>(z.width, row, out))
        return z.weight ? combine<T, count, true>(row, out, z) : combine<T, count, false>(row, out, z);
    return z.weight ? combine<T, 1, true>(row, out, z) : combine<T, 1, false>(row, out, z);
}

template <class T>
int backward_any(const void* grad, const void* row, void* grad_row, void* grad_weight, const Sizes& z) {
    constexpr int count = 16 / sizeof(T);
    const bool wide = wide_access<T>(z.width, grad, z.weight ? row : grad, grad_row);
    if (wide)
        return z.weight ? backward<T, count, true>(grad, row, grad_row, grad_weight, z)
                        : backward<T, count, false>(grad, row, grad_row, grad_weight, z);
    return z.weight ? backward<T, 1, true>(grad, row, grad_row, grad_weight, z)
                    : backward<T, 1, false>(grad, row, grad_row, grad_weight, z);
}

bool refused(const Sizes& z) { return z.num_rows < 0 || z.num_terms < 0 || z.num_sums < 0 || z.width < 0; }

}  // namespace

int tamoe_combine(int dtype, const void* row, int64_t num_rows, const int64_t* offset, const int64_t* index,
                  int64_t num_terms, const void* weight, void* out, int64_t num_sums, int64_t width, void* stream) {
    const Sizes z{num_rows, num_terms, num_sums, width, offset, index, weight, stream};
    if (refused(z)) return TAMOE_BAD_ARGUMENT;
    if (num_sums == 0 || width == 0) return 0;
    switch (dtype) {
        case TAMOE_FLOAT32: return combine_any<float>(row, out, z);
        case TAMOE_FLOAT64: return combine_any<double>(row, out, z);
        case TAMOE_BFLOAT16: return combine_any<port::bfloat16>(row, out, z);
        case TAMOE_FLOAT16: return combine_any<port::float16>(row, out, z);
        default: return TAMOE_BAD_ARGUMENT;
    }
}

int tamoe_combine_backward(int dtype, const void* grad, const void* row, int64_t num_rows, const int64_t* offset,
                           const int64_t* index, int64_t num_terms, const void* weight, void* grad_row, void* grad_weight,
                           int64_t num_sums, int64_t width, void* stream) {
    const Sizes z{num_rows, num_terms, num_sums, width, offset, index, weight, stream};
    if (refused(z) || (weight != nullptr) != (grad_weight != nullptr)) return TAMOE_BAD_ARGUMENT;
    if (num_sums == 0) return 0;
    switch (dtype) {
        case TAMOE_FLOAT32: return backward_any<float>(grad, row, grad_row, grad_weight, z);
        case TAMOE_FLOAT64: return backward_any<double>(grad, row, grad_row, grad_weight, z);
        case TAMOE_BFLOAT16: return backward_any<port::bfloat16>(grad, row, grad_row, grad_weight, z);
        case TAMOE_FLOAT16: return backward_any<port::float16>(grad, row, grad_row, grad_weight, z);
        default: return TAMOE_BAD_ARGUMENT;
    }
}
