// film: y = (1 + gamma[t]) * x + beta[t].
//
// Forward. A thread owns V neighbouring columns (16 bytes where alignment allows) of kRows rows: their loads are all in
// flight before the first is used; gamma and beta stay in registers as long as the task does. Bytes per element: read
// x, write y; the tables come from L1 and L2.
//
// Backward, stage 1. A persistent grid of two blocks per multiprocessor (more than 256 packs of columns: for each 256),
// each with a run of neighbouring rows, which it goes through sequence by sequence. A thread owns V columns of each
// blockDim.y-th row, kBackwardRows at a time, all loads before the first use; it writes dx, and sums dy * x and dy in
// registers until the sequence ends. Then the block adds its threads of the same columns up and leaves float32 partial
// sums in a slot [2, D] (partials.cuh). Stage 2 adds a task's slots up. No atomics: the same bits every time. Bytes per
// element: read dy and x, write dx, and 16 / (rows per part) for the slots.
//
// bf16, 16-byte accesses, sm_80 and sm_90: 52 and 64 registers forward (32 warps on a multiprocessor), 109 and
// 127, and 8 KiB of shared memory, back (16 warps); no spills. Two flops per element forward: bytes decide. Times: not
// measured.
#include "camtl/film.h"

#include "common.cuh"
#include "partials.cuh"

namespace camtl::cuda {
namespace {

constexpr char kOp[] = "film";
constexpr int kRows = 4;  // loads in flight per operand
constexpr int kBackwardRows = 3;  // in the backward pass: 4 do not fit into 128 registers
constexpr int kThreads = 256;  // of a block, at most
constexpr int kBlocks = 2;  // of a multiprocessor, in the backward pass
constexpr int kLeastRows = 16;  // of a run there, or the slots' bytes would count

// A block's rows in the backward pass.
struct Runs {
    int each;
    int count;
    Slots slots;
};

Runs runs(const Layout& l, int device) {
    const int64_t most = int64_t{kBlocks} * multiprocessors(device, kOp);
    int64_t each = divide_up(l.rows, most);
    each = each < kLeastRows ? kLeastRows : each;
    const int64_t count = divide_up(l.rows, each);
    return {as_int(each, kOp, "rows"), static_cast<int>(count), slots(count, l, kOp)};
}

template <class P>
struct Tables {
    const P* gamma;
    int64_t gamma_stride;  // elements from task to task
    const P* beta;
    int64_t beta_stride;
};

// Table values of one task; 1 + gamma in the place of gamma. Without beta the shift is of no use.
template <class P, int V>
__device__ __forceinline__ void read_tables(const Tables<P>& tables, int task, int64_t column, float (&scale)[V],
                                            float (&shift)[V]) {
    if (task >= 0) {
        const Pack<P, V> g = load<V>(tables.gamma + task * tables.gamma_stride + column);
        Pack<P, V> b = g;
        if (tables.beta != nullptr) {
            b = load<V>(tables.beta + task * tables.beta_stride + column);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
            scale[i] = 1.0f + widen(g.v[i]);
            shift[i] = widen(b.v[i]);
        }
        return;
    }
    const float value = task == kNoSequence ? 0.0f : __int_as_float(0x7fc00000);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        scale[i] = shift[i] = value;
    }
}

template <class S, class P, int V>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Sequences sequences, int packs, int64_t features, const S* __restrict__ x, int64_t x_stride,
                   Tables<P> tables, S* __restrict__ y) {
    const int pack = blockIdx.y * blockDim.x + threadIdx.x;
    const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (pack >= packs || group * kRows >= sequences.rows) {
        return;
    }
    const int row = static_cast<int>(group * kRows);
    const int64_t column = static_cast<int64_t>(pack) * V;
    Pack<S, V> values[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (row + r < sequences.rows) {
            values[r] = load_once<V>(x + (row + r) * x_stride + column);
        }
    }
    Walk walk(sequences, row);
    int task = sequences.task(walk.sequence);
    float scale[V], shift[V];
    read_tables<P, V>(tables, task, column, scale, shift);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (row + r < sequences.rows) {
            if (r > 0 && walk.moves_on(row + r)) {
                const int next = sequences.task(walk.sequence);
                if (next != task) {
                    task = next;
                    read_tables<P, V>(tables, task, column, scale, shift);
                }
            }
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const float modulated = fmaf(scale[i], widen(values[r].v[i]), shift[i]);
                values[r].v[i] = narrow<S>(task == kNoSequence ? 0.0f : modulated);
            }
            store<V>(y + (row + r) * features + column, values[r]);
        }
    }
}

