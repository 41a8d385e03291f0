// What the files that define camtl._native share: from Python's tuples and addresses to the kernels' structs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "camtl/common.h"

namespace py = pybind11;

namespace camtl::bindings {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// (rows, batch, rows_per_sequence, cu_seqlens, task_ids, tasks)
inline Layout layout(const py::tuple& t) {
    Layout l;
    l.rows = t[0].cast<int64_t>();
    l.batch = t[1].cast<int64_t>();
    l.rows_per_sequence = t[2].cast<int64_t>();
    l.cu_seqlens = at<const int32_t>(t[3].cast<Address>());
    l.task_ids = at<const int64_t>(t[4].cast<Address>());
    l.tasks = t[5].cast<int64_t>();
    return l;
}

// (p, seed, offset)
inline Dropout dropout(const py::tuple& t) { return {t[0].cast<double>(), t[1].cast<int64_t>(), t[2].cast<int64_t>()}; }

}  // namespace camtl::bindings
