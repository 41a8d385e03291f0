// What the forward and the backward pass of conditional_attention share: where sequences lie, operands packed for
// gemm.h, and the bias.
#pragma once

#include "camtl/conditional_attention.h"

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "plan.h"

namespace camtl::cpu::CAMTL_ISA {

constexpr int64_t kRowsAtOnce = 4;

// Where a sequence lies, and how much of it there is.
struct Sequence {
    int64_t index;  // b
    int64_t first;  // its first row within the tensors' sequence b: 0, or cu_seqlens[b] where packed
    int64_t length;
    int64_t keys;   // one past the last key that may be attended to
    int64_t task;
};

inline Sequence sequence(const AttentionShape& s, int64_t b) {
    const Layout& l = s.layout;
    Sequence r{b, 0, l.rows_per_sequence, 0, l.task_ids == nullptr ? 0 : l.task_ids[b]};
    if (l.cu_seqlens != nullptr) {
        r.first = l.cu_seqlens[b];
        r.length = l.cu_seqlens[b + 1] - r.first;
    }
    r.keys = r.length;
    if (s.mask != nullptr) {
        const uint8_t* mask = s.mask + b * r.length;
        while (r.keys > 0 && mask[r.keys - 1] == 0) {
            --r.keys;
        }
    }
    return r;
}

inline int64_t longest_sequence(const Layout& l) {
    int64_t longest = l.rows_per_sequence;
    for (int64_t b = 0; l.cu_seqlens != nullptr && b < l.batch; ++b) {
        const int64_t length = l.cu_seqlens[b + 1] - l.cu_seqlens[b];
        longest = length > longest ? length : longest;
    }
    return longest;
}

// Row 0 of sequence s and head h.
template <class S>
inline S* head(const AttentionTensor& t, const Sequence& s, int64_t h) {
    return static_cast<S*>(const_cast<void*>(t.data)) + s.index * t.sequence + s.first * t.position + h * t.head;
}

// dst [n, width] = factor * src, width in whole vectors; 0 beyond D.
template <class S, class A>
inline void pack_rows(A* dst, int64_t width, const S* src, int64_t src_row, int64_t n, int64_t D, A factor) {
    for (int64_t r = 0; r < n; ++r, dst += width, src += src_row) {
        each_vector<A>(
            D, [&](int64_t d, auto lanes) { store(dst + d, load(src + d, lanes) * factor, Full<kLanes<A>>{}); });
    }
}

// dst [n, D] = factor * src [n, width], rounded.
template <class S, class A>
inline void unpack_rows(S* dst, int64_t dst_row, const A* src, int64_t width, int64_t n, int64_t D, A factor) {
    for (int64_t r = 0; r < n; ++r, dst += dst_row, src += width) {
        each_vector<A>(
            D, [&](int64_t d, auto lanes) { store(dst + d, load(src + d, Full<kLanes<A>>{}) * factor, lanes); });
    }
}

// src [n, D] as strips along D, each [n, kStrip]: the right operand of a product over rows.
template <class S, class A>
inline void pack_strips(A* dst, const S* src, int64_t src_row, int64_t n, int64_t D) {
    for (int64_t r = 0; r < n; ++r, src += src_row) {
        each_vector<A>(D, [&](int64_t d, auto lanes) {
            A* to = dst + d / kStrip<A> * n * kStrip<A> + r * kStrip<A> + d % kStrip<A>;
            store(to, load(src + d, lanes), Full<kLanes<A>>{});
        });
    }
}

// src [n, D] transposed, as strips along n, each [D, kStrip]: the right operand of a product over D. 0 beyond n,
// in whole vectors.
template <class S, class A>
inline void pack_transposed(A* dst, const S* src, int64_t src_row, int64_t n, int64_t D) {
    constexpr int W = kLanes<A>;
    for (int64_t r = 0; r < n; r += W) {
        A* to = dst + r / kStrip<A> * D * kStrip<A> + r % kStrip<A>;
        const int64_t count = n - r < W ? n - r : W;
        each_vector<A>(D, [&](int64_t d, auto lanes) {
            vec<A> block[W];
            if (count == W) {
                for (int i = 0; i < W; ++i) {
                    block[i] = load(src + (r + i) * src_row + d, lanes);
                }
            } else {
                for (int i = 0; i < W; ++i) {
                    block[i] = i < count ? load(src + (r + i) * src_row + d, lanes) : vec<A>{};
                }
            }
            transpose<A>(block);
            for (int i = 0; i < lanes; ++i) {
                store(to + (d + i) * kStrip<A>, block[i], Full<W>{});
            }
        });
    }
}

// What is added to a row of scores before softmax: the bias of the task in the row's block, -inf for hidden keys.
template <class A>
class ScoreBias {
public:
    // `hidden`: room for vectors(s.keys) whole vectors.
    ScoreBias(const AttentionShape& shape, const Sequence& s, A* hidden)
        : width_(shape.width), keys_(s.keys), hidden_(hidden), some_hidden_(shape.mask != nullptr) {
        if (shape.table != nullptr) {
            const int64_t rows = shape.table_per_task ? s.task * shape.table_rows : 0;
            table_ = static_cast<const A*>(shape.table) + rows * width_;
            if (!shape.table_per_task) {
                gamma_ = static_cast<const A*>(shape.gamma) + s.task * width_;
                beta_ = static_cast<const A*>(shape.beta) + s.task * width_;
            }
        }
        const int64_t padded = vectors<A>(keys_) * kLanes<A>;
        for (int64_t j = 0; j < padded; ++j) {
            const bool shown = j < keys_ && (!some_hidden_ || shape.mask[s.index * s.length + j] != 0);
            hidden[j] = shown ? A(0) : A(-INFINITY);
        }
    }

