// conditional_attention, the backward pass.
//
// A piece of work is a sequence and a head. For kQueries queries at a time the probabilities P come back from the
// scores and the saved log-sum-exp; with drop = 0 or 1 / (1 - p) and dP = dO V^T:
//   delta_i = sum_j P drop dP,  dS = P * (dP * drop - delta),  dV = (P * drop)^T dO,
//   dK = scale dS^T Q,  dQ = scale dS K
// All five products go through gemm.h; dK and dV are summed in scratch memory over the blocks of queries. delta is
// summed from the row itself, and the row divided by its own sum: dO . O would bring in the rounding of O, and the
// log-sum-exp its own, which a gradient of the bias, a sum of many small dS, would show.
//
// The bias gets the part of dS in the diagonal blocks, G [sequence, head, S, w]. It is kept for a group of
// heads that fits kBandBytes and then added, in the order of the heads, to one [S, w] per task of the batch, from
// which the gradients of table, gamma and beta follow. That order is fixed: the same bits for any number of
// threads.
#include "attention.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

constexpr int64_t kQueries = 64;
constexpr int64_t kBandBytes = int64_t{8} << 20;

template <class A>
struct BackwardScratch {
    A* keys_t;    // K transposed, strips along keys
    A* values_t;  // V transposed, likewise
    A* keys;      // K, strips along features
    A* dk;        // [keys, width]
    A* dv;
    A* hidden;
    A* q;  // [kQueries, width]
    A* dout;
    A* dq;
    A* p;   // [kQueries, keys_row]: scores, then P * drop
    A* ds;  // [kQueries, keys_row]: dP, then dS
    A* scales;  // [kRowsAtOnce, keys_row]: drop
    int64_t width;
    int64_t keys_row;

    BackwardScratch(Pieces<A>& pieces, int64_t longest, int64_t D) {
        constexpr int64_t W = kLanes<A>;
        width = strips<A>(D) * kStrip<A>;
        keys_row = vectors<A>(longest) * W + W;  // one more vector: rows do not all start in the same cache sets
        keys_t = pieces.take(strips<A>(longest) * kStrip<A> * D);
        values_t = pieces.take(strips<A>(longest) * kStrip<A> * D);
        keys = pieces.take(width * longest);
        dk = pieces.take(width * longest);
        dv = pieces.take(width * longest);
        hidden = pieces.take(vectors<A>(longest) * W);
        q = pieces.take(kQueries * width);
        dout = pieces.take(kQueries * width);
        dq = pieces.take(kQueries * width);
        p = pieces.take(kQueries * keys_row);
        ds = pieces.take(kQueries * keys_row);
        scales = pieces.take(kRowsAtOnce * keys_row);
    }
};

// Of a row that lacks the division by its sum: 1 / sum, and delta.
template <class A>
struct Row {
    A factor;
    A delta;
};

// Turns the scores p into exp(score - lse) and dP into drop dP. n: keys, in whole vectors; scales: drop, or null for
// none.
template <class A>
CAMTL_INLINE Row<A> exponentiate(A* p, A* ds, const A* scales, int64_t n, A lse) {
    vec<A> totals[4] = {}, products[4] = {};
    each_vector_in_turn<A>(n, [&](int64_t j, auto lanes, auto turn) {
        const vec<A> e = vexp(load(p + j, lanes) - lse);
        vec<A> g = load(ds + j, lanes);
        if (scales != nullptr) {
            g *= load(scales + j, lanes);
            store(ds + j, g, lanes);
        }
        store(p + j, e, lanes);
        totals[turn] += e;
        products[turn] += e * g;
    });
    const A factor = A(1) / sum<A>((totals[0] + totals[1]) + (totals[2] + totals[3]));
    return {factor, sum<A>((products[0] + products[1]) + (products[2] + products[3])) * factor};
}

// Turns what exponentiate left into P * drop and dS.
template <class A>
CAMTL_INLINE void differentiate(A* p, A* ds, const A* scales, int64_t n, Row<A> row) {
    each_vector<A>(n, [&](int64_t j, auto lanes) {
        const vec<A> e = load(p + j, lanes) * row.factor;
        store(ds + j, e * (load(ds + j, lanes) - row.delta), lanes);
        store(p + j, scales != nullptr ? e * load(scales + j, lanes) : e, lanes);
    });
}

