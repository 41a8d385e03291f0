// film: y = (1 + gamma[t]) * x + beta[t].
//
// Forward. A thread owns V neighbouring columns (16 bytes where alignment allows) of kRows rows: their loads are all in
// flight before the first is used; gamma and beta stay in registers as long as the task does. Bytes per element: read
// x, write y; the tables come from L1 and L2.
//
// Backward, stage 1. Rows are cut into tiles of 16 to 128 (from the number of rows alone); a thread owns V columns of a
// tile, writes dx, and sums dy * x and dy in registers until the sequence ends; then it stores them into a slot of the
// workspace [slots, 2, D]. The part of sequence b in tile i has slot i + b: walking down the rows, either i or b rises
// from part to part. Where many short sequences share a tile (slots > tiles * tasks) the slots are (tile, task) and a
// thread adds to them. Stage 2 adds a task's slots in an order fixed by the layout, eight lanes to a column, in double.
// No atomics: the same bits every time. Bytes per element: read dy and x, write dx, and 16 / (rows per part) for the
// slots.
#include "camtl/film.h"

#include "common.cuh"

namespace camtl::cuda {
namespace {

constexpr char kOp[] = "film";
constexpr int kRows = 4;  // loads in flight per operand
constexpr int kThreads = 256;  // of a block, at most
constexpr int kColumns = 32;  // of a block in stage 2
constexpr int kLanes = 8;  // threads that share a column there

// Rows of a tile of the backward pass, a power of two.
int tile_rows(int64_t rows) {
    int size = 16;
    while (size < 128 && size * int64_t{1024} < rows) {
        size *= 2;
    }
    return size;
}

struct Slots {
    int tile;  // rows
    int tiles;
    bool per_task;  // slot (tile, task) instead of tile + sequence

