// OpenMP, as the kernels use it. The thread count is the caller's (torch's), never OpenMP's own default; built
// without OpenMP, everything runs on the calling thread.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define FASTGPT_PAUSE() _mm_pause()
#else
#define FASTGPT_PAUSE() static_cast<void>(0)
#endif
#ifdef _OPENMP  // declared here because omp.h may be that of another compiler
extern "C" int omp_get_thread_num(), omp_get_num_threads();
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

// f(part, parts) on each of at most `threads` threads at once; the runtime may grant fewer (nested regions, limits).
template <class F>
inline void parallel_region([[maybe_unused]] int64_t threads, F f) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
        f(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
        return;
    }
#endif
    f(int64_t{0}, int64_t{1});
}

// Where the threads of a region meet. It spins for a little and then yields: OpenMP's own barrier spins on, and
// on a machine with other work (or fewer cores than threads) that takes several times as long.
class Barrier {
  public:
    // Every one of the region's threads calls this with their number.
    void wait(int64_t threads) {
        if (threads == 1) return;
        const int64_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
            if (spins < 4000)
                FASTGPT_PAUSE();
            else
                yield_processor();
    }

  private:
    std::atomic<int64_t> arrived_{0}, phase_{0};
};

// One thread's view of a region whose threads share phases of work.
struct Team {
    int64_t part, parts;
    Barrier& meeting;
    float* scratch;  // this thread's own

    void barrier() const { meeting.wait(parts); }

    // f(row) for this thread's share of the rows, then a barrier.
    template <class F>
    void share_rows(int64_t rows, F f) const {
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) f(r);
        barrier();
    }
};

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