// One sequence and head. band: [s.length, w], the gradient of the bias; or null.
template <class S, class A>
void backward_head(const ConditionalAttentionBackward& a, const Sequence& s, int64_t h, A* band,
                   const BackwardScratch<A>& m) {
    const AttentionShape& shape = a.shape;
    const int64_t D = shape.head_size, w = shape.width, keys = s.keys;
    const AttentionTensor gradients[] = {a.dq, a.dk, a.dv};
    if (keys == 0) {
        for (const AttentionTensor& t : gradients) {
            if (t.data != nullptr) {
                zero_rows(head<S>(t, s, h), t.position, s.length, D);
            }
        }
        if (band != nullptr) {
            std::memset(band, 0, sizeof(A) * static_cast<std::size_t>(s.length * w));
        }
        return;
    }
    const bool wants_q = a.dq.data != nullptr, wants_k = a.dk.data != nullptr, wants_v = a.dv.data != nullptr;
    const bool wants_s = wants_q || wants_k || band != nullptr, dropout = shape.dropout.p > 0;
    const A scale = static_cast<A>(shape.scale);
    const A* lse =
        static_cast<const A*>(a.lse) +
        (shape.layout.cu_seqlens != nullptr ? h * shape.layout.rows + s.first : (s.index * shape.heads + h) * s.length);
    pack_transposed(m.keys_t, head<const S>(a.k, s, h), a.k.position, keys, D);
    if (wants_s) {
        pack_transposed(m.values_t, head<const S>(a.v, s, h), a.v.position, keys, D);
    }
    if (wants_q) {
        pack_strips(m.keys, head<const S>(a.k, s, h), a.k.position, keys, D);
    }
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        for (int64_t j = keys; j < vectors<A>(keys) * kLanes<A>; ++j) {
            m.scales[r * m.keys_row + j] = A(0);  // the sums of a row include the padding
        }
    }
    const ScoreBias<A> bias(shape, s, m.hidden);
    const int64_t D_vectors = vectors<A>(D), keys_vectors = vectors<A>(keys);
    const Right<A> keys_t{m.keys_t, D * kStrip<A>, kStrip<A>}, values_t{m.values_t, D * kStrip<A>, kStrip<A>};
    const Right<A> q_rows{m.q, kStrip<A>, m.width}, dout_rows{m.dout, kStrip<A>, m.width};
    for (int64_t i0 = 0; i0 < s.length; i0 += kQueries) {
        const int64_t rows = s.length - i0 < kQueries ? s.length - i0 : kQueries;
        pack_rows(m.q, m.width, head<const S>(a.q, s, h) + i0 * a.q.position, a.q.position, rows, D, scale);
        pack_rows(m.dout, m.width, head<const S>(a.dout, s, h) + i0 * a.dout.position, a.dout.position, rows, D, A(1));
        multiply<A>(rows, keys_vectors, D, {m.q, m.width, 1}, keys_t, m.p, m.keys_row, false);
        if (wants_s) {
            multiply<A>(rows, keys_vectors, D, {m.dout, m.width, 1}, values_t, m.ds, m.keys_row, false);
        }
        // A few rows at a time: the end of one row's sums takes long, and waits for no other row.
        for (int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
            const int64_t count = rows - r0 < kRowsAtOnce ? rows - r0 : kRowsAtOnce, n = keys_vectors * kLanes<A>;
            A* p = m.p + r0 * m.keys_row;
            A* ds = m.ds + r0 * m.keys_row;
            Row<A> found[kRowsAtOnce];
            for (int64_t r = 0; r < count; ++r) {
                const int64_t i = i0 + r0 + r;
                A* scales = dropout ? m.scales + r * m.keys_row : nullptr;
                bias.add(p + r * m.keys_row, i, 0, keys);
                if (dropout) {
                    dropout_scales(scales, keys, dropout_row(shape, s.index, h, i), shape.dropout);
                }
                found[r] = exponentiate(p + r * m.keys_row, ds + r * m.keys_row, scales, n, lse[i]);
            }
            for (int64_t r = 0; r < count; ++r) {
                const A* scales = dropout ? m.scales + r * m.keys_row : nullptr;
                differentiate(p + r * m.keys_row, ds + r * m.keys_row, scales, n, found[r]);
            }
            for (int64_t r = 0; r < count && band != nullptr; ++r) {  // 0 for hidden keys at the end, and for none
                A* row = band + (i0 + r0 + r) * w;
                const auto in = bias.band(i0 + r0 + r, 0, keys);
                const int64_t shown = in.end > in.begin ? in.end - in.begin : 0;
                std::memcpy(row, ds + r * m.keys_row + in.begin, sizeof(A) * static_cast<std::size_t>(shown));
                std::memset(row + shown, 0, sizeof(A) * static_cast<std::size_t>(w - shown));
            }
        }
        const bool add = i0 > 0;
        if (wants_v) {
            multiply<A>(keys, D_vectors, rows, {m.p, 1, m.keys_row}, dout_rows, m.dv, m.width, add);
        }
        if (wants_k) {
            multiply<A>(keys, D_vectors, rows, {m.ds, 1, m.keys_row}, q_rows, m.dk, m.width, add);
        }
        if (wants_q) {
            const Right<A> key_rows{m.keys, keys * kStrip<A>, kStrip<A>};
            multiply<A>(rows, D_vectors, keys, {m.ds, m.keys_row, 1}, key_rows, m.dq, m.width, false);
            unpack_rows(head<S>(a.dq, s, h) + i0 * a.dq.position, a.dq.position, m.dq, m.width, rows, D, scale);
        }
    }
    const A* sums[] = {m.dk, m.dv};
    for (int i = 0; i < 2; ++i) {
        const AttentionTensor& t = gradients[1 + i];
        if (t.data != nullptr) {
            S* to = head<S>(t, s, h);
            unpack_rows(to, t.position, sums[i], m.width, keys, D, A(1));
            zero_rows(to + keys * t.position, t.position, s.length - keys, D);
        }
    }
}