    // The columns of row i's block among [begin, end): first and one past the last, and the first one's column.
    struct Band {
        int64_t begin;
        int64_t end;
        int64_t column;
    };
    CAMTL_INLINE Band band(int64_t i, int64_t begin, int64_t end) const {
        const int64_t block = i / width_ * width_;
        const int64_t first = block > begin ? block : begin;
        const int64_t last = block + width_ < end ? block + width_ : end;
        return {first, last, first - block};
    }

    // row: scores of query i and keys [begin, end), in whole vectors.
    CAMTL_INLINE void add(A* row, int64_t i, int64_t begin, int64_t end) const {
        if (table_ != nullptr) {
            const Band in = band(i, begin, end);
            A* to = row + (in.begin - begin);
            const A* table = table_ + i * width_ + in.column;
            if (gamma_ != nullptr) {
                const A* gamma = gamma_ + in.column;
                const A* beta = beta_ + in.column;
                each_vector<A>(in.end - in.begin, [&](int64_t c, auto n) {
                    const vec<A> bias = (load(gamma + c, n) + A(1)) * load(table + c, n) + load(beta + c, n);
                    store(to + c, load(to + c, n) + bias, n);
                });
            } else {
                each_vector<A>(in.end - in.begin,
                               [&](int64_t c, auto n) { store(to + c, load(to + c, n) + load(table + c, n), n); });
            }
        }
        // Without a mask only the padding of the last vector is hidden.
        constexpr Full<kLanes<A>> W{};
        const int64_t from = some_hidden_ ? begin : keys_ / W * W;
        for (int64_t j = from > begin ? from : begin; j < end; j += W) {
            store(row + (j - begin), load(row + (j - begin), W) + load(hidden_ + j, W), W);
        }
    }

private:
    int64_t width_;
    int64_t keys_;
    const A* hidden_;
    bool some_hidden_;
    const A* table_ = nullptr;  // of the task where each has its own
    const A* gamma_ = nullptr;  // of the task; null: the table is the bias
    const A* beta_ = nullptr;
};

// Element (b, h, i, 0) of the probabilities in dropout's numbering.
inline uint64_t dropout_row(const AttentionShape& s, int64_t b, int64_t h, int64_t i) {
    return static_cast<uint64_t>(((b * s.heads + h) * s.length + i) * s.length);
}

// Zeros n rows of a strided [n, D].
template <class S>
inline void zero_rows(S* rows, int64_t row, int64_t n, int64_t D) {
    for (int64_t r = 0; r < n; ++r) {
        std::memset(rows + r * row, 0, sizeof(S) * static_cast<std::size_t>(D));
    }
}

// A thread's scratch memory, handed out piece by piece. One without memory only counts.
template <class A>
class Pieces {
public:
    explicit Pieces(A* memory) : memory_(memory) {}
    CAMTL_INLINE A* take(int64_t elements) {
        A* piece = memory_ == nullptr ? nullptr : memory_ + used_;
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
        used_ += (elements + kLine - 1) / kLine * kLine;
        return piece;
    }
    CAMTL_INLINE int64_t used() const { return used_; }

private:
    A* memory_;
    int64_t used_ = 0;
};

}  // namespace camtl::cpu::CAMTL_ISA