// The sums of a column's threads into the slot, or added to what is there; they begin anew. The whole block must come.
template <int V>
__device__ __forceinline__ void flush(float* to, bool active, bool add, float (&sums)[V], float* shared) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    if (blockDim.y > 1) {
        __syncthreads();  // what was there has been read
#pragma unroll
        for (int i = 0; i < V; ++i) {
            shared[i * threads + threadIdx.y * blockDim.x + threadIdx.x] = sums[i];
        }
        __syncthreads();
    }
    if (active && threadIdx.y == 0) {
        Pack<float, V> out{};
        if (add) {
            out = load<V>(to);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float sum = sums[i];
            for (unsigned other = 1; other < blockDim.y; ++other) {
                sum += shared[i * threads + other * blockDim.x + threadIdx.x];
            }
            out.v[i] += sum;
        }
        store<V>(to, out);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
        sums[i] = 0.0f;
    }
}

template <class S, class P, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_kernel(Sequences sequences, Runs runs, int packs, int64_t features, const S* __restrict__ dy,
                    int64_t dy_stride, const S* __restrict__ x, int64_t x_stride, Tables<P> tables, S* __restrict__ dx,
                    float* __restrict__ partials, int* __restrict__ slot_tasks) {
    __shared__ float shared[kThreads * V];
    const int pack = blockIdx.y * blockDim.x + threadIdx.x, run = blockIdx.x;
    const int self = static_cast<int>(threadIdx.y), step = static_cast<int>(blockDim.y);
    const bool active = pack < packs, per_task = runs.slots.per_run > 0;
    const int64_t column = int64_t{pack} * V;
    const int begin = run * runs.each;
    const int end = sequences.rows - begin < runs.each ? sequences.rows : begin + runs.each;
    float products[V] = {}, sums[V] = {};
    const auto put_sums = [&](float* slot, bool add) {
        flush<V>(slot + column, active, add, products, shared);
        flush<V>(slot + features + column, active, add, sums, shared);
    };
    if (partials != nullptr && per_task) {
        for (int t = 0; t < sequences.tasks; ++t) {
            put_sums(partials + runs.slots.at(run, 0, t) * 2 * features, false);
        }
    }
    float* open = nullptr;  // the slot of the sums in registers
    const auto close = [&]() {
        if (open != nullptr) {
            put_sums(open, per_task);
        } else {  // of a task that is none
#pragma unroll
            for (int i = 0; i < V; ++i) {
                products[i] = sums[i] = 0.0f;
            }
        }
    };
    const Met met(sequences, begin, end, run == 0, run + 1 == runs.count);
    for (int s = met.first; s <= met.last; ++s) {
        const int low = sequences.begin(s) < begin ? begin : sequences.begin(s);
        const int high = sequences.end(s) < end ? sequences.end(s) : end, task = sequences.task(s);
        if (slot_tasks != nullptr && blockIdx.y == 0 && threadIdx.x == 0 && self == 0) {
            slot_tasks[int64_t{run} + s] = slot_task(sequences, s, begin, end);
        }
        if (low >= high) {
            continue;
        }
        float* slot =
            partials != nullptr && task >= 0 ? partials + runs.slots.at(run, s, task) * 2 * features : nullptr;
        if (open != slot) {  // (run, task): sums of neighbours with one task go on
            close();
            open = slot;
        }
        float scale[V], unused[V];
        if (active) {
            read_tables<P, V>(tables, task, column, scale, unused);
        }
        for (int top = low + self; active && top < high; top += step * kBackwardRows) {
            Pack<S, V> gradient[kBackwardRows], input[kBackwardRows];
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r) {
                const int row = top + r * step;
                if (row < high) {
                    gradient[r] = load_once<V>(dy + row * dy_stride + column);
                    if (x != nullptr) {
                        input[r] = load_once<V>(x + row * x_stride + column);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r) {
                const int row = top + r * step;
                if (row < high) {
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const float g = widen(gradient[r].v[i]);
                        sums[i] += g;
                        products[i] = x != nullptr ? fmaf(g, widen(input[r].v[i]), products[i]) : 0.0f;
                        gradient[r].v[i] = narrow<S>(g * scale[i]);
                    }
                    if (dx != nullptr) {
                        store<V>(dx + row * features + column, gradient[r]);
                    }
                }
            }
        }
    }
    close();
    // rows of no sequence
    const int stop = sequences.stop();
    for (int row = (stop > begin ? stop : begin) + self; active && dx != nullptr && row < end; row += step) {
        Pack<S, V> zero;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            zero.v[i] = narrow<S>(0.0f);
        }
        store<V>(dx + row * features + column, zero);
    }
}

