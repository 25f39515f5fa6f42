// Runs CUDA kernels on the CPU, for tests: g++ needs this header and no CUDA file at all.
//
// Every CUDA thread is a fiber, and a block's fibers share the calling thread. A fiber runs until it
// waits: at a barrier, in a warp intrinsic, in a spin. What waits for threads that never come is
// reported with block, thread and line instead of hanging. Two schedules: fixed (threads and blocks in
// order) and seeded (a random fiber next, blocks in random order, yields before atomics). The seed comes
// from TAMOE_SHIM_SEED or tamoe_shim_seed(); 0 is the fixed schedule.
//
// Not seen by it: races between plain accesses (fibers switch only where they wait) and weak memory
// order of the GPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "shim_fiber.h"
#include "shim_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

namespace shim {

enum class State : uint8_t { fresh, ready, at_barrier, in_warp, done };
enum class Op : uint8_t { shfl, up, down, exclusive_or, ballot, match_any, sync };

struct Fiber {
    dim3 thread;
    unsigned number = 0, warp = 0, lane = 0;
    State state = State::fresh;
    int line = 0;  // where it waits
    Context context;
    Stack stack;
    Op op = Op::sync;
    unsigned mask = 0;
    int argument = 0;
    uint64_t value = 0, result = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::deque<unsigned> ready;
    dim3 index, size, grid;
    unsigned arrived = 0, live = 0;
    char* shared = nullptr;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    Context scheduler;
    bool failed = false;
};

inline std::atomic<uint64_t>& seed() {
    static std::atomic<uint64_t> value{[] {
        const char* text = std::getenv("TAMOE_SHIM_SEED");
        return text ? std::strtoull(text, nullptr, 10) : 0ull;
    }()};
    return value;
}

inline thread_local Block* block = nullptr;
inline thread_local Fiber* current = nullptr;
inline thread_local std::string last_error;
inline thread_local std::mt19937_64 random;

inline std::string name(const Fiber& fiber) {
    return "block " + std::to_string(block->index.x) + " thread " + std::to_string(fiber.number);
}

inline void wait() { switch_context(current->context, block->scheduler); }

// Ends the launch with a message. Fibers are left as they are: kernels own nothing. It never returns, and
// is not marked so: the sanitizer would then look for the end of a thread's stack, which a fiber has not.
inline void fail(const std::string& message) {
    last_error = name(*current) + ": " + message;
    block->failed = true;
    wait();
}

inline void yield() {
    current->state = State::ready;
    block->ready.push_back(current->number);
    wait();
}

inline void maybe_yield() {
    if (seed() && random() % 4 == 0) yield();
}

inline void wake(Fiber& fiber) {
    fiber.state = State::ready;
    block->ready.push_back(fiber.number);
}

// The last to arrive sets the others free and goes on; a thread that has ended never arrives.
inline void barrier(int line) {
    Fiber& me = *current;
    me.state = State::at_barrier;
    me.line = line;
    if (++block->arrived < block->fibers.size()) return wait();
    block->arrived = 0;
    for (Fiber& other : block->fibers)
        if (other.line != line)
            fail("waits at the barrier of line " + std::to_string(line) + ", " + name(other) + " at that of line " +
                 std::to_string(other.line));
    for (Fiber& other : block->fibers)
        if (&other != &me) wake(other);
    me.state = State::ready;
    if (seed()) yield();
}

inline uint64_t warp_result(const Fiber& me, const Fiber* warp) {
    const auto in_mask = [&](int lane) { return lane >= 0 && lane < 32 && (me.mask >> lane & 1); };
    const int lane = static_cast<int>(me.lane);
    uint64_t bits = 0;
    int source = lane;
    switch (me.op) {
        case Op::shfl: source = me.argument & 31; break;
        case Op::up: source = lane - me.argument < 0 ? lane : lane - me.argument; break;
        case Op::down: source = lane + me.argument > 31 ? lane : lane + me.argument; break;
        case Op::exclusive_or: source = lane ^ me.argument; break;
        case Op::ballot:
            for (int i = 0; i < 32; ++i)
                if (in_mask(i) && warp[i].value) bits |= 1ull << i;
            return bits;
        case Op::match_any:
            for (int i = 0; i < 32; ++i)
                if (in_mask(i) && warp[i].value == me.value) bits |= 1ull << i;
            return bits;
        case Op::sync: return 0;
    }
    return in_mask(source) ? warp[source].value : 0xBADC0DEBADC0DEull;  // undefined on a GPU
}

// A meeting of the lanes in mask. The last lane computes every result, so that no lane can enter the
// next meeting while another still reads this one.
inline uint64_t meet(Op op, unsigned mask, uint64_t value, int argument, int line) {
    Fiber& me = *current;
    Fiber* warp = &block->fibers[me.warp * 32];
    const unsigned lanes = static_cast<unsigned>(block->fibers.size()) - me.warp * 32;
    if (!(mask >> me.lane & 1)) fail("is not in its own mask in line " + std::to_string(line));
    if (lanes < 32 && mask >> lanes) fail("names lanes that the block lacks in line " + std::to_string(line));
    me.op = op, me.mask = mask, me.value = value, me.argument = argument, me.line = line;
    me.state = State::in_warp;
    bool all = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& other = warp[lane];
        if (other.state != State::in_warp) {
            all = false;
        } else if (other.mask != mask || other.op != op || other.line != line) {
            fail("is in the intrinsic of line " + std::to_string(line) + ", " + name(other) + " in that of line " +
                 std::to_string(other.line) + ", with other lanes or another operation");
        }
    }
    if (!all) {
        wait();
        return me.result;
    }
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) warp[lane].result = warp_result(warp[lane], warp);
    for (unsigned lane = 0; lane < 32; ++lane)
        if ((mask >> lane & 1) && &warp[lane] != &me) wake(warp[lane]);
    me.state = State::ready;
    if (seed()) yield();
    return me.result;
}

