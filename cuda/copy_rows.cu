// Pack and copy-on-arrival: rows from one place to another, a warp a row.
#include "copy_row.h"

namespace {

constexpr int threads = 256;
constexpr int warps = threads / port::warp_size;

template <class Word>
__global__ void __launch_bounds__(threads)
    copy_rows_kernel(const Word* __restrict__ in, int64_t num_in, Word* __restrict__ out, int64_t num_out,
                     const int64_t* __restrict__ source, const int64_t* __restrict__ target, int64_t num_copies,
                     int64_t words) {
    const int lane = static_cast<int>(threadIdx.x) % port::warp_size;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
    int64_t m = static_cast<int64_t>(blockIdx.x) * warps + static_cast<int>(threadIdx.x) / port::warp_size;
    for (; m < num_copies; m += stride) {
        const int64_t from = source ? source[m] : m;
        const int64_t to = target ? target[m] : m;
        if (from >= num_in || to >= num_out) port::refuse("a row's index is out of range");
        if (to < 0) continue;
        if (from >= 0) {
            rows::copy(in + from * words, out + to * words, words, lane);
        } else {
            for (int64_t word = lane; word < words; word += port::warp_size) out[to * words + word] = Word{};
        }
    }
}

template <class Word>
int copy_words(const void* in, int64_t num_in, void* out, int64_t num_out, const int64_t* source,
               const int64_t* target, int64_t num_copies, int64_t row_bytes, void* stream) {
    const Word* in_words = static_cast<const Word*>(in);
    Word* out_words = static_cast<Word*>(out);
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    return PORT_LAUNCH(copy_rows_kernel<Word>, port::blocks_for(num_copies, warps), threads, 0, stream, in_words,
                       num_in, out_words, num_out, source, target, num_copies, words);
}

}  // namespace

int tamoe_copy_rows(const void* in, int64_t num_in, void* out, int64_t num_out, const int64_t* source,
                    const int64_t* target, int64_t num_copies, int64_t row_bytes, void* stream) {
    if (num_in < 0 || num_out < 0 || num_copies < 0 || row_bytes < 0) return TAMOE_BAD_ARGUMENT;
    if (num_copies == 0 || row_bytes == 0) return 0;
    // The widest word that every row starts at: rows of 2,046 bytes are moved in words of 2.
    const auto fits = [&](int64_t bytes) {
        return port::aligned(in, bytes) && port::aligned(out, bytes) && row_bytes % bytes == 0;
    };
    if (fits(16))
        return copy_words<uint4>(in, num_in, out, num_out, source, target, num_copies, row_bytes, stream);
    if (fits(8))
        return copy_words<uint64_t>(in, num_in, out, num_out, source, target, num_copies, row_bytes, stream);
    if (fits(4))
        return copy_words<uint32_t>(in, num_in, out, num_out, source, target, num_copies, row_bytes, stream);
    if (fits(2))
        return copy_words<uint16_t>(in, num_in, out, num_out, source, target, num_copies, row_bytes, stream);
    return copy_words<uint8_t>(in, num_in, out, num_out, source, target, num_copies, row_bytes, stream);
}