// Sums of G over sequences and heads for each task that the batch has: [tasks that it has, longest, w] in double.
template <class A>
class BandSums {
public:
    BandSums(const ConditionalAttentionBackward& a, int64_t longest)
        : a_(a),
          longest_(longest),
          size_(longest * a.shape.width),
          slots_(sizeof(int64_t) * static_cast<std::size_t>(a.shape.layout.tasks)),
          count_(number_tasks()),
          sums_(sizeof(double) * static_cast<std::size_t>(count_ * size_)) {
        std::memset(sums_.template as<double>(), 0, sizeof(double) * static_cast<std::size_t>(count_ * size_));
    }

    // Adds heads begin .. end - 1 (numbered sequence by sequence), whose G lie one after the other at `bands`.
    void add(const A* bands, int64_t begin, int64_t end) {
        const AttentionShape& shape = a_.shape;
        const int64_t w = shape.width, rows = w < 2048 ? 2048 / w : 1;  // of the table, for a thread at a time
        parallel_for((longest_ + rows - 1) / rows, shape.threads, [&](int64_t item, int) {
            for (int64_t head = begin; head < end; ++head) {
                const Sequence s = sequence(shape, head / shape.heads);
                const int64_t first = item * rows, last = first + rows < s.length ? first + rows : s.length;
                if (first < last) {
                    double* to = sums_.template as<double>() + slot(s.task) * size_ + first * w;
                    const A* from = bands + (head - begin) * size_ + first * w;
                    for (int64_t c = 0; c < (last - first) * w; ++c) {
                        to[c] += static_cast<double>(from[c]);
                    }
                }
            }
        });
    }

