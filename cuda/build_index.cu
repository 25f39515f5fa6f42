// The order in which choices travel: a stable counting sort by expert, without a host round trip.
//
// Choices are cut into tiles. One pass counts each tile's choices by key, one block scans the counts of
// all (key, tile), one pass places each tile. The de-duplicated list is the same sort once more: its key
// is the expert's group at a token's first choice in that group, and none at its other choices there.
#include "port.h"

namespace {

constexpr int tile = 2048;  // choices of a block
constexpr int max_warps = 8;
constexpr int scan_threads = 1024;
constexpr int64_t shared_limit = 48 * 1024;

struct Workspace {
    int32_t *key, *group_key, *row_of_choice, *expert_base, *group_base;
};

int64_t tiles_of(int64_t num_choices) { return (num_choices + tile - 1) / tile; }

Workspace lay_out(void* memory, int64_t num_choices, int64_t num_experts, int64_t num_groups, int64_t* words) {
    int32_t* next = static_cast<int32_t*>(memory);
    const int64_t grouped = num_groups > 0 ? num_choices : 0;
    const int64_t size[] = {num_choices, grouped, grouped, num_experts * tiles_of(num_choices),
                            num_groups * tiles_of(num_choices)};
    int32_t* part[5];
    *words = 0;
    for (int i = 0; i < 5; ++i) {
        part[i] = next ? next + *words : nullptr;
        *words += size[i];
    }
    return {part[0], part[1], part[2], part[3], part[4]};
}

// Keys of every choice, -1 for none; and -1 in every output behind what will be placed there.
template <class Index>
__global__ void keys_kernel(const Index* __restrict__ expert_index, int32_t num_choices, int32_t top_k,
                            int64_t num_experts, const int32_t* __restrict__ group_of_expert, int64_t num_groups,
                            Workspace work, int64_t* __restrict__ choice, int64_t* __restrict__ refused,
                            int64_t* __restrict__ touch_token, int64_t num_touches,
                            int64_t* __restrict__ touch_row) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; c < num_choices; c += stride) {
        const Index expert = expert_index[c];
        const bool kept = expert >= 0 && expert < num_experts;
        if (!kept && expert != -1) atomicAdd(reinterpret_cast<unsigned long long*>(refused), 1ull);
        work.key[c] = kept ? static_cast<int32_t>(expert) : -1;
        choice[c] = -1;
        if (!group_of_expert) continue;
        int32_t group = -1;
        if (kept) {
            group = group_of_expert[expert];
            if (group < 0 || group >= num_groups) port::refuse("an expert's group is out of range");
            for (int64_t earlier = c / top_k * top_k; earlier < c; ++earlier) {
                const Index other = expert_index[earlier];
                if (other >= 0 && other < num_experts && group_of_expert[other] == group) group = -1;
            }
        }
        work.group_key[c] = group;
        touch_row[c] = -1;
        if (c < num_touches) touch_token[c] = -1;
    }
}

// base[key * tiles + tile] = choices of that key in that tile.
__global__ void count_kernel(const int32_t* __restrict__ key, int32_t num_choices, int32_t num_keys,
                             int32_t* __restrict__ base) {
    PORT_DYNAMIC_SHARED(int32_t, count);
    for (int i = static_cast<int>(threadIdx.x); i < num_keys; i += static_cast<int>(blockDim.x)) count[i] = 0;
    __syncthreads();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
    const int64_t end = first + tile < num_choices ? first + tile : num_choices;
    for (int64_t c = first + threadIdx.x; c < end; c += blockDim.x)
        if (key[c] >= 0) atomicAdd(&count[key[c]], 1);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < num_keys; i += static_cast<int>(blockDim.x))
        base[static_cast<int64_t>(i) * gridDim.x + blockIdx.x] = count[i];
}

