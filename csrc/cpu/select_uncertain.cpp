// select_uncertain: a count and a running number per task, scores, and the k best: O(M + k log k), with
// memory for a few numbers per candidate. Compiled once: there is nothing here for wide registers, and one
// thread orders thousands of candidates faster than two could be woken.
#include "camtl/select_uncertain.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace camtl::cpu {
namespace {

// Where each candidate stands among those of its task.
struct Ranks {
    Ranks(int64_t candidates, int64_t tasks, const int64_t* task_ids)
        : begin(static_cast<std::size_t>(tasks) + 1, 0),
          rank(static_cast<std::size_t>(candidates)),
          members(static_cast<std::size_t>(candidates)) {
        for (int64_t m = 0; m < candidates; ++m) {
            const int64_t task = task_ids[m];
            if (task < 0 || task >= tasks) {
                throw std::invalid_argument("task_ids must be in [0, " + std::to_string(tasks) + "), the tasks; got " +
                                            std::to_string(task));
            }
            rank[m] = begin[task + 1]++;
        }
        for (int64_t task = 0; task < tasks; ++task) {
            begin[task + 1] += begin[task];
        }
        for (int64_t m = 0; m < candidates; ++m) {
            members[begin[task_ids[m]] + rank[m]] = m;
        }
    }
    int64_t count(int64_t task) const { return begin[task + 1] - begin[task]; }

    // Whose score m takes: the candidate of the same rank of the task it borrows from, or its own.
    int64_t source(int64_t m, int64_t task, const int64_t* borrow, int64_t tasks) const {
        const int64_t donor = borrow == nullptr ? -1 : borrow[task];
        const bool has = donor >= 0 && donor < tasks && rank[m] < count(donor);
        return has ? members[begin[donor] + rank[m]] : m;
    }

    std::vector<int64_t> begin, rank, members;
};

// The mean entropy per task (0 without candidates) and the largest of them; NaN if one is NaN.
template <class A>
struct Means {
    Means(const A* entropy, const int64_t* task_ids, int64_t candidates, int64_t tasks, const Ranks& ranks)
        : mean(static_cast<std::size_t>(tasks)), largest(-std::numeric_limits<A>::infinity()) {
        std::vector<double> total(static_cast<std::size_t>(tasks), 0.0);
        for (int64_t m = 0; m < candidates; ++m) {
            total[task_ids[m]] += static_cast<double>(entropy[m]);
        }
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t count = ranks.count(task);
            mean[task] = static_cast<A>(count > 0 ? total[task] / static_cast<double>(count) : 0.0);
            largest = mean[task] > largest || std::isnan(mean[task]) ? mean[task] : largest;
            if (std::isnan(largest)) {
                return;  // so is whatever the others would make of it
            }
        }
    }

    std::vector<A> mean;
    A largest;
};

template <class A>
struct Candidate {
    A score;
    bool spare;  // has no reserved place
    int64_t index;
};

// Descending, NaN above all numbers, as torch.sort orders; then the lower index.
template <class A>
bool better(const Candidate<A>& a, const Candidate<A>& b) {
    const bool a_nan = std::isnan(a.score), b_nan = std::isnan(b.score);
    if (a_nan != b_nan) {
        return a_nan;
    }
    if (!a_nan && a.score != b.score) {
        return a.score > b.score;
    }
    return a.index < b.index;
}

template <class A>
void forward(const SelectUncertainForward& a) {
    const int64_t M = a.candidates;
    const A* entropy = static_cast<const A*>(a.entropy);
    A* scores = static_cast<A*>(a.scores);
    const Ranks ranks(M, a.tasks, a.task_ids);

    std::vector<A> own(entropy, entropy + M);
    if (a.reference_score) {
        const Means<A> means(entropy, a.task_ids, M, a.tasks, ranks);
        for (int64_t m = 0; m < M; ++m) {
            own[m] = means.largest > 0 ? entropy[m] * means.mean[a.task_ids[m]] / means.largest : A(0);
        }
    }
    std::vector<Candidate<A>> candidates(static_cast<std::size_t>(M));
    for (int64_t m = 0; m < M; ++m) {
        const int64_t task = a.task_ids[m];
        scores[m] = own[ranks.source(m, task, a.borrow, a.tasks)];
        candidates[m] = {scores[m], a.reserve == nullptr || ranks.rank[m] >= a.reserve[task], m};
    }

    const auto begin = candidates.begin(), end = candidates.begin() + std::min(a.places, M);
    if (end != candidates.end()) {
        std::nth_element(begin, end, candidates.end(), [](const Candidate<A>& p, const Candidate<A>& q) {
            return p.spare != q.spare ? q.spare : better(p, q);
        });
    }
    std::sort(begin, end, better<A>);
    for (auto chosen = begin; chosen != end; ++chosen) {
        a.indices[chosen - begin] = chosen->index;
    }
}

template <class A>
void backward(const SelectUncertainBackward& a) {
    const int64_t M = a.candidates;
    const A* entropy = static_cast<const A*>(a.entropy);
    const A* dscores = static_cast<const A*>(a.dscores);
    A* dentropy = static_cast<A*>(a.dentropy);
    const Ranks ranks(M, a.tasks, a.task_ids);

    std::vector<double> down(static_cast<std::size_t>(M), 0.0);  // gradient of the own scores
    for (int64_t m = 0; m < M; ++m) {
        down[ranks.source(m, a.task_ids[m], a.borrow, a.tasks)] += static_cast<double>(dscores[m]);
    }
    if (!a.reference_score) {
        std::copy(down.begin(), down.end(), dentropy);
        return;
    }
    // score = e * mean[t] / largest, largest = max over tasks: ties share its gradient evenly.
    const Means<A> means(entropy, a.task_ids, M, a.tasks, ranks);
    const double largest = static_cast<double>(means.largest);
    if (!(largest > 0)) {
        std::fill(dentropy, dentropy + M, A(0));
        return;
    }
    std::vector<double> dmean(static_cast<std::size_t>(a.tasks), 0.0);
    for (int64_t m = 0; m < M; ++m) {
        dmean[a.task_ids[m]] += down[m] * static_cast<double>(entropy[m]) / largest;
    }
    double dlargest = 0, ties = 0;
    for (int64_t task = 0; task < a.tasks; ++task) {
        dlargest -= dmean[task] * static_cast<double>(means.mean[task]) / largest;
        ties += means.mean[task] == means.largest ? 1 : 0;
    }
    for (int64_t task = 0; task < a.tasks; ++task) {
        dmean[task] += means.mean[task] == means.largest ? dlargest / ties : 0;
        dmean[task] /= static_cast<double>(std::max<int64_t>(ranks.count(task), 1));
    }
    for (int64_t m = 0; m < M; ++m) {
        const int64_t task = a.task_ids[m];
        dentropy[m] = static_cast<A>(down[m] * static_cast<double>(means.mean[task]) / largest + dmean[task]);
    }
}

}  // namespace

void select_uncertain_forward(const SelectUncertainForward& a) { a.is_double ? forward<double>(a) : forward<float>(a); }

void select_uncertain_backward(const SelectUncertainBackward& a) {
    a.is_double ? backward<double>(a) : backward<float>(a);
}

}  // namespace camtl::cpu
