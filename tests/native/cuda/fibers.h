// Test only: the threads of one CUDA block as fibers of one CPU thread. A fiber runs until it waits at a barrier; then
// the next one does. Barriers are those of a block, of a warp's lanes by their mask, and of a block's named ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;

// What the tests set: whether fibers run from the last to the first, and the device's multiprocessors.
inline bool reversed = false;
inline int multiprocessors = 3;
// Why a launch failed; "" where none did.
inline std::string failure;

struct Barrier {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

// A value of each lane for the others: sides in turn, so that one barrier per exchange is enough.
struct Exchange {
    Barrier barrier;
    uint64_t values[2][kWarp];
    unsigned char side[kWarp] = {};
};

#if defined(__x86_64__)
using Context = void*;
// Saves where `from` stopped, goes on where `to` did; what System V has a callee keep lies on the stacks.
__attribute__((naked, noinline, noipa)) inline void switch_to(Context*, Context) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#else
using Context = ucontext_t;
inline void switch_to(Context* from, Context& to) { swapcontext(from, &to); }
#endif

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    dim3 index;
    unsigned number;
    bool done;
    const Barrier* waits;
    uint64_t generation;
};

struct Block {
    unsigned alive = 0;
    Barrier all;
    std::map<unsigned, Barrier> named;
    std::vector<std::map<unsigned, Exchange>> warps;  // by mask
};

inline std::vector<Fiber> fibers;
inline Fiber* running = nullptr;
inline Context scheduler;
inline Block block;
inline std::function<void()> body;

inline void leave() { switch_to(&running->context, scheduler); }

inline void record(const char* why) {
    failure = std::string(why) + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
              ", thread " + std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ")";
}

// What does not hold ends the launch: no fiber goes on.
inline void check(bool holds, const char* condition) {
    if (!holds) {
        record(condition);
        leave();
    }
}

inline void wait(Barrier& barrier, unsigned expected) {
    if (++barrier.arrived >= expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    running->waits = &barrier;
    running->generation = barrier.generation;
    leave();
}

inline unsigned lane() { return running->number % kWarp; }

// What every lane of the mask brought. All of them must come, with the same mask.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    check((mask >> lane() & 1) != 0, "a lane is in its own mask");
    Exchange& e = block.warps[running->number / kWarp][mask];
    const unsigned side = e.side[lane()];
    e.side[lane()] ^= 1;
    e.values[side][lane()] = value;
    wait(e.barrier, static_cast<unsigned>(__builtin_popcount(mask)));
    return e.values[side];
}

inline void enter() {
    body();
    running->done = true;
    leave();
}

inline void prepare(Fiber& fiber) {
    if (!fiber.stack) {
        fiber.stack = std::make_unique<char[]>(kStack);
    }
#if defined(__x86_64__)
    const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t{15};
    void** words = reinterpret_cast<void**>(top);
    words[-1] = nullptr;  // nobody to return to; the stack as a call would leave it
    words[-2] = reinterpret_cast<void*>(&enter);
    std::memset(words - 8, 0, 6 * sizeof(void*));
    fiber.context = words - 8;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
#endif
}

// One block to its end, or to a failure.
inline void run_block() {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    if (fibers.size() < count) {
        fibers.resize(count);
    }
    block = Block{};
    block.alive = count;
    block.warps.resize((count + kWarp - 1) / kWarp);
    for (unsigned i = 0; i < count; ++i) {
        Fiber& fiber = fibers[i];
        prepare(fiber);
        fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
        fiber.number = i;
        fiber.done = false;
        fiber.waits = nullptr;
    }
    const auto can_run = [](const Fiber& fiber) {
        return !fiber.done && (fiber.waits == nullptr || fiber.waits->generation != fiber.generation);
    };
    const unsigned warps = static_cast<unsigned>(block.warps.size());
    while (block.alive > 0) {
        bool moved = false;
        for (unsigned w = 0; w < warps; ++w) {
            const unsigned warp = reversed ? warps - 1 - w : w;
            // a warp goes on as far as it can: what it writes too early, the others will not find
            for (bool again = true; again;) {
                again = false;
                for (unsigned l = 0; l < kWarp; ++l) {
                    const unsigned i = warp * kWarp + (reversed ? kWarp - 1 - l : l);
                    if (i >= count || !can_run(fibers[i])) {
                        continue;
                    }
                    moved = again = true;
                    running = &fibers[i];
                    running->waits = nullptr;
                    threadIdx = running->index;
                    switch_to(&scheduler, running->context);
                    if (!failure.empty()) {
                        return;
                    }
                    if (running->done && --block.alive == block.all.arrived && block.alive > 0) {
                        block.all.arrived = 0;  // the others need not wait for this one
                        ++block.all.generation;
                    }
                }
            }
        }
        if (!moved) {
            record("a barrier that not all threads reach");
            return;
        }
    }
}

}  // namespace emulation