// Block (kSlotColumns, kSlotLanes): columns of dgamma (blockIdx.z 0) or dbeta (1) of task blockIdx.y.
template <class P>
__global__ void __launch_bounds__(kSlotColumns* kSlotLanes)
    tables_kernel(Slots slots, int64_t features, const float* __restrict__ partials, const int* __restrict__ slot_tasks,
                  P* __restrict__ dgamma, P* __restrict__ dbeta) {
    P* out = blockIdx.z == 0 ? dgamma : dbeta;
    if (out == nullptr) {
        return;  // the whole block
    }
    const int task = blockIdx.y;
    const int64_t column = int64_t{blockIdx.x} * kSlotColumns + threadIdx.x;
    const bool inside = column < features;
    const double sum = sum_slots(slots, slot_tasks, task, inside, partials + blockIdx.z * features + column,
                                 2 * features, [](int) { return 1.0; });
    if (threadIdx.y == 0 && inside) {
        out[task * features + column] = narrow<P>(static_cast<float>(sum));
    }
}

// f(S{}, P{}, integral constant V): storage type, table type, and columns of a thread.
template <class F>
void with_types(DType dtype, DType tables, F&& f) {
    if (tables != DType::f32 && tables != dtype) {
        throw std::invalid_argument("film (cuda): tables must be float32 or of x's dtype");
    }
    switch (dtype) {
        case DType::f32:
            return f(float{}, float{});
        case DType::bf16:
            return tables == DType::f32 ? f(bf16{}, float{}) : f(bf16{}, bf16{});
        case DType::f16:
            return tables == DType::f32 ? f(f16{}, float{}) : f(f16{}, f16{});
        default:
            throw std::invalid_argument("film (cuda): float64 is not supported");
    }
}

struct Shape {
    dim3 grid, block;
};

// Blocks of up to kThreads threads: x over packs of columns, y over `groups` of rows.
Shape shape(int packs, int64_t groups) {
    const int column_blocks = static_cast<int>(divide_up(packs, kThreads));
    const int wide = static_cast<int>(divide_up(packs, column_blocks)), high = kThreads / wide;
    if (column_blocks > 65535) {
        throw std::invalid_argument("film (cuda): too many features");
    }
    return {dim3(static_cast<unsigned>(divide_up(groups, high)), column_blocks), dim3(wide, high)};
}

template <class S, class P, int V>
void run_forward(const FilmForward& a, const Sequences& sequences, int D, const Tables<P>& tables,
                 const Launch& where) {
    const Shape s = shape(D / V, divide_up(a.layout.rows, kRows));
    launch(kOp, forward_kernel<S, P, V>, s.grid, s.block, where, sequences, D / V, a.features,
           static_cast<const S*>(a.x), a.x_stride, tables, static_cast<S*>(a.y));
}

template <class S, class P, int V>
void run_backward(const FilmBackward& a, const Sequences& sequences, const Runs& runs, int D, const Tables<P>& tables,
                  float* partials, int* tasks, const Launch& where) {
    const Shape s = shape(D / V, 1);
    launch(kOp, backward_kernel<S, P, V>, dim3(static_cast<unsigned>(runs.count), s.grid.y), s.block, where, sequences,
           runs, D / V, a.features, static_cast<const S*>(a.dy), a.dy_stride,
           static_cast<const S*>(a.dgamma == nullptr ? nullptr : a.x), a.x_stride, tables, static_cast<S*>(a.dx),
           partials, tasks);
}

}  // namespace