    // The gradients of the tables.
    void write() {
        const AttentionShape& shape = a_.shape;
        const int64_t tasks = shape.layout.tasks, L = shape.table_rows, w = shape.width;
        const A* table = static_cast<const A*>(shape.table);
        A* dtable = static_cast<A*>(a_.dtable);
        if (shape.table_per_task) {
            parallel_for(tasks, shape.threads, [&](int64_t t, int) {
                A* to = dtable + t * L * w;
                const double* from = slot(t) < 0 ? nullptr : sums_.template as<double>() + slot(t) * size_;
                const int64_t used = from == nullptr ? 0 : size_;
                for (int64_t c = 0; c < used; ++c) {
                    to[c] = static_cast<A>(from[c]);
                }
                std::memset(to + used, 0, sizeof(A) * static_cast<std::size_t>(L * w - used));
            });
            return;
        }
        if (dtable != nullptr) {
            const A* gamma = static_cast<const A*>(shape.gamma);
            parallel_for(L, shape.threads, [&](int64_t i, int) {
                for (int64_t c = 0; c < w; ++c) {
                    double total = 0;
                    for (int64_t t = 0; t < tasks && i < longest_; ++t) {
                        if (slot(t) >= 0) {
                            const double g = sums_.template as<double>()[slot(t) * size_ + i * w + c];
                            total += (1.0 + static_cast<double>(gamma[t * w + c])) * g;
                        }
                    }
                    dtable[i * w + c] = static_cast<A>(total);
                }
            });
        }
        const int64_t blocks = (w + kColumns - 1) / kColumns;
        parallel_for(tasks * blocks, shape.threads, [&](int64_t item, int) {
            const int64_t t = item / blocks, begin = item % blocks * kColumns;
            const int64_t n = w - begin < kColumns ? w - begin : kColumns;
            double dgamma[kColumns] = {}, dbeta[kColumns] = {};
            for (int64_t i = 0; i < longest_ && slot(t) >= 0; ++i) {
                const double* g = sums_.template as<double>() + slot(t) * size_ + i * w + begin;
                for (int64_t c = 0; c < n; ++c) {
                    dgamma[c] += static_cast<double>(table[i * w + begin + c]) * g[c];
                    dbeta[c] += g[c];
                }
            }
            for (int64_t c = 0; c < n; ++c) {
                if (a_.dgamma != nullptr) {
                    static_cast<A*>(a_.dgamma)[t * w + begin + c] = static_cast<A>(dgamma[c]);
                }
                if (a_.dbeta != nullptr) {
                    static_cast<A*>(a_.dbeta)[t * w + begin + c] = static_cast<A>(dbeta[c]);
                }
            }
        });
    }

private:
    int64_t number_tasks() {
        const Layout& layout = a_.shape.layout;
        int64_t* slots = slots_.template as<int64_t>();
        for (int64_t t = 0; t < layout.tasks; ++t) {
            slots[t] = -1;
        }
        int64_t count = 0;
        for (int64_t b = 0; b < layout.batch; ++b) {
            int64_t& slot = slots[layout.task_ids[b]];
            slot = slot < 0 ? count++ : slot;
        }
        return count;
    }
    static constexpr int64_t kColumns = 64;  // of dgamma and dbeta, for a thread at a time

    CAMTL_INLINE int64_t slot(int64_t task) const { return slots_.template as<int64_t>()[task]; }

    const ConditionalAttentionBackward& a_;
    int64_t longest_;
    int64_t size_;
    Scratch slots_;
    int64_t count_;
    Scratch sums_;
};

template <class S>
void backward(const ConditionalAttentionBackward& a) {
    using A = acc_t<S>;
    const AttentionShape& shape = a.shape;
    const Layout& layout = shape.layout;
    check_layout(layout);
    check_lengths(layout, shape.length);
    const int64_t D = shape.head_size, H = shape.heads, longest = longest_sequence(layout);
    Pieces<A> count(nullptr);
    BackwardScratch<A>(count, longest, D);
    const Scratch memory(sizeof(A) * static_cast<std::size_t>(count.used() * shape.threads));
    const auto run = [&](int64_t head, int thread, A* band) {
        Pieces<A> pieces(memory.as<A>() + thread * count.used());
        backward_head<S, A>(a, sequence(shape, head / H), head % H, band, BackwardScratch<A>(pieces, longest, D));
    };

    const int64_t heads = layout.batch * H;
    if (a.dtable == nullptr && a.dgamma == nullptr && a.dbeta == nullptr) {
        parallel_for(heads, shape.threads, [&](int64_t head, int thread) { run(head, thread, nullptr); });
    } else {
        const int64_t size = longest * shape.width;
        int64_t group = size == 0 ? heads : kBandBytes / static_cast<int64_t>(sizeof(A)) / size;
        group = group > shape.threads ? group : shape.threads;  // sums do not depend on how heads are grouped
        group = group < heads ? group : heads;
        const Scratch bands(sizeof(A) * static_cast<std::size_t>(group * size));
        BandSums<A> sums(a, longest);
        for (int64_t begin = 0; begin < heads; begin += group) {
            const int64_t end = begin + group < heads ? begin + group : heads;
            parallel_for(end - begin, shape.threads,
                         [&](int64_t item, int thread) { run(begin + item, thread, bands.as<A>() + item * size); });
            sums.add(bands.as<A>(), begin, end);
        }
        sums.write();
    }
    if (layout.cu_seqlens != nullptr) {
        const int64_t owned = layout.cu_seqlens[layout.batch], rest = layout.rows - owned;
        const AttentionTensor gradients[] = {a.dq, a.dk, a.dv};
        const Sequence tail{0, owned, rest, 0, 0};
        for (const AttentionTensor& t : gradients) {
            for (int64_t h = 0; t.data != nullptr && h < H; ++h) {
                zero_rows(head<S>(t, tail, h), t.position, rest, D);
            }
        }
    }
}

}  // namespace

void conditional_attention_backward(const ConditionalAttentionBackward& a) {
    with_storage(a.shape.dtype, [&](auto storage) { backward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
