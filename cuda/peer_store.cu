// Rows from every peer of a node into every other's receive buffer, with stores instead of messages.
//
// 1. post: each peer writes its counts into all others and raises its count flag there.
// 2. store: waits for all counts, works out where its rows go, stores them, raises its data flags.
// 3. wait: waits for all data flags.
// Flags are epochs that only grow, so nothing is reset. A peer raises its count flag only when it has
// read what came before, so no row is overwritten too early. Counts have two places in turn: a peer may
// post its next ones while another still reads the last.
#include "copy_row.h"

namespace {

constexpr int threads = 256;
constexpr int warps = threads / port::warp_size;
constexpr int max_peers = TAMOE_MAX_PEERS;
constexpr int first_flag = 8;  // words of the header in front of the flags; 0 counts finished blocks, 1 is the deadline
constexpr int64_t not_allowed = -1;  // in place of every count of a peer whose counts are not

struct Peers {
    char* memory[max_peers];
    int64_t header_bytes;
    int count, me;
    uint64_t epoch, timeout_ns;

    __device__ __forceinline__ uint64_t* words(int peer) const { return reinterpret_cast<uint64_t*>(memory[peer]); }
    __device__ __forceinline__ uint64_t* finished() const { return words(me); }
    __device__ __forceinline__ uint64_t* deadline() const { return words(me) + 1; }
    __device__ __forceinline__ uint64_t* count_flag(int at, int from) const { return words(at) + first_flag + from; }
    __device__ __forceinline__ uint64_t* data_flag(int at, int from) const { return count_flag(at, from) + count; }
    // What `from` sends to each peer, as written into the memory of `at`.
    __device__ __forceinline__ int64_t* counts(int at, int from) const {
        const int64_t place = static_cast<int64_t>(epoch % 2) * count + from;
        return reinterpret_cast<int64_t*>(words(at)) + first_flag + 2 * count + place * count;
    }
    __device__ __forceinline__ char* rows(int at) const { return memory[at] + header_bytes; }
};

int64_t header_bytes(int64_t num_peers) {
    const int64_t words = first_flag + 2 * num_peers + 2 * num_peers * num_peers;
    return (words * 8 + 255) / 256 * 256;
}

__device__ __forceinline__ bool wait_for(const uint64_t* flag, const Peers& peers) {
    const uint64_t deadline = *peers.deadline();  // one for all blocks, of which few may run at a time
    while (port::load_acquire(flag) < peers.epoch)
        if (port::clock_ns() > deadline) return false;
    return true;
}

__global__ void __launch_bounds__(max_peers)
    post_kernel(Peers peers, const int64_t* __restrict__ send_count, int64_t num_copies, int64_t* __restrict__ status) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer == 0) {
        *status = 0;
        *peers.finished() = 0;  // blocks that an exchange without an answer left uncounted
        *peers.deadline() = port::clock_ns() + peers.timeout_ns;
    }
    if (peer >= peers.count) return;
    int64_t left = num_copies;
    for (int i = 0; i < peers.count && left >= 0; ++i)
        left = send_count[i] < 0 || send_count[i] > left ? not_allowed : left - send_count[i];
    int64_t* there = peers.counts(peer, peers.me);
    for (int i = 0; i < peers.count; ++i) there[i] = left < 0 ? not_allowed : send_count[i];
    port::store_release(peers.count_flag(peer, peers.me), peers.epoch);  // after this thread's counts
}

