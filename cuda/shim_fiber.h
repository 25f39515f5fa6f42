// Switching between stacks: 14 instructions on x86-64, 17 on aarch64, ucontext elsewhere (or with
// -DTAMOE_SHIM_UCONTEXT).
#pragma once

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#if !defined(TAMOE_SHIM_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define TAMOE_SHIM_UCONTEXT
#endif
#ifdef TAMOE_SHIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

using Stack = char*;
constexpr size_t stack_bytes = 128 * 1024;  // address sanitizer's frames are large

struct Stacks {
    std::vector<Stack> free;
    ~Stacks() {
        for (Stack stack : free) munmap(stack, stack_bytes);
    }
};
inline thread_local Stacks stacks;

inline Stack take_stack() {
    if (stacks.free.empty()) {
        void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        return static_cast<Stack>(memory);
    }
    Stack stack = stacks.free.back();
    stacks.free.pop_back();
    return stack;
}

inline void return_stack(Stack stack) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, stack_bytes);  // a fiber that failed left its marks
#endif
    stacks.free.push_back(stack);
}

#ifdef TAMOE_SHIM_UCONTEXT

struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void start_context(Context& context, Stack stack, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = stack_bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#else

struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void tamoe_shim_switch(void** save_stack_pointer, void* stack_pointer);

inline void switch_context(Context& from, Context& to) { tamoe_shim_switch(&from.stack_pointer, to.stack_pointer); }

#if defined(__x86_64__)

asm(R"(
    .text
    .weak tamoe_shim_switch
    .hidden tamoe_shim_switch
    .type tamoe_shim_switch, @function
tamoe_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tamoe_shim_switch, . - tamoe_shim_switch
)");

inline void start_context(Context& context, Stack stack, void (*entry)()) {
    // From the top: a return address that is never used, the entry, six registers. The stack is then
    // aligned as after a call.
    void** top = reinterpret_cast<void**>(stack + stack_bytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    context.stack_pointer = top - 8;
}

#else  // aarch64

asm(R"(
    .text
    .weak tamoe_shim_switch
    .hidden tamoe_shim_switch
    .type tamoe_shim_switch, %function
tamoe_shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size tamoe_shim_switch, . - tamoe_shim_switch
)");

inline void start_context(Context& context, Stack stack, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(stack + stack_bytes) - 20;
    for (int i = 0; i < 20; ++i) frame[i] = nullptr;
    frame[11] = reinterpret_cast<void*>(entry);  // the link register
    context.stack_pointer = frame;
}

#endif
#endif

}  // namespace shim