    __host__ __device__ int64_t count(int batch, int tasks) const {
        return per_task ? int64_t{tiles} * tasks : int64_t{tiles} + batch;
    }
    __host__ __device__ int64_t slot(int i, int b, int task, int tasks) const {
        return per_task ? int64_t{i} * tasks + task : int64_t{i} + b;
    }
};

Slots slots_of(const Layout& l) {
    const int size = tile_rows(l.rows);
    const int64_t tiles = divide_up(l.rows, size);
    return {size, static_cast<int>(tiles), tiles + l.batch > tiles * l.tasks};
}

// Table values of one task; 1 + gamma in the place of gamma.
template <class P, int V>
__device__ __forceinline__ void read_tables(const P* gamma, const P* beta, int task, int64_t features, int64_t column,
                                            float (&scale)[V], float (&shift)[V]) {
    if (task >= 0) {
        const int64_t at = task * features + column;
        const Pack<P, V> g = load<V>(gamma + at);
        Pack<P, V> b = g;
        if (beta != nullptr) {
            b = load<V>(beta + at);
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
                   const P* __restrict__ gamma, const P* __restrict__ beta, S* __restrict__ y) {
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
    read_tables<P, V>(gamma, beta, task, features, column, scale, shift);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (row + r < sequences.rows) {
            if (r > 0 && walk.moves_on(row + r)) {
                const int next = sequences.task(walk.sequence);
                if (next != task) {
                    task = next;
                    read_tables<P, V>(gamma, beta, task, features, column, scale, shift);
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

// The sums of a thread's columns into a slot.
template <int V>
__device__ __forceinline__ void flush(float* slot, int64_t features, bool add, float (&products)[V], float (&sums)[V]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        float (&from)[V] = which == 0 ? products : sums;
        float* to = slot + which * features;
        Pack<float, V> values;
        if (add) {
            values = load<V>(to);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) {
            values.v[i] = add ? values.v[i] + from[i] : from[i];
            from[i] = 0.0f;
        }
        store<V>(to, values);
    }
}

template <class S, class P, int V>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Sequences sequences, Slots slots, int packs, int64_t features, const S* __restrict__ dy,
                    int64_t dy_stride, const S* __restrict__ x, int64_t x_stride, const P* __restrict__ gamma,
                    S* __restrict__ dx, float* __restrict__ workspace) {
    const int pack = blockIdx.y * blockDim.x + threadIdx.x;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (pack >= packs || tile >= slots.tiles) {
        return;
    }
    const int64_t column = static_cast<int64_t>(pack) * V;
    const int begin = static_cast<int>(tile) * slots.tile;
    const int end = sequences.rows - begin < slots.tile ? sequences.rows : begin + slots.tile;
    const bool tables = workspace != nullptr;
    float products[V] = {}, sums[V] = {};
    if (tables && slots.per_task) {
        for (int t = 0; t < sequences.tasks; ++t) {
            flush<V>(workspace + slots.slot(tile, 0, t, sequences.tasks) * 2 * features + column, features, false,
                     products, sums);
        }
    }
    Walk walk(sequences, begin);
    int sequence = walk.sequence, task = sequences.task(sequence);
    float scale[V], unused[V];
    read_tables<P, V>(gamma, nullptr, task, features, column, scale, unused);
    for (int row = begin; row < end; row += kRows) {
        Pack<S, V> gradient[kRows], input[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (row + r < end) {
                gradient[r] = load_once<V>(dy + (row + r) * dy_stride + column);
                if (x != nullptr) {
                    input[r] = load_once<V>(x + (row + r) * x_stride + column);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (row + r < end) {
                if (walk.moves_on(row + r)) {
                    if (tables && task >= 0) {
                        flush<V>(workspace + slots.slot(tile, sequence, task, sequences.tasks) * 2 * features + column,
                                 features, slots.per_task, products, sums);
                    }
                    sequence = walk.sequence;
                    task = sequences.task(sequence);
                    read_tables<P, V>(gamma, nullptr, task, features, column, scale, unused);
                }
                if (task >= 0) {
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const float g = widen(gradient[r].v[i]);
                        sums[i] += g;
                        products[i] = x != nullptr ? fmaf(g, widen(input[r].v[i]), products[i]) : 0.0f;
                    }
                }
                if (dx != nullptr) {
#pragma unroll
                    for (int i = 0; i < V; ++i) {
                        const float g = widen(gradient[r].v[i]) * scale[i];
                        gradient[r].v[i] = narrow<S>(task == kNoSequence ? 0.0f : g);
                    }
                    store<V>(dx + (row + r) * features + column, gradient[r]);
                }
            }
        }
    }
    if (tables && task >= 0) {
        flush<V>(workspace + slots.slot(tile, sequence, task, sequences.tasks) * 2 * features + column, features,
                 slots.per_task, products, sums);
    }
}

// Block (kColumns, kLanes): kColumns columns of one task's dgamma (blockIdx.y 0) or dbeta (1).
template <class P>
__global__ void __launch_bounds__(kColumns* kLanes)
    tables_kernel(Sequences sequences, Slots slots, int64_t features, int column_blocks,
                  const float* __restrict__ workspace, P* __restrict__ dgamma, P* __restrict__ dbeta) {
    __shared__ double parts[kLanes][kColumns];
    const int task = blockIdx.x / column_blocks, lane = threadIdx.y;
    const int64_t column = static_cast<int64_t>(blockIdx.x % column_blocks) * kColumns + threadIdx.x;
    P* out = blockIdx.y == 0 ? dgamma : dbeta;
    const float* from = workspace + blockIdx.y * features + column;
    double sum = 0.0;
    if (out != nullptr && column < features) {
        if (slots.per_task) {
#pragma unroll 4
            for (int i = lane; i < slots.tiles; i += kLanes) {
                sum += from[slots.slot(i, 0, task, sequences.tasks) * 2 * features];
            }
        } else {
            for (int b = 0; b < sequences.batch; ++b) {
                if (sequences.task(b) == task) {
                    const int begin = sequences.begin(b), end = sequences.end(b);
                    if (begin < end) {
                        const int first = begin / slots.tile, last = (end - 1) / slots.tile;
                        // parts go to the lanes by their slot's number, which shares out short sequences too
#pragma unroll 4
                        for (int i = first + ((lane - first - b) & (kLanes - 1)); i <= last; i += kLanes) {
                            sum += from[slots.slot(i, b, task, sequences.tasks) * 2 * features];
                        }
                    }
                }
            }
        }
    }
    parts[lane][threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && out != nullptr && column < features) {
        for (int other = 1; other < kLanes; ++other) {
            sum += parts[other][threadIdx.x];
        }
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
void run_forward(const FilmForward& a, const Sequences& sequences, int D, const Launch& where) {
    const Shape s = shape(D / V, divide_up(a.layout.rows, kRows));
    launch(kOp, forward_kernel<S, P, V>, s.grid, s.block, where, sequences, D / V, a.features,
           static_cast<const S*>(a.x), a.x_stride, static_cast<const P*>(a.gamma), static_cast<const P*>(a.beta),
           static_cast<S*>(a.y));
}

template <class S, class P, int V>
void run_backward(const FilmBackward& a, const Sequences& sequences, const Slots& slots, int D, float* workspace,
                  const Launch& where) {
    const Shape s = shape(D / V, slots.tiles);
    launch(kOp, backward_kernel<S, P, V>, s.grid, s.block, where, sequences, slots, D / V, a.features,
           static_cast<const S*>(a.dy), a.dy_stride, static_cast<const S*>(a.dgamma == nullptr ? nullptr : a.x),
           a.x_stride, static_cast<const P*>(a.gamma), static_cast<S*>(a.dx), workspace);
}

}  // namespace

void film_forward(const FilmForward& a, const Launch& where) {
    const Sequences rows = sequences(a.layout, where, kOp);
    const int D = as_int(a.features, kOp, "features");
    check(cudaSetDevice(where.device), kOp);
    if (rows.rows == 0 || D == 0) {
        return;
    }
    with_types(a.dtype, where.tables, [&](auto storage, auto table) {
        using S = decltype(storage);
        using P = decltype(table);
        const auto fits = [&](int V) {
            return D % V == 0 && aligned<S>(V, a.x, a.x_stride) && aligned<S>(V, a.y, D) && aligned<P>(V, a.gamma, D) &&
                   aligned<P>(V, a.beta, D);
        };
        constexpr int kWide = 16 / sizeof(S), kNarrow = 4 / sizeof(S);
        fits(kWide)     ? run_forward<S, P, kWide>(a, rows, D, where)
        : fits(kNarrow) ? run_forward<S, P, kNarrow>(a, rows, D, where)
                        : run_forward<S, P, 1>(a, rows, D, where);
    });
}

int64_t film_backward_workspace(const FilmBackward& a) {
    if (a.dgamma == nullptr && a.dbeta == nullptr) {
        return 0;
    }
    const Slots slots = slots_of(a.layout);
    return slots.count(static_cast<int>(a.layout.batch), static_cast<int>(a.layout.tasks)) * 2 * a.features *
           static_cast<int64_t>(sizeof(float));
}

void film_backward(const FilmBackward& a, void* workspace, const Launch& where) {
    const Sequences rows = sequences(a.layout, where, kOp);
    const Slots slots = slots_of(a.layout);
    const int D = as_int(a.features, kOp, "features");
    const bool tables = a.dgamma != nullptr || a.dbeta != nullptr;
    float* partials = tables ? static_cast<float*>(workspace) : nullptr;
    check(cudaSetDevice(where.device), kOp);
    with_types(a.dtype, where.tables, [&](auto storage, auto table) {
        using S = decltype(storage);
        using P = decltype(table);
        if (rows.rows > 0 && D > 0) {
            const auto fits = [&](int V) {
                return D % V == 0 && aligned<S>(V, a.dy, a.dy_stride) && aligned<S>(V, a.x, a.x_stride) &&
                       aligned<S>(V, a.dx, D) && aligned<P>(V, a.gamma, D) && aligned<float>(V, partials, D);
            };
            constexpr int kWide = 16 / sizeof(S), kNarrow = 4 / sizeof(S);
            fits(kWide)     ? run_backward<S, P, kWide>(a, rows, slots, D, partials, where)
            : fits(kNarrow) ? run_backward<S, P, kNarrow>(a, rows, slots, D, partials, where)
                            : run_backward<S, P, 1>(a, rows, slots, D, partials, where);
        }
        const int64_t column_blocks = divide_up(D, kColumns), blocks = column_blocks * rows.tasks;
        if (tables && blocks > 0) {
            launch(kOp, tables_kernel<P>, dim3(static_cast<unsigned>(as_int(blocks, kOp, "columns of tables")), 2),
                   dim3(kColumns, kLanes), where, rows, slots, a.features, static_cast<int>(column_blocks), partials,
                   static_cast<P*>(a.dgamma), static_cast<P*>(a.dbeta));
        }
    });
}

}  // namespace camtl::cuda
