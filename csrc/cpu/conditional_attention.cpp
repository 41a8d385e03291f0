// conditional_attention, the forward pass.
//
// A piece of work is a sequence, a head and a run of queries. K is transposed and V copied into scratch memory as
// gemm.h reads them, both as float; then, kQueries queries at a time and kKeys keys at a time: the products q . k,
// the bias of the diagonal blocks added in place, softmax, and the product with V. Where a sequence has more than
// kKeys keys the running maximum and sum of a row are corrected from tile to tile (online softmax). Nothing of
// size S x S exists. Hidden keys at a sequence's end are never computed.
#include "attention.h"

namespace camtl::cpu::CAMTL_ISA {
namespace {

constexpr int64_t kQueries = 32;
constexpr int64_t kKeys = 512;

template <class A>
struct ForwardScratch {
    A* keys;    // K transposed, strips along keys
    A* values;  // V, strips along features
    A* hidden;
    A* q;       // [kQueries, width]
    A* scores;  // [kQueries, scores_row]
    A* o;       // [kQueries, width]
    A* scales;  // dropout's, one row of a tile
    int64_t width;
    int64_t scores_row;

    ForwardScratch(Pieces<A>& pieces, int64_t longest, int64_t D, bool dropout) {
        constexpr int64_t W = kLanes<A>;
        const int64_t tile = longest < kKeys ? longest : kKeys;
        width = vectors<A>(D) * W;
        scores_row = vectors<A>(tile) * W + W;  // one more vector: rows do not all start in the same cache sets
        keys = pieces.take(strips<A>(longest) * kStrip<A> * D);
        values = pieces.take(strips<A>(D) * kStrip<A> * longest);
        hidden = pieces.take(vectors<A>(longest) * W);
        q = pieces.take(kQueries * width);
        scores = pieces.take(kQueries * scores_row);
        o = pieces.take(kQueries * width);
        scales = pieces.take(dropout ? vectors<A>(tile) * W : 0);
    }
};

// The state of a row's softmax.
template <class A>
struct Row {
    A largest;
    A before;  // the maximum of earlier tiles
    A sum;
};

// Takes a row of scores into its maximum.
template <class A>
CAMTL_INLINE void find_largest(const A* row, int64_t n, Row<A>& state) {
    vec<A> high[4];
    for (int u = 0; u < 4; ++u) {
        high[u] = splat(A(-INFINITY));
    }
    each_vector_in_turn<A>(
        n, [&](int64_t j, auto lanes, auto turn) { high[turn] = vmax<A>(high[turn], load(row + j, lanes)); });
    const A tile = largest<A>(vmax<A>(vmax<A>(high[0], high[1]), vmax<A>(high[2], high[3])));
    state.before = state.largest;
    state.largest = tile > state.largest ? tile : state.largest;
}

// Turns the scores into exp(score - maximum), adds them to the row's sum, and returns by what earlier tiles' results
// shrink.
template <class A>
CAMTL_INLINE A exponentiate(A* row, int64_t n, Row<A>& state) {
    const A base = state.largest == A(-INFINITY) ? A(0) : state.largest;  // no key shown so far
    vec<A> sums[4] = {};
    each_vector_in_turn<A>(n, [&](int64_t j, auto lanes, auto turn) {
        const vec<A> e = vexp(load(row + j, lanes) - base);
        store(row + j, e, lanes);
        sums[turn] += e;
    });
    const A shrink = state.before == A(-INFINITY) ? A(0) : std::exp(state.before - base);
    state.sum = state.sum * shrink + sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return shrink;
}

template <class S, class A>
void attend(const ConditionalAttentionForward& a, const AttentionTensor& out, const Sequence& s, int64_t h,
            int64_t begin, int64_t end, const ForwardScratch<A>& m) {
    constexpr Full<kLanes<A>> W{};
    const AttentionShape& shape = a.shape;
    const int64_t D = shape.head_size;
    const bool packed = shape.layout.cu_seqlens != nullptr;
    A* lse =
        static_cast<A*>(a.lse) + (packed ? h * shape.layout.rows + s.first : (s.index * shape.heads + h) * s.length);
    S* o_rows = head<S>(out, s, h);
    if (s.keys == 0) {
        zero_rows(o_rows + begin * out.position, out.position, end - begin, D);
        for (int64_t i = begin; i < end; ++i) {
            lse[i] = A(INFINITY);
        }
        return;
    }
    pack_transposed(m.keys, head<const S>(a.k, s, h), a.k.position, s.keys, D);
    pack_strips(m.values, head<const S>(a.v, s, h), a.v.position, s.keys, D);
    const ScoreBias<A> bias(shape, s, m.hidden);
    const S* q = head<const S>(a.q, s, h);
    for (int64_t i0 = begin; i0 < end; i0 += kQueries) {
        const int64_t rows = end - i0 < kQueries ? end - i0 : kQueries;
        pack_rows(m.q, m.width, q + i0 * a.q.position, a.q.position, rows, D, static_cast<A>(shape.scale));
        Row<A> states[kQueries];
        for (int64_t r = 0; r < rows; ++r) {
            states[r] = {A(-INFINITY), A(-INFINITY), A(0)};
        }
        for (int64_t j0 = 0; j0 < s.keys; j0 += kKeys) {
            const int64_t n = s.keys - j0 < kKeys ? s.keys - j0 : kKeys;
            const int64_t n_vectors = vectors<A>(n);
            multiply<A>(rows, n_vectors, D, {m.q, m.width, 1}, {m.keys + j0 * D, D * kStrip<A>, kStrip<A>}, m.scores,
                        m.scores_row, false);
            // A few rows at a time: the end of one row's maximum or sum takes long, and waits for no other row.
            for (int64_t r0 = 0; r0 < rows; r0 += kRowsAtOnce) {
                const int64_t r1 = r0 + kRowsAtOnce < rows ? r0 + kRowsAtOnce : rows;
                for (int64_t r = r0; r < r1; ++r) {
                    bias.add(m.scores + r * m.scores_row, i0 + r, j0, j0 + n);
                    find_largest(m.scores + r * m.scores_row, n_vectors * W, states[r]);
                }
                for (int64_t r = r0; r < r1; ++r) {
                    A* row = m.scores + r * m.scores_row;
                    const A shrink = exponentiate(row, n_vectors * W, states[r]);
                    if (j0 > 0 && shrink != A(1)) {
                        for (int64_t d = 0; d < m.width; d += W) {
                            store(m.o + r * m.width + d, load(m.o + r * m.width + d, W) * shrink, W);
                        }
                    }
                    if (shape.dropout.p > 0) {
                        const uint64_t first = dropout_row(shape, s.index, h, i0 + r) + static_cast<uint64_t>(j0);
                        dropout_scales(m.scales, n, first, shape.dropout);
                        for (int64_t j = 0; j < n; j += W) {
                            store(row + j, load(row + j, W) * load(m.scales + j, W), W);
                        }
                    }
                }
            }
            multiply<A>(rows, vectors<A>(D), n, {m.scores, m.scores_row, 1},
                        {m.values + j0 * kStrip<A>, s.keys * kStrip<A>, kStrip<A>}, m.o, m.width, j0 > 0);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const A factor = A(1) / states[r].sum;
            S* to = o_rows + (i0 + r) * out.position;
            each_vector<A>(
                D, [&](int64_t d, auto lanes) { store(to + d, load(m.o + r * m.width + d, W) * factor, lanes); });
            lse[i0 + r] = states[r].largest + std::log(states[r].sum);
        }
    }
}

template <class S>
void forward(const ConditionalAttentionForward& a) {
    using A = acc_t<S>;
    const AttentionShape& shape = a.shape;
    const Layout& layout = shape.layout;
    check_layout(layout);
    check_lengths(layout, shape.length);
    const int64_t D = shape.head_size, H = shape.heads, longest = longest_sequence(layout);
    const bool packed = layout.cu_seqlens != nullptr;
    const AttentionTensor out{a.out, packed ? 0 : layout.rows_per_sequence * H * D, H * D, D};

    const bool dropout = shape.dropout.p > 0;
    Pieces<A> count(nullptr);
    ForwardScratch<A>(count, longest, D, dropout);
    const Scratch memory(sizeof(A) * static_cast<std::size_t>(count.used() * shape.threads));

    // Runs of whole blocks of queries: more than one a head only where there are few heads.
    const int64_t heads = layout.batch * H, blocks = (longest + kQueries - 1) / kQueries;
    int64_t runs = heads >= 2 * shape.threads ? 1 : 2 * shape.threads / (heads > 0 ? heads : 1);
    runs = runs < blocks ? runs : blocks;
    const int64_t run = runs == 0 ? 0 : (blocks + runs - 1) / runs * kQueries;
    parallel_for(heads * runs, shape.threads, [&](int64_t item, int thread) {
        const Sequence s = sequence(shape, item / runs / H);
        const int64_t begin = item % runs * run, end = begin + run < s.length ? begin + run : s.length;
        if (begin < end) {
            Pieces<A> pieces(memory.as<A>() + thread * count.used());
            attend<S, A>(a, out, s, item / runs % H, begin, end, ForwardScratch<A>(pieces, longest, D, dropout));
        }
    });
    if (packed) {
        const int64_t owned = layout.cu_seqlens[layout.batch], rest = layout.rows - owned;
        zero_rows(static_cast<S*>(a.out) + owned * H * D, H * D, rest, H * D);
        for (int64_t h = 0; h < H; ++h) {
            for (int64_t row = owned; row < layout.rows; ++row) {
                static_cast<A*>(a.lse)[h * layout.rows + row] = A(INFINITY);
            }
        }
    }
}

}  // namespace

void conditional_attention_forward(const ConditionalAttentionForward& a) {
    with_storage(a.shape.dtype, [&](auto storage) { forward<decltype(storage)>(a); });
}

}  // namespace camtl::cpu::CAMTL_ISA
