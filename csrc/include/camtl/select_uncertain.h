// select_uncertain: score M candidates by their uncertainty and pick k.
#pragma once

#include "camtl/common.h"

namespace camtl {

struct SelectUncertainForward {
    bool is_double;              // entropy and scores are double, else float
    int64_t candidates;          // M
    int64_t tasks;               // T
    int64_t places;              // min(k, M)
    bool reference_score;        // entropy * mean of the task / largest mean; else entropy
    const void* entropy;         // [M], acc, contiguous
    const int64_t* task_ids;     // [M]
    const int64_t* borrow;       // [T], -1 = own; or null
    const int64_t* reserve;      // [T]; or null
    int64_t* indices;            // [places]
    void* scores;                // [M], acc
};

struct SelectUncertainBackward {
    bool is_double;
    int64_t candidates;
    int64_t tasks;
    bool reference_score;
    const void* entropy;
    const int64_t* task_ids;
    const int64_t* borrow;
    const void* dscores;         // [M], acc
    void* dentropy;              // [M], acc
};

namespace cpu {
void select_uncertain_forward(const SelectUncertainForward&);
void select_uncertain_backward(const SelectUncertainBackward&);
}  // namespace cpu

}  // namespace camtl
