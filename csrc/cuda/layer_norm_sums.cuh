// Sums over rows in conditional_layer_norm's backward pass: who sums which rows, where partial sums go, and the kernel
// that ends them (stage 2).
#pragma once

#include "layer_norm.cuh"
#include "partials.cuh"

namespace camtl::cuda {
namespace {

constexpr char kOp[] = "conditional_layer_norm";
constexpr int kColumnsOfThread = 8;
constexpr int kThreads = 32 * kMaxWarps;
constexpr int kWarpsOfMultiprocessor = 16;  // 128 registers each thread
constexpr int kLeastRows = 16;  // of a block's run, or the slots' bytes would count

// Who runs through which rows, and where partial sums go.
struct Runs {
    int teams;  // of a block: that share its rows, each row by one of them
    int each;  // rows of a block
    int blocks;
    bool by_sequence;  // there are tables (or no sequences); else all rows are one sequence
    Slots slots;
};

Runs runs(const Layout& l, int64_t features, int device) {
    Runs r{};
    const int warps = static_cast<int>(row_warps(features, kColumnsOfThread));
    r.teams = warps >= 4 ? 1 : 4 / warps;
    const int64_t most = int64_t{multiprocessors(device, kOp)} * (kWarpsOfMultiprocessor / (warps * r.teams));
    int64_t each = divide_up(divide_up(l.rows, most), r.teams) * r.teams;
    each = each < kLeastRows ? kLeastRows : each;
    r.each = as_int(each, kOp, "rows");
    r.blocks = static_cast<int>(divide_up(l.rows, each));
    r.by_sequence = l.task_ids != nullptr || l.batch == 0;
    r.slots = r.by_sequence ? slots(r.blocks, l, kOp) : Slots{r.blocks, 0};
    return r;
}

// The kinds of sums that are wanted: each one's place among a slot's, or -1.
struct Kinds {
    int count = 0;
    int scale, shift, x;

    explicit Kinds(const ConditionalLayerNormBackward& b)
        : scale(take(b.dweight != nullptr || b.dgamma != nullptr || b.dbeta != nullptr)),
          shift(take(b.dbias != nullptr || b.dbias_shift != nullptr)),
          x(take(b.dx_bias != nullptr)) {}

private:
    int take(bool wanted) { return wanted ? count++ : -1; }
};

// A thread's sums of one kind over rows, for its columns.
template <int V, int kPacks>
using Sums = float[kPacks][V];

template <int V, int kPacks>
__device__ __forceinline__ void clear(Sums<V, kPacks>& sums) {
#pragma unroll
    for (int i = 0; i < kPacks * V; ++i) {
        sums[i / V][i % V] = 0.0f;
    }
}

// All teams' sums of one kind into the slot, or added to what is there; they begin anew. The whole block must come.
template <int V, int kPacks>
__device__ __forceinline__ void flush(float* slot, int packs, bool add, Sums<V, kPacks>& sums, float* shared) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y), self = threadIdx.y * blockDim.x + threadIdx.x;
    if (blockDim.y > 1) {
        __syncthreads();  // what was there has been read
#pragma unroll
        for (int i = 0; i < kPacks * V; ++i) {
            shared[i * threads + self] = sums[i / V][i % V];
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const int pack = static_cast<int>(threadIdx.x + k * blockDim.x);
        if (threadIdx.y == 0 && pack < packs) {
            float* to = slot + int64_t{pack} * V;
            Pack<float, V> out{};
            if (add) {
                out = load<V>(to);
            }
#pragma unroll
            for (int i = 0; i < V; ++i) {
                float sum = sums[k][i];
                for (unsigned team = 1; team < blockDim.y; ++team) {
                    sum += shared[(k * V + i) * threads + team * blockDim.x + threadIdx.x];
                }
                out.v[i] += sum;
            }
            store<V>(to, out);
        }
    }
    clear<V, kPacks>(sums);
}

// What stage 2 makes of the slots. Data null: not wanted.
struct Output {
    void* data;
    bool narrow;
};

template <class S>
struct FinalArguments {
    Runs runs;
    Kinds kinds;
    int tasks;
    int64_t features;
    Parameter weight, gamma;
    const float* partials;
    const int* slot_tasks;
    Output dweight, dbias, dgamma, dbeta, dbias_shift, dx_bias;
};

// Block (kSlotColumns, kSlotLanes): columns of the sums of kind blockIdx.z, of task blockIdx.y or (the last) of all.
template <class S>
__global__ void __launch_bounds__(kSlotColumns* kSlotLanes) parameters_kernel(const FinalArguments<S> a) {
    const int task = blockIdx.y, kind = blockIdx.z;
    const bool whole = task == a.tasks;
    Output out{}, times_weight{};  // where the sum goes; where it goes times the weight
    if (kind == a.kinds.scale) {
        out = whole ? a.dweight : a.dbeta;
        times_weight = whole ? Output{} : a.dgamma;
    } else if (kind == a.kinds.shift) {
        out = whole ? a.dbias : a.dbias_shift;
    } else if (whole) {
        out = a.dx_bias;
    }
    if (out.data == nullptr && times_weight.data == nullptr) {
        return;  // the whole block
    }
    const int64_t column = int64_t{blockIdx.x} * kSlotColumns + threadIdx.x;
    const bool inside = column < a.features, scaled = whole && kind == a.kinds.scale && a.gamma.data != nullptr;
    const auto factor = [&](int own) {
        float gamma[1] = {0.0f};
        if (scaled) {
            read<S, 1>(a.gamma, own * a.gamma.stride + column, gamma);
        }
        return 1.0 + gamma[0];
    };
    const double sum = sum_slots(a.runs.slots, a.slot_tasks, whole ? kEvery : task, inside,
                                 a.partials + kind * a.features + column, a.kinds.count * a.features, factor);
    if (threadIdx.y == 0 && inside) {
        const int64_t at = whole ? column : task * a.features + column;
        if (out.data != nullptr) {
            write<S>(out.data, out.narrow, at, static_cast<float>(sum));
        }
        if (times_weight.data != nullptr) {
            float weight[1];
            read<S, 1>(a.weight, column, weight);
            write<S>(times_weight.data, times_weight.narrow, at, static_cast<float>(sum * weight[0]));
        }
    }
}

}  // namespace
}  // namespace camtl::cuda
