// OpenMP, as the kernels use it. The thread count is the caller's (torch's), never OpenMP's own default; built
// without OpenMP, everything runs on the calling thread.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

// f(part, parts) on each of at most `threads` threads at once; the runtime may grant fewer (nested regions, limits).
template <class F>
inline void parallel_region(int64_t threads, F f) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        f(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
        return;
    }
#endif
    f(int64_t{0}, int64_t{1});
}

// Inside a region: waits for its other threads.
inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// f(begin, end) over [0, n) in one piece a thread, none much shorter than the grain.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, F f) {
    const int64_t wanted = (n + grain - 1) / grain;
    if (n <= 0) return;
    parallel_region(wanted < threads ? wanted : threads,
                    [&](int64_t part, int64_t parts) { f(n * part / parts, n * (part + 1) / parts); });
}

// The next address that begins a cache line.
inline float* aligned(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