// Exclusive scan of base, in place, by one block; and each key's count.
__global__ void __launch_bounds__(scan_threads)
    scan_kernel(int32_t* __restrict__ base, int32_t num_keys, int32_t num_tiles, int64_t* __restrict__ key_count) {
    __shared__ int32_t warp_total[scan_threads / port::warp_size];
    __shared__ int32_t carry;
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % port::warp_size, warp = thread / port::warp_size;
    const int64_t size = static_cast<int64_t>(num_keys) * num_tiles;
    if (thread == 0) carry = 0;
    for (int64_t start = 0; start < size; start += scan_threads) {
        const int64_t i = start + thread;
        const int32_t own = i < size ? base[i] : 0;
        int32_t sum = own;
        for (int by = 1; by < port::warp_size; by *= 2) {
            const int32_t left = __shfl_up_sync(port::all_lanes, sum, by);
            if (lane >= by) sum += left;
        }
        if (lane == port::warp_size - 1) warp_total[warp] = sum;
        __syncthreads();
        if (warp == 0) {
            int32_t total = warp_total[lane];
            for (int by = 1; by < port::warp_size; by *= 2) {
                const int32_t left = __shfl_up_sync(port::all_lanes, total, by);
                if (lane >= by) total += left;
            }
            warp_total[lane] = total;
        }
        __syncthreads();
        const int32_t before = carry + (warp ? warp_total[warp - 1] : 0) + sum - own;
        if (i < size) base[i] = before;
        __syncthreads();  // carry was read, warp_total too
        if (thread == scan_threads - 1) carry = before + own;
    }
    __syncthreads();
    for (int key = thread; key < num_keys; key += scan_threads) {
        const int64_t next = static_cast<int64_t>(key + 1) * num_tiles;
        key_count[key] = (next < size ? base[next] : carry) - base[next - num_tiles];
    }
}

// Where a placed choice goes: into the order by expert, or into the list of its group's tokens.
struct Placed {
    int64_t* choice;         // by expert, or null
    int64_t* touch_token;    // by group
    int32_t* row_of_choice;  // by group
    int32_t top_k;

    __device__ __forceinline__ void operator()(int32_t c, int32_t position, int32_t start) const {
        if (choice) {
            choice[position] = c;
        } else {
            touch_token[position] = c / top_k;
            row_of_choice[c] = position - start;
        }
    }
};

// A warp takes a run of its tile, 32 choices at a time: the lanes with one key line up by lane.
__global__ void place_kernel(const int32_t* __restrict__ key, int32_t num_choices, int32_t num_keys,
                             const int32_t* __restrict__ base, Placed placed) {
    PORT_DYNAMIC_SHARED(int32_t, next);  // [warps, num_keys] position of the next choice of each key
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % port::warp_size, warp = thread / port::warp_size, warps = threads / port::warp_size;
    const int run = tile / warps;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile + static_cast<int64_t>(warp) * run;
    int32_t* mine = next + static_cast<int64_t>(warp) * num_keys;
    for (int i = thread; i < warps * num_keys; i += threads) next[i] = 0;
    __syncthreads();
    for (int at = lane; at < run && first + at < num_choices; at += port::warp_size)
        if (key[first + at] >= 0) atomicAdd(&mine[key[first + at]], 1);
    __syncthreads();
    for (int i = thread; i < num_keys; i += threads) {
        int32_t position = base[static_cast<int64_t>(i) * gridDim.x + blockIdx.x];
        for (int w = 0; w < warps; ++w) {
            const int32_t count = next[w * num_keys + i];
            next[w * num_keys + i] = position;
            position += count;
        }
    }
    __syncthreads();
    for (int at = lane; at < run; at += port::warp_size) {
        const int64_t c = first + at;
        const int32_t own = c < num_choices ? key[c] : -1;
        const unsigned same = __match_any_sync(port::all_lanes, own);
        const int rank = __popc(same & ((1u << lane) - 1));
        if (own >= 0) {
            const int32_t start = base[static_cast<int64_t>(own) * gridDim.x];
            placed(static_cast<int32_t>(c), mine[own] + rank, start);
        }
        __syncwarp();
        if (own >= 0 && rank == 0) mine[own] += __popc(same);
        __syncwarp();
    }
}

// For each choice in order by expert, the row of its token within its group.
__global__ void touch_row_kernel(const int64_t* __restrict__ choice, int64_t num_choices, int32_t top_k,
                                 const int32_t* __restrict__ group_of_expert, Workspace work,
                                 int64_t* __restrict__ touch_row) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_choices; i += stride) {
        const int64_t c = choice[i];
        if (c < 0) continue;
        const int32_t group = group_of_expert[work.key[c]];
        int64_t first = c / top_k * top_k;
        while (work.group_key[first] != group) ++first;  // ends at c at the latest
        touch_row[i] = work.row_of_choice[first];
    }
}

