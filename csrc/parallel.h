// Splits a range over OpenMP threads. The thread count is the caller's (torch's), never OpenMP's own default;
// a range shorter than the grain runs on the calling thread. Built without OpenMP, everything runs there.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

// f(part, parts) runs once for each part, at the same time where threads are at hand.
template <class F>
inline void parallel_parts(int64_t parts, F f) {
#ifdef _OPENMP
    if (parts > 1) {
        // The runtime may grant fewer threads (nested regions, limits): each then takes several parts.
#pragma omp parallel num_threads(static_cast<int>(parts))
        for (int64_t part = omp_get_thread_num(); part < parts; part += omp_get_num_threads()) f(part, parts);
        return;
    }
#endif
    for (int64_t part = 0; part < parts; ++part) f(part, parts);
}

// f(begin, end) over [0, n) in one piece a thread, none much shorter than the grain.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, F f) {
    const int64_t wanted = (n + grain - 1) / grain;
    const int64_t parts = wanted < threads ? wanted : threads;
    if (n <= 0) return;
    parallel_parts(parts, [&](int64_t part, int64_t of) { f(n * part / of, n * (part + 1) / of); });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
