// What conditional_attention's kernels share: a call as they see it, tiles on their way to shared memory, a tile's
// scores with bias and mask, dropout.
//
// Scores are in base 2: s = factor * q . k + log2(e) * M, factor = scale * log2(e), in one fused operation, so that
// each kernel finds the same bits. Fragments have rows of queries and columns of keys or, "turned", the other way
// round.
#pragma once

#include "common.cuh"
#include "philox.cuh"
#include "tensor_cores.cuh"

namespace camtl::cuda::attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kOwn = 16 * kWarps;  // rows that a block keeps, 16 to a warp: queries, or keys
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_inff();

// Rows that pass by a block which keeps queries: keys of a tile; and one which keeps keys.
template <class S, int D>
constexpr int kPassing = sizeof(S) == 2 ? (D > 64 ? 32 : 64) : (D > 64 ? 16 : 32);
template <class S, int D>
constexpr int kPassingQueries = sizeof(S) == 2 ? 32 : 16;
// Tiles of them in shared memory: while one is used the next is on its way, where there is room.
template <class S, int D>
constexpr int kStages = sizeof(S) * D > 256 ? 1 : 2;

// q, k, v or a gradient, [.., H, D]: strides in elements.
template <class S>
struct Rows {
    S* data;
    int64_t sequence, position, head;
    bool wide;  // rows begin at multiples of 16 bytes
};

struct Problem {
    Sequences sequences;
    int heads, longest;
    int width;           // w; 0: no bias
    int columns;         // those of w that sequences reach
    int64_t task_table;  // elements from a task's table to the next; 0: all share one
    const void *table, *gamma, *beta;
    bool narrow;  // those are of q's type, else float32
    const uint8_t* mask;
    float factor, scale;
    Dropping dropout;
};

// A head of a sequence.
struct Place {
    int b, h, task;
    int start;      // its first row, packed; 0 in the padded form, whose strides have the sequence
    int n;          // positions
    int64_t first;  // of its rows among those of lse: [B, H, S], or [H, N] where packed
    uint64_t element;  // the number of probability (i, j) is (element + i) * longest + j

    __device__ __forceinline__ Place(const Problem& p, int head) {
        b = head / p.heads;
        h = head - b * p.heads;
        const int begin = p.sequences.begin(b), length = p.sequences.end(b) - begin;
        const bool packed = p.sequences.cu_seqlens != nullptr;
        task = p.sequences.task(b);
        start = packed ? begin : 0;
        n = length < 0 ? 0 : length < p.longest ? length : p.longest;
        element = static_cast<uint64_t>(head) * static_cast<uint64_t>(p.longest);
        first = packed ? int64_t{h} * p.sequences.rows + begin : static_cast<int64_t>(element);
    }

    template <class S>
    __device__ __forceinline__ S* in(const Rows<S>& rows) const {
        return rows.data + b * rows.sequence + start * rows.position + h * rows.head;
    }
};

// -- what comes to shared memory

// Rows [first, first + count) of a head into a tile, zeros from n on; `at` is row 0. Those that are wide arrive later.
template <class S, int D>
__device__ __forceinline__ void fetch(const Tile<S, D>& to, const S* at, const Rows<const S>& rows, int first,
                                      int count, int n) {
    constexpr int kValues = 16 / static_cast<int>(sizeof(S)), kPacks = D / kValues;
    for (int p = static_cast<int>(threadIdx.x); p < count * kPacks; p += static_cast<int>(blockDim.x)) {
        const int r = p / kPacks, c = p % kPacks * kValues;
        const bool there = first + r < n;
        const S* from = at + (there ? first + r : 0) * rows.position + c;
        if (rows.wide) {
            copy_16(to.at(r, c), from, there);
        } else {
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                to.at(r, c)[i] = there ? from[i] : narrow<S>(0.0f);
            }
        }
    }
}

template <class S>
__device__ __forceinline__ float read_table(const Problem& p, const void* data, int64_t at) {
    return p.narrow ? widen(static_cast<const S*>(data)[at]) : static_cast<const float*>(data)[at];
}

// What a task's columns are multiplied by and what is added, in base 2.
template <class S>
__device__ __forceinline__ void fetch_columns(const Problem& p, int task, float* columns) {
    for (int c = static_cast<int>(threadIdx.x); c < p.columns; c += static_cast<int>(blockDim.x)) {
        const int64_t at = int64_t{task} * p.width + c;
        const bool film = p.gamma != nullptr && task >= 0;
        columns[c] = film ? kLog2E * (1.0f + read_table<S>(p, p.gamma, at)) : kLog2E;
        columns[p.columns + c] = film ? kLog2E * read_table<S>(p, p.beta, at) : 0.0f;
    }
}

// -- a warp's fragments [16, 8 N]

// Of this lane's two rows of a fragment: which columns share their block.
struct Blocks {
    int low[2], high[2];

