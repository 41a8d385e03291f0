// Sums over rows by task, in two stages without atomics. Stage 1: blocks share rows out in runs of neighbours, and
// leave a float32 partial sum per sequence that a run meets, run i and sequence s in slot i + s: along the rows either
// rises from part to part, so each slot has one owner. Where many short sequences share a run, slots are (run, task).
// Stage 2, here: a task's slots, or all, are added in their order and in double.
#pragma once

#include "common.cuh"

namespace camtl::cuda {

constexpr int kSlotColumns = 32;  // of a block of stage 2
constexpr int kSlotLanes = 32;  // threads that share a column there
constexpr int kSlotsAhead = 4;  // loads of a thread in flight

struct Slots {
    int count;
    int per_run;  // 0: slot run + sequence; else how many a run has: one per task

    // The slot of a part of sequence s (of a task) in a run.
    __host__ __device__ int64_t at(int run, int s, int task) const {
        return per_run > 0 ? int64_t{run} * per_run + task : int64_t{run} + s;
    }
};

inline Slots slots(int64_t runs, const Layout& l, const char* op) {
    const int64_t by_sequence = l.batch > 0 && runs > 0 ? runs + l.batch - 1 : 0;
    const bool per_task = by_sequence > runs * l.tasks;
    return {as_int(per_task ? runs * l.tasks : by_sequence, op, "partial sums"),
            per_task ? static_cast<int>(l.tasks) : 0};
}

// Which sequences have a slot in a run of rows [begin, end): those from the owner of its first row to that of the next
// run's first row, empty ones too; the first run has all before, the last all after.
struct Met {
    int first, last;

    __device__ __forceinline__ Met(const Sequences& s, int begin, int end, bool begins, bool ends) {
        const int owner = begins ? 0 : s.owner(begin), next = ends ? kNoSequence : s.owner(end);
        first = owner == kNoSequence ? s.batch - 1 : owner;
        last = next == kNoSequence ? s.batch - 1 : next;
    }
};

// The task whose sums slot run + s has, -1 if none: what its owner writes into `tasks`.
__device__ __forceinline__ int slot_task(const Sequences& sequences, int s, int begin, int end) {
    const int low = sequences.begin(s), high = sequences.end(s), task = sequences.task(s);
    return task >= 0 && (low > begin ? low : begin) < (high < end ? high : end) ? task : -1;
}

// Bytes of a workspace [count, width] of floats, and of tasks [count] behind it.
inline int64_t slot_bytes(const Slots& s, int64_t width) {
    return divide_up(int64_t{s.count} * width * int64_t{sizeof(float)}, 16) * 16;
}
inline int64_t slots_workspace(const Slots& s, int64_t width) {
    return slot_bytes(s, width) + (s.per_run > 0 ? 0 : int64_t{s.count} * int64_t{sizeof(int)});
}
inline int* slot_tasks(const Slots& s, int64_t width, void* workspace) {
    return s.per_run > 0 || workspace == nullptr
               ? nullptr
               : reinterpret_cast<int*>(static_cast<char*>(workspace) + slot_bytes(s, width));
}

// In a block (kSlotColumns, kSlotLanes): the sum of from[slot * width] over the slots of a task, or (kEvery) of every
// one, each times factor(task); `tasks` null without slots by sequence. Whole in lane 0; the whole block must come.
constexpr int kEvery = -2;

template <class Factor>
__device__ __forceinline__ double sum_slots(const Slots& s, const int* __restrict__ tasks, int task, bool inside,
                                            const float* __restrict__ from, int64_t width, Factor&& factor) {
    __shared__ double parts[kSlotLanes][kSlotColumns];
    const int lane = static_cast<int>(threadIdx.y);
    double sum = 0.0;
    // (run, task): one in per_run; else they are looked through
    const int step = s.per_run > 0 && task != kEvery ? s.per_run : 1, first = step > 1 ? task : 0;
    for (int top = first + lane * step; inside && top < s.count; top += kSlotLanes * kSlotsAhead * step) {
        int own[kSlotsAhead];
        float part[kSlotsAhead];
#pragma unroll
        for (int i = 0; i < kSlotsAhead; ++i) {
            const int slot = top + i * kSlotLanes * step;
            own[i] = slot >= s.count ? -1 : s.per_run > 0 ? slot % s.per_run : tasks != nullptr ? tasks[slot] : 0;
        }
#pragma unroll
        for (int i = 0; i < kSlotsAhead; ++i) {
            const bool wanted = own[i] >= 0 && (task == kEvery || own[i] == task);
            part[i] = wanted ? from[int64_t{top + i * kSlotLanes * step} * width] : 0.0f;
            own[i] = wanted ? own[i] : -1;
        }
#pragma unroll
        for (int i = 0; i < kSlotsAhead; ++i) {
            if (own[i] >= 0) {
                sum += factor(own[i]) * part[i];
            }
        }
    }
    parts[lane][threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSlotLanes / 2; half > 0; half /= 2) {
        if (lane < half) {
            parts[lane][threadIdx.x] += parts[lane + half][threadIdx.x];
        }
        __syncthreads();
    }
    return parts[0][threadIdx.x];
}

}  // namespace camtl::cuda