template <class Word>
__global__ void __launch_bounds__(threads, 4)
    store_kernel(Peers peers, const Word* __restrict__ row, const int64_t* __restrict__ source, int64_t num_rows,
                 int64_t words, int64_t capacity_rows, int64_t* __restrict__ status) {
    __shared__ int64_t send_end[max_peers];    // rows of mine for peers up to this one
    __shared__ int64_t start[max_peers];       // where this peer's buffer has room for mine
    __shared__ int failed, refused, last;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) failed = refused = 0;
    __syncthreads();
    if (thread < peers.count && !wait_for(peers.count_flag(peers.me, thread), peers)) {
        *status = thread + 1;
        failed = 1;
    }
    __syncthreads();
    if (failed) return;
    if (thread < peers.count) {
        int64_t before = 0, all = 0, end = 0;
        for (int from = 0; from < peers.count; ++from) {
            const int64_t rows = peers.counts(peers.me, from)[thread];
            if (rows == not_allowed) {  // every peer sees it: none stores, all go on to their flags
                refused = 1;
                *status = -max_peers - from - 1;
            }
            if (from < peers.me) before += rows;
            all += rows;
        }
        for (int to = 0; to <= thread; ++to) end += peers.counts(peers.me, peers.me)[to];
        start[thread] = before;
        send_end[thread] = end;
        if (all > capacity_rows) *status = -thread - 1;  // every peer sees it
    }
    __syncthreads();
    const int lane = thread % port::warp_size;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
    const int64_t end = refused ? 0 : send_end[peers.count - 1];
    for (int64_t m = static_cast<int64_t>(blockIdx.x) * warps + thread / port::warp_size; m < end; m += stride) {
        int peer = 0;
        while (send_end[peer] <= m) ++peer;
        const int64_t to = start[peer] + m - (peer ? send_end[peer - 1] : 0);
        if (to >= capacity_rows) continue;
        const int64_t from = source ? source[m] : m;
        if (from < 0 || from >= num_rows) port::refuse("a row's index is out of range");
        rows::copy(row + from * words, reinterpret_cast<Word*>(peers.rows(peer)) + to * words, words, lane);
    }
    // The last block to finish raises the flags: behind the barrier and fence of every block.
    __syncthreads();
    if (thread == 0) {
        __threadfence_system();
        auto* finished = reinterpret_cast<unsigned long long*>(peers.finished());
        last = atomicAdd(finished, 1ull) == gridDim.x - 1;
        if (last) *finished = 0;
        __threadfence_system();
    }
    __syncthreads();
    if (last && thread < peers.count) port::store_release(peers.data_flag(thread, peers.me), peers.epoch);
}

__global__ void __launch_bounds__(max_peers)
    wait_kernel(Peers peers, int64_t* __restrict__ received_count, int64_t* __restrict__ status) {
    const int peer = static_cast<int>(threadIdx.x);
    if (peer >= peers.count) return;
    if (wait_for(peers.data_flag(peers.me, peer), peers)) {
        const int64_t rows = peers.counts(peers.me, peer)[peers.me];
        received_count[peer] = rows == not_allowed ? 0 : rows;
    } else {
        received_count[peer] = 0;
        if (*status == 0) *status = peer + 1;
    }
}

template <class Word>
int store(const Peers& peers, const void* row, const int64_t* source, int64_t num_rows, int64_t num_copies,
          int64_t row_bytes, int64_t capacity_rows, int64_t* status, void* stream) {
    const Word* row_words = static_cast<const Word*>(row);
    const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t blocks = num_copies ? port::blocks_for(num_copies, warps) : 1;  // flags are raised in any case
    return PORT_LAUNCH(store_kernel<Word>, blocks, threads, 0, stream, peers, row_words, source, num_rows, words,
                       capacity_rows, status);
}

}  // namespace

int64_t tamoe_peer_header_bytes(int64_t num_peers) { return header_bytes(num_peers); }

int tamoe_peer_store(void* const* memory, int64_t num_peers, int64_t me, uint64_t epoch, const void* row,
                     const int64_t* source, int64_t num_rows, int64_t num_copies, int64_t row_bytes,
                     int64_t capacity_rows, const int64_t* send_count, int64_t* received_count, int64_t* status,
                     uint64_t timeout_ns, void* stream) {
    if (num_peers < 1 || me < 0 || me >= num_peers || epoch < 1 || num_rows < 0 || num_copies < 0 || row_bytes < 0 ||
        capacity_rows < 0)
        return TAMOE_BAD_ARGUMENT;
    if (num_peers > max_peers) return TAMOE_TOO_LARGE;
    Peers peers{};
    for (int64_t peer = 0; peer < num_peers; ++peer) {
        if (!port::aligned(memory[peer], 16)) return TAMOE_BAD_ARGUMENT;
        peers.memory[peer] = static_cast<char*>(memory[peer]);
    }
    peers.header_bytes = header_bytes(num_peers);
    peers.count = static_cast<int>(num_peers), peers.me = static_cast<int>(me);
    peers.epoch = epoch, peers.timeout_ns = timeout_ns;
    int code = PORT_LAUNCH(post_kernel, 1, max_peers, 0, stream, peers, send_count, num_copies, status);
    if (code) return code;
    const auto fits = [&](int64_t bytes) { return port::aligned(row, bytes) && row_bytes % bytes == 0; };
    if (fits(16)) {
        code = store<uint4>(peers, row, source, num_rows, num_copies, row_bytes, capacity_rows, status, stream);
    } else if (fits(4)) {
        code = store<uint32_t>(peers, row, source, num_rows, num_copies, row_bytes, capacity_rows, status, stream);
    } else {
        code = store<uint8_t>(peers, row, source, num_rows, num_copies, row_bytes, capacity_rows, status, stream);
    }
    if (code) return code;
    return PORT_LAUNCH(wait_kernel, 1, max_peers, 0, stream, peers, received_count, status);
}