    // Positions row and row + 8 of n; none beyond. No bias (w = 0): none.
    __device__ __forceinline__ Blocks(int row, int n, int w) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = row + 8 * r;
            low[r] = w > 0 ? i / w * w : 0;
            high[r] = w > 0 && i < n ? (low[r] + w < n ? low[r] + w : n) : 0;
        }
    }
    // The same, with each position's first one of its block from shared memory.
    __device__ __forceinline__ Blocks(int row, int n, int w, const int* begins) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = row + 8 * r;
            low[r] = begins[i];
            high[r] = w > 0 && i < n ? (low[r] + w < n ? low[r] + w : n) : 0;
        }
    }
    __device__ __forceinline__ bool has(int r, int x) const { return x >= low[r] && x < high[r]; }
};

// What rows [i, i + rows) and columns [j, j + columns) of n have of blocks of w: nothing; entries of one or more; or
// nothing but entries of one.
enum class Meeting { kNone, kSome, kWhole };

__device__ __forceinline__ Meeting meet(int i, int rows, int j, int columns, int n, int w) {
    if (w == 0) {
        return Meeting::kNone;
    }
    const int top = i / w, bottom = (i + rows - 1) / w, left = j / w, right = (j + columns - 1) / w;
    if (bottom < left || right < top) {
        return Meeting::kNone;
    }
    const bool one = top == bottom && left == right && i + rows <= n && j + columns <= n;
    return one ? Meeting::kWhole : Meeting::kSome;
}

// Bit l of word m: key first + 32 m + l is there and may be attended to. The whole warp must come.
template <int kKeys>
struct Known {
    unsigned word[(kKeys + 31) / 32];

    __device__ __forceinline__ Known(const Problem& p, const Place& at, int first) {
#pragma unroll
        for (int m = 0; m < (kKeys + 31) / 32; ++m) {
            const int j = first + 32 * m + lane_of_warp();
            const bool shown = j < at.n && (p.mask == nullptr || p.mask[int64_t{at.b} * p.longest + j] != 0);
            word[m] = __ballot_sync(0xffffffffu, shown);
        }
    }
    // Key 8 n + place, place < 8.
    __device__ __forceinline__ bool has(int n, int place) const {
        return (word[n / 4] >> (n % 4 * 8 + place) & 1) != 0;
    }
};

// The products of a tile that is all of one block, with its bias: no entry looks for its place. `P`: what tables are
// of.
template <bool kTurned, class P, int N>
__device__ __forceinline__ void add_whole_bias(const P* table, int w, const float* columns, int shifts, int low,
                                               float (&s)[N][4], float factor, int row, int column) {
    // turned: columns of the table are this lane's rows, of which it has two
    const float* growth = columns + (kTurned ? row : column) - low;
    const P* from = table + (kTurned ? int64_t{column} * w + row : int64_t{row} * w + column) - low;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int r = e / 2 * 8, x = 8 * n + e % 2, c = kTurned ? r : x;
            const float entry = widen(from[(kTurned ? x : r) * w + c]);
            s[n][e] = fmaf(s[n][e], factor, fmaf(growth[c], entry, growth[shifts + c]));
        }
    }
}

// From products to scores: the factor and, where blocks meet, the bias. `row`, `column`: this lane's first. A bad task
// shows as NaN. Outside the blocks nothing is read; across their edges each entry looks for its block.
template <bool kTurned, class S, int N>
__device__ __forceinline__ void add_bias(const Problem& p, const Place& at, const float* columns, const Blocks& blocks,
                                         float (&s)[N][4], int row, int column, Meeting meeting) {
    const float factor = at.task == kBadTask ? __int_as_float(0x7fc00000) : p.factor;
    const int64_t table = at.task > 0 ? at.task * p.task_table : 0;
    if (meeting == Meeting::kWhole) {
        if (p.narrow) {
            add_whole_bias<kTurned>(static_cast<const S*>(p.table) + table, p.width, columns, p.columns, blocks.low[0],
                                    s, factor, row, column);
        } else {
            add_whole_bias<kTurned>(static_cast<const float*>(p.table) + table, p.width, columns, p.columns,
                                    blocks.low[0], s, factor, row, column);
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float bias = 0.0f;
            if (meeting == Meeting::kSome) {
                const int r = row + e / 2 * 8, x = column + 8 * n + e % 2;
                if (blocks.has(e / 2, x)) {
                    const int c = (kTurned ? r : x) - blocks.low[e / 2], i = kTurned ? x : r;
                    const float entry = read_table<S>(p, p.table, table + int64_t{i} * p.width + c);
                    bias = fmaf(columns[c], entry, columns[p.columns + c]);
                }
            }
            s[n][e] = fmaf(s[n][e], factor, bias);
        }
    }
}

// -- dropout

struct Drops {
    Keeps keeps;
    uint64_t element;
    uint64_t longest;
    bool on;