void film_forward(const FilmForward& a, const FilmTables& strides, const Launch& where) {
    const Sequences rows = sequences(a.layout, where, kOp);
    const int D = as_int(a.features, kOp, "features");
    with_types(a.dtype, where.tables, [&](auto storage, auto table) {
        using S = decltype(storage);
        using P = decltype(table);
        check(cudaSetDevice(where.device), kOp);
        if (rows.rows == 0 || D == 0) {
            return;
        }
        const Tables<P> tables{static_cast<const P*>(a.gamma), strides.gamma_stride, static_cast<const P*>(a.beta),
                               strides.beta_stride};
        const auto fits = [&](int V) {
            return D % V == 0 && aligned<S>(V, a.x, a.x_stride) && aligned<S>(V, a.y, D) &&
                   aligned<P>(V, a.gamma, strides.gamma_stride) && aligned<P>(V, a.beta, strides.beta_stride);
        };
        constexpr int kWide = 16 / sizeof(S), kNarrow = 4 / sizeof(S);
        fits(kWide)     ? run_forward<S, P, kWide>(a, rows, D, tables, where)
        : fits(kNarrow) ? run_forward<S, P, kNarrow>(a, rows, D, tables, where)
                        : run_forward<S, P, 1>(a, rows, D, tables, where);
    });
}

int64_t film_backward_workspace(const FilmBackward& a, int device) {
    return a.dgamma == nullptr && a.dbeta == nullptr ? 0
                                                     : slots_workspace(runs(a.layout, device).slots, 2 * a.features);
}

void film_backward(const FilmBackward& a, const FilmTables& strides, void* workspace, const Launch& where) {
    const Sequences rows = sequences(a.layout, where, kOp);
    const int D = as_int(a.features, kOp, "features");
    const bool summed = a.dgamma != nullptr || a.dbeta != nullptr;
    with_types(a.dtype, where.tables, [&](auto storage, auto table) {
        using S = decltype(storage);
        using P = decltype(table);
        check(cudaSetDevice(where.device), kOp);
        if (D == 0) {
            return;
        }
        const Runs r = runs(a.layout, where.device);
        float* partials = summed ? static_cast<float*>(workspace) : nullptr;
        int* tasks = slot_tasks(r.slots, 2 * a.features, partials);
        const Tables<P> tables{static_cast<const P*>(a.gamma), strides.gamma_stride, nullptr, 0};
        const auto fits = [&](int V) {
            return D % V == 0 && aligned<S>(V, a.dy, a.dy_stride) && aligned<S>(V, a.x, a.x_stride) &&
                   aligned<S>(V, a.dx, D) && aligned<P>(V, a.gamma, strides.gamma_stride) &&
                   aligned<float>(V, partials, D);
        };
        constexpr int kWide = 16 / sizeof(S), kNarrow = 4 / sizeof(S);
        if (rows.rows > 0) {
            fits(kWide)     ? run_backward<S, P, kWide>(a, rows, r, D, tables, partials, tasks, where)
            : fits(kNarrow) ? run_backward<S, P, kNarrow>(a, rows, r, D, tables, partials, tasks, where)
                            : run_backward<S, P, 1>(a, rows, r, D, tables, partials, tasks, where);
        }
        if (summed && rows.tasks > 0) {
            if (rows.tasks > 65535) {
                throw std::invalid_argument("film (cuda): more than 65535 tasks");
            }
            launch(kOp, tables_kernel<P>,
                   dim3(static_cast<unsigned>(divide_up(D, kSlotColumns)), static_cast<unsigned>(rows.tasks), 2),
                   dim3(kSlotColumns, kSlotLanes), where, r.slots, a.features, partials, tasks,
                   static_cast<P*>(a.dgamma), static_cast<P*>(a.dbeta));
        }
    });
}

}  // namespace camtl::cuda
