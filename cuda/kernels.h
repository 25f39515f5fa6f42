// The C interface of the kernels: plain types, so that one library serves every Python and torch.
//
// Every function returns 0, an error of CUDA (> 0) or one of the codes below; tamoe_message says what it
// means. Work is queued on the stream (a cudaStream_t) and nothing waits for the device. Pointers are
// device pointers; tensors are contiguous; sizes are counts of elements unless named bytes.
#pragma once

#include <stdint.h>

#define TAMOE_ABI 3

#define TAMOE_BAD_ARGUMENT (-1)   // a size, dtype or pointer that the function does not take
#define TAMOE_TOO_LARGE (-2)      // more experts or choices than the kernel is made for
#define TAMOE_SHIM_FAILED (-3)    // CPU build only: a deadlock or an index out of range

#define TAMOE_FLOAT32 0
#define TAMOE_FLOAT64 1
#define TAMOE_BFLOAT16 2
#define TAMOE_FLOAT16 3

#define TAMOE_API extern "C" __attribute__((visibility("default")))

TAMOE_API int tamoe_abi(void);
// What the build says of its sources (TAMOE_SOURCES); "" if nothing.
TAMOE_API const char* tamoe_sources(void);
TAMOE_API const char* tamoe_message(int code);
// Later calls of this thread run on that device.
TAMOE_API int tamoe_use_device(int device);
// 0 if that device, with its driver, can run these kernels.
TAMOE_API int tamoe_ready(void);
// CPU build only: the schedule of later launches; 0 is the fixed one. Others return TAMOE_BAD_ARGUMENT.
TAMOE_API int tamoe_shim_seed(uint64_t seed);

// Bytes of workspace that tamoe_build_index needs, or TAMOE_TOO_LARGE; num_groups 0 without groups.
TAMOE_API int64_t tamoe_build_index_workspace(int64_t num_choices, int64_t num_experts, int64_t num_groups);

// Stable order of choices by expert, and with group_of_expert the tokens that touch each group.
//   expert_index     [num_tokens * top_k] of index_bytes 4 or 8; -1 is dropped
//   group_of_expert  [num_experts] 0 .. num_groups - 1, or null: then the last three outputs are null
//   choice           [num_tokens * top_k] flat choices by expert, then by token; -1 behind the kept ones
//   expert_count     [num_experts]
//   refused          [1] choices that are neither -1 nor an expert; they count as dropped
//   touch_token      [num_tokens * min(top_k, num_groups)] tokens by group, each once; -1 behind them
//   touch_count      [num_groups]
//   touch_row        [num_tokens * top_k] for each entry of choice, its token's row within its group
TAMOE_API int tamoe_build_index(const void* expert_index, int index_bytes, int64_t num_tokens, int64_t top_k,
                                int64_t num_experts, const int32_t* group_of_expert, int64_t num_groups,
                                void* workspace, int64_t* choice, int64_t* expert_count, int64_t* refused,
                                int64_t* touch_token, int64_t* touch_count, int64_t* touch_row, void* stream);

// out[target[m]] = in[source[m]] for m < num_copies; a null index is m itself. A negative source stores
// zeros, a negative target stores nothing; an index beyond the rows stops the kernel.
TAMOE_API int tamoe_copy_rows(const void* in, int64_t num_in, void* out, int64_t num_out, const int64_t* source,
                              const int64_t* target, int64_t num_copies, int64_t row_bytes, void* stream);

// out[s] = sum of row[index[j]] * weight[j], j from offset[s] to offset[s + 1] - 1, in that order. Each
// product is rounded to dtype, the sum is made in float (double for doubles), starts with its first term
// and is rounded to dtype at its end; an empty one is 0. index and weight have num_terms entries. weight is float (double for doubles) or null.
TAMOE_API int tamoe_combine(int dtype, const void* row, int64_t num_rows, const int64_t* offset,
                            const int64_t* index, int64_t num_terms, const void* weight, void* out,
                            int64_t num_sums, int64_t width, void* stream);

// grad_row[index[j]] = grad[s] * weight[j], rounded to dtype; rows that no sum has are left as they are.
// grad_weight[j] = dot(grad[s], row[index[j]]); null, as is weight, where there are no weights.
TAMOE_API int tamoe_combine_backward(int dtype, const void* grad, const void* row, int64_t num_rows,
                                     const int64_t* offset, const int64_t* index, int64_t num_terms,
                                     const void* weight, void* grad_row, void* grad_weight, int64_t num_sums,
                                     int64_t width, void* stream);

// Memory of this process that the other processes of a node map, on one GPU or on GPUs with peer access.
//   address  where the memory is; zeroed when tamoe_share_memory returns, which waits for the device
//   handle   [TAMOE_HANDLE_BYTES] on the host, to hand to another process
// It lives until its process ends: nobody else knows when the last peer is done with it. The CPU build has none.
#define TAMOE_HANDLE_BYTES 64
TAMOE_API int tamoe_share_memory(int64_t bytes, void** address, void* handle);
TAMOE_API int tamoe_map_memory(const void* handle, void** address);
TAMOE_API int tamoe_unmap_memory(void* address);

// Rows straight into the receive buffers of peers, which this process has mapped. Each peer's memory is a
// header of tamoe_peer_header_bytes, zeroed once, then capacity_rows rows. Rows arrive by sender, each
// sender's in its order; where they go is worked out on the device, from counts that the peers exchange.
//   memory          [num_peers] addresses, on the host, of every peer's memory as mapped here; own included
//   epoch           1, 2, 3, ... the same at every peer: the number of this exchange
//   source          [num_copies] row of each copy, or null for 0, 1, 2, ...; sorted by target peer
//   send_count      [num_peers] rows for each peer, in all up to num_copies; rows behind their sum are not sent
//   received_count  [num_peers] rows that came from each peer
//   status          [1] 0; p + 1 when peer p did not answer in time; -p - 1 when peer p's buffer is too small;
//                   -TAMOE_MAX_PEERS - p - 1 when the counts of peer p are not allowed: then no row is stored
//   timeout_ns      from when the exchange begins on the device
// Received rows must be read on the same stream before the next exchange starts.
#define TAMOE_MAX_PEERS 64
TAMOE_API int64_t tamoe_peer_header_bytes(int64_t num_peers);
TAMOE_API int tamoe_peer_store(void* const* memory, int64_t num_peers, int64_t me, uint64_t epoch, const void* row,
                               const int64_t* source, int64_t num_rows, int64_t num_copies, int64_t row_bytes,
                               int64_t capacity_rows, const int64_t* send_count, int64_t* received_count,
                               int64_t* status, uint64_t timeout_ns, void* stream);