    __device__ __forceinline__ Drops(const Problem& p, const Place& at)
        : keeps(p.dropout),
          element(at.element),
          longest(static_cast<uint64_t>(p.longest)),
          on(p.dropout.seed != nullptr) {}

    // Bit e: element e of this lane's four is kept; (row, column) is the first. Where rows begin at whole fours, lanes
    // share calls: of two lanes' (turned: four lanes') eight (sixteen) values each makes one.
    template <bool kTurned>
    __device__ __forceinline__ unsigned kept(int row, int column) const {
        unsigned bits = 0;
        const int lane = lane_of_warp();
        if (longest % 4 != 0) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = row + e / 2 * 8, x = column + e % 2;
                bits |= keeps.of<1>(number(kTurned ? x : r, kTurned ? r : x)) << e;
            }
        } else if constexpr (kTurned) {
            const int own = lane / 4 % 4;
            unsigned all = keeps.of<4>(number(column + own % 2, row / 4 * 4 + own / 2 * 8)) << 4 * own;
            all |= __shfl_xor_sync(0xffffffffu, all, 4);
            all |= __shfl_xor_sync(0xffffffffu, all, 8);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bits |= (all >> (4 * e + row % 4) & 1) << e;
            }
        } else {
            const int own = lane % 2;
            unsigned all = keeps.of<4>(number(row + 8 * own, column / 4 * 4)) << 4 * own;
            all |= __shfl_xor_sync(0xffffffffu, all, 1);
            all >>= column % 4;
            bits = (all & 3) | (all >> 2 & 12);
        }
        return bits;
    }

private:
    __device__ __forceinline__ uint64_t number(int i, int j) const {
        return (element + static_cast<uint64_t>(i)) * longest + static_cast<uint64_t>(j);
    }
};

// -- the backward pass

// P and dP of a fragment: those that dropout drops have P < 0, and dP is theirs no more. `a`, `b`: the tiles of queries
// and keys (turned: of keys and queries) and, `da`, `db`, of dout and v, each from the fragment's first row or column
// on. lse_of(e, n): that of the query.
template <bool kTurned, class S, int D, int N, class Lse, class Shown>
__device__ __forceinline__ void probabilities(const Problem& p, const Place& at, const float* columns,
                                              const Drops& drops, const Blocks& blocks, const Tile<S, D>& a,
                                              const Tile<S, D>& b, float (&P)[N][4], int row, int column,
                                              Meeting meeting, Lse&& lse, Shown&& shown) {
    clear(P);
    add_rows_by_rows<kTurned>(P, a, b);
    add_bias<kTurned, S>(p, at, columns, blocks, P, row, column, meeting);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const unsigned kept = drops.on ? drops.template kept<kTurned>(row, column + 8 * n) : 15u;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float value = shown(n, e) ? exp2f(P[n][e] - lse(n, e)) : 0.0f;
            P[n][e] = (kept >> e & 1) != 0 ? value : -value;
        }
    }
}

// dP = 0 where dropout dropped, P without its sign.
template <int N>
__device__ __forceinline__ void undrop(float (&P)[N][4], float (&dP)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            dP[n][e] = P[n][e] > 0.0f || P[n][e] != P[n][e] ? dP[n][e] : 0.0f;
            P[n][e] = fabsf(P[n][e]);
        }
    }
}

// The sum of four lanes' values, which share rows; the same bits in each.
__device__ __forceinline__ float sum_of_four(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    v += __shfl_xor_sync(0xffffffffu, v, 2);
    return v;
}

// sums [16, D] * factor to rows row and row + 8 (< n) of a head.
template <class S, int N>
__device__ __forceinline__ void store_sums(S* at, const Rows<S>& rows, const float (&sums)[N][4], float factor, int row,
                                           int n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (row + 8 * r < n) {
            S* to = at + (row + 8 * r) * rows.position + 2 * (lane_of_warp() % 4);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                Pack<S, 2> two;
                two.v[0] = narrow<S>(sums[k][2 * r] * factor);
                two.v[1] = narrow<S>(sums[k][2 * r + 1] * factor);
                store(to + 8 * k, two);
            }
        }
    }
}

// Zeros in the rows of no sequence, all heads: the blocks of a launch share them.
template <class S>
__device__ __forceinline__ void zero_tail(const Problem& p, const Rows<S>& rows, int D) {
    if (p.sequences.cu_seqlens == nullptr || rows.data == nullptr) {
        return;
    }
    for (int64_t row = p.sequences.stop() + int64_t{blockIdx.x}; row < p.sequences.rows; row += gridDim.x) {
        for (int x = static_cast<int>(threadIdx.x); x < p.heads * D; x += static_cast<int>(blockDim.x)) {
            rows.data[row * rows.position + x / D * rows.head + x % D] = narrow<S>(0.0f);
        }
    }
}

}  // namespace camtl::cuda::attention