int warps_for(int64_t num_keys) {
    int warps = max_warps;
    while (warps > 1 && warps * num_keys * 4 > shared_limit) warps /= 2;
    return warps;
}

int sort(const int32_t* key, int32_t num_choices, int32_t num_keys, int32_t* base, int64_t* key_count, Placed placed,
         void* stream) {
    const int64_t tiles = tiles_of(num_choices);
    const int warps = warps_for(num_keys), threads = warps * port::warp_size;
    const int64_t shared = static_cast<int64_t>(num_keys) * 4;
    int code = PORT_LAUNCH(count_kernel, tiles, 256, shared, stream, key, num_choices, num_keys, base);
    if (code) return code;
    code = PORT_LAUNCH(scan_kernel, 1, scan_threads, 0, stream, base, num_keys, static_cast<int32_t>(tiles),
                       key_count);
    if (code) return code;
    return PORT_LAUNCH(place_kernel, tiles, threads, shared * warps, stream, key, num_choices, num_keys, base,
                       placed);
}

}  // namespace

static bool too_large(int64_t num_choices, int64_t num_experts, int64_t num_groups) {
    return num_choices > INT32_MAX - tile || num_experts * 4 > shared_limit || num_groups * 4 > shared_limit;
}

int64_t tamoe_build_index_workspace(int64_t num_choices, int64_t num_experts, int64_t num_groups) {
    if (too_large(num_choices, num_experts, num_groups)) return TAMOE_TOO_LARGE;
    int64_t words = 0;
    lay_out(nullptr, num_choices, num_experts, num_groups, &words);
    return words * 4;
}

int tamoe_build_index(const void* expert_index, int index_bytes, int64_t num_tokens, int64_t top_k,
                      int64_t num_experts, const int32_t* group_of_expert, int64_t num_groups, void* workspace,
                      int64_t* choice, int64_t* expert_count, int64_t* refused, int64_t* touch_token,
                      int64_t* touch_count, int64_t* touch_row, void* stream) {
    if (num_tokens < 0 || top_k < 1 || num_experts < 1 || (index_bytes != 4 && index_bytes != 8) ||
        (group_of_expert != nullptr) != (num_groups > 0))
        return TAMOE_BAD_ARGUMENT;
    if (num_tokens > INT32_MAX / top_k || too_large(num_tokens * top_k, num_experts, num_groups)) return TAMOE_TOO_LARGE;
    const int32_t num_choices = static_cast<int32_t>(num_tokens * top_k), k = static_cast<int32_t>(top_k);
    const int32_t experts = static_cast<int32_t>(num_experts), groups = static_cast<int32_t>(num_groups);
    int code = port::clear(refused, 8, stream);
    if (!code && num_choices == 0) {
        code = port::clear(expert_count, static_cast<size_t>(num_experts) * 8, stream);
        if (!code && groups) code = port::clear(touch_count, static_cast<size_t>(num_groups) * 8, stream);
        return code;
    }
    if (code) return code;
    int64_t words = 0;
    const Workspace work = lay_out(workspace, num_choices, num_experts, num_groups, &words);
    const int64_t num_touches = num_tokens * (top_k < num_groups ? top_k : num_groups);
    const int64_t blocks = port::blocks_for(num_choices, 256);
    if (index_bytes == 4) {
        code = PORT_LAUNCH(keys_kernel<int32_t>, blocks, 256, 0, stream, static_cast<const int32_t*>(expert_index),
                           num_choices, k, num_experts, group_of_expert, num_groups, work, choice, refused,
                           touch_token, num_touches, touch_row);
    } else {
        code = PORT_LAUNCH(keys_kernel<int64_t>, blocks, 256, 0, stream, static_cast<const int64_t*>(expert_index),
                           num_choices, k, num_experts, group_of_expert, num_groups, work, choice, refused,
                           touch_token, num_touches, touch_row);
    }
    if (!code)
        code = sort(work.key, num_choices, experts, work.expert_base, expert_count,
                    Placed{choice, nullptr, nullptr, k}, stream);
    if (code || !groups) return code;
    code = sort(work.group_key, num_choices, groups, work.group_base, touch_count,
                Placed{nullptr, touch_token, work.row_of_choice, k}, stream);
    if (code) return code;
    return PORT_LAUNCH(touch_row_kernel, blocks, 256, 0, stream, choice, num_choices, k, group_of_expert, work,
                       touch_row);
}