template <class T>
T exchange(Op op, unsigned mask, T value, int argument, int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = meet(op, mask, bits, argument, line);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline void fiber_main() {
    block->body(block->argument);
    current->state = State::done;
    wait();
}

inline std::string deadlock() {
    unsigned at_barrier = 0, in_warp = 0, done = 0;
    const Fiber* example = nullptr;
    for (const Fiber& fiber : block->fibers) {
        at_barrier += fiber.state == State::at_barrier;
        in_warp += fiber.state == State::in_warp;
        done += fiber.state == State::done;
        if (!example && fiber.state != State::done) example = &fiber;
    }
    return "deadlock: " + name(*example) + " waits in line " + std::to_string(example->line) + "; of its block " +
           std::to_string(at_barrier) + " threads wait at a barrier, " + std::to_string(in_warp) +
           " in a warp intrinsic, " + std::to_string(done) + " have ended";
}

// A stack is taken when a fiber first runs and returned when it ends: kernels without barriers run on
// one hot stack.
inline void run_block() {
    while (!block->ready.empty() && !block->failed) {
        const size_t at = seed() ? random() % block->ready.size() : 0;
        std::swap(block->ready[at], block->ready.front());
        Fiber& fiber = block->fibers[block->ready.front()];
        block->ready.pop_front();
        if (fiber.state == State::fresh) {
            fiber.stack = take_stack();
            start_context(fiber.context, fiber.stack, fiber_main);
        }
        fiber.state = State::ready;
        current = &fiber;
        switch_context(block->scheduler, fiber.context);
        if (fiber.state == State::done) {
            return_stack(fiber.stack);
            --block->live;
        }
    }
    if (!block->failed && block->live) {
        last_error = deadlock();
        block->failed = true;
    }
    for (Fiber& fiber : block->fibers)
        if (fiber.state != State::done && fiber.state != State::fresh) return_stack(fiber.stack);
}

// Runs every block in turn. Returns false, with last_error set, as soon as one fails.
template <class Body>
bool launch(dim3 grid, dim3 size, size_t shared_bytes, Body body) {
    Block state;
    state.size = size;
    state.grid = grid;
    state.body = [](void* pointer) { (*static_cast<Body*>(pointer))(); };
    state.argument = &body;
    if (seed()) random.seed(seed());
    std::vector<unsigned> order(grid.x);
    for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
    for (unsigned i = grid.x; seed() && i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    for (unsigned index : order) {
        std::vector<char> shared(shared_bytes, static_cast<char>(0xA5));  // never zero by luck
        state.index = dim3(index);
        state.shared = shared.data();
        state.fibers.assign(size.x, Fiber{});
        state.live = size.x;
        state.arrived = 0;
        for (unsigned i = 0; i < size.x; ++i) {
            Fiber& fiber = state.fibers[i];
            fiber.thread = dim3(i, 0, 0);
            fiber.number = i, fiber.warp = i / 32, fiber.lane = i % 32;
            state.ready.push_back(i);
        }
        block = &state;
        run_block();
        block = nullptr;
        current = nullptr;
        if (state.failed) return false;
    }
    return true;
}

template <class T, class V>
T atomic_add(T* address, V value) {
    maybe_yield();
    if constexpr (std::is_floating_point_v<T>) {
        const T old = *address;
        *address = old + value;
        return old;
    } else {
        return __atomic_fetch_add(address, static_cast<T>(value), __ATOMIC_RELAXED);
    }
}

}  // namespace shim

#define threadIdx (::shim::current->thread)
#define blockIdx (::shim::block->index)
#define blockDim (::shim::block->size)
#define gridDim (::shim::block->grid)
#define __syncthreads() ::shim::barrier(__LINE__)
#define __syncwarp() ((void)::shim::meet(::shim::Op::sync, 0xFFFFFFFFu, 0, 0, __LINE__))
#define __shfl_sync(mask, value, lane) ::shim::exchange(::shim::Op::shfl, mask, value, lane, __LINE__)
#define __shfl_up_sync(mask, value, by) ::shim::exchange(::shim::Op::up, mask, value, by, __LINE__)
#define __shfl_down_sync(mask, value, by) ::shim::exchange(::shim::Op::down, mask, value, by, __LINE__)
#define __shfl_xor_sync(mask, value, by) ::shim::exchange(::shim::Op::exclusive_or, mask, value, by, __LINE__)
#define __ballot_sync(mask, predicate) \
    static_cast<unsigned>(::shim::meet(::shim::Op::ballot, mask, (predicate) ? 1 : 0, 0, __LINE__))
#define __match_any_sync(mask, value) \
    static_cast<unsigned>(::shim::meet(::shim::Op::match_any, mask, static_cast<uint64_t>(value), 0, __LINE__))
#define atomicAdd(address, value) ::shim::atomic_add(address, value)
#define __popc(value) __builtin_popcount(value)
#define __ffs(value) __builtin_ffs(static_cast<int>(value))
#define __threadfence() std::atomic_thread_fence(std::memory_order_seq_cst)
#define __threadfence_system() std::atomic_thread_fence(std::memory_order_seq_cst)
