// Threads, as the kernels use them: those of threads.cpp, on Windows on x86 OpenMP's. Their number is the caller's
// (torch's), never OpenMP's own default.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "pause.h"

#ifdef _OPENMP  // declared here because omp.h may be that of another compiler
extern "C" int omp_get_thread_num(), omp_get_num_threads();
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kMaxThreads = 256;
constexpr int kLooks = 2000;  // at a counter before a waiting thread leaves its core to others

// f(part, parts) on at most `threads` threads at once. OpenMP may grant fewer (nested regions, limits), and of our own
// one that has not begun when the calling thread is done leaves its part out: parts share work, none has its own.
template <class F>
inline void parallel_region(int64_t threads, F f) {
    if (threads < 2) return f(int64_t{0}, int64_t{1});
    const int64_t most = threads < kMaxThreads ? threads : kMaxThreads;
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(most))
    f(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
#else
    run_parts(most, [](void* of, int64_t part, int64_t parts) { (*static_cast<F*>(of))(part, parts); }, &f);
#endif
}

// What the threads of a region have still to do. A job is a number of pieces; each thread has a queue with a share of
// them, and takes from the others' when its own is empty. So a thread whose core is slow or taken does less, and one
// that doesn't run at all holds nobody up: its pieces are done by others. Jobs are numbered from 1 on, the same for
// all.
class Work {
  public:
    explicit Work(int64_t threads) {
        for (int64_t i = 0; i < threads && i < kMaxThreads; ++i) queues_[i].state.store(0, std::memory_order_relaxed);
    }

    // A piece of what is left of the owner's share [first, last) of a job, the owner's own call from the front and
    // others from the back; -1 if nothing is left. Whoever comes first fills the queue.
    int64_t take(int64_t owner, uint64_t job, int64_t first, int64_t last, bool own) {
        std::atomic<uint64_t>& state = queues_[owner].state;
        uint64_t seen = state.load(std::memory_order_relaxed);
        for (;;) {
            if (seen >> 2 * kBits > job) return -1;
            const bool begun = seen >> 2 * kBits == job;
            const uint64_t next = begun ? seen >> kBits & kMask : static_cast<uint64_t>(first);
            const uint64_t end = begun ? seen & kMask : static_cast<uint64_t>(last);
            if (next >= end) return -1;
            const uint64_t left = own ? (next + 1) << kBits | end : next << kBits | (end - 1);
            if (state.compare_exchange_weak(seen, job << 2 * kBits | left, std::memory_order_relaxed))
                return static_cast<int64_t>(own ? next : end - 1);
        }
    }

    void add_done(int64_t pieces) { done_.fetch_add(pieces, std::memory_order_release); }
    bool done(int64_t pieces) const { return done_.load(std::memory_order_acquire) >= pieces; }

    // Until so many pieces are done. It spins for a little and then yields: OpenMP's own barrier spins on, and on a
    // machine with other work (or fewer cores than threads) that takes several times as long.
    void wait(int64_t pieces) {
        for (int looks = 0; looks < kLooks; ++looks) {
            if (done(pieces)) return;
            FASTGPT_PAUSE();
        }
        const double begin = seconds_now();
        while (!done(pieces)) yield_processor();
        nanoseconds_waited_.fetch_add(static_cast<int64_t>((seconds_now() - begin) * 1e9), std::memory_order_relaxed);
    }

    double seconds_waited() const { return 1e-9 * static_cast<double>(nanoseconds_waited_.load()); }

  private:
    static constexpr int kBits = 20;  // of a piece's number; a job's number has the rest
    static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
    struct alignas(64) Queue {
        std::atomic<uint64_t> state;  // job, next piece, end
    };
    alignas(64) std::atomic<int64_t> done_{0};  // pieces of all jobs so far
    alignas(64) std::atomic<int64_t> nanoseconds_waited_{0};
    Queue queues_[kMaxThreads];
};

// One thread's view of a region whose threads share jobs. Every thread calls the same methods in the same order.
class Team {
  public:
    const int64_t part, parts;
    float* const scratch;  // this thread's own

    Team(int64_t part_, int64_t parts_, Work& work, float* scratch_)
        : part(part_), parts(parts_), scratch(scratch_), work_(work) {}

    // f(piece, again) for each of [0, pieces), at most 2^20, by whichever thread is free; again: whether this thread
    // has done another piece of the job just before.
    template <class F>
    void share(int64_t pieces, F f) {
        if (parts == 1) {
            for (int64_t i = 0; i < pieces; ++i) f(i, i > 0);
            return;
        }
        ++job_, due_ += pieces;
        bool again = false;
        const auto help = [&](int64_t owner) {
            const int64_t first = pieces * owner / parts, last = pieces * (owner + 1) / parts;
            int64_t count = 0;
            for (int64_t i; (i = work_.take(owner, job_, first, last, owner == part)) >= 0; ++count, again = true)
                f(i, again);
            if (count) work_.add_done(count);
        };
        help(part);
        for (int64_t i = 1; i < parts && !work_.done(due_); ++i) help((part + i) % parts);
    }

    // Until every piece of the jobs so far is done.
    void barrier() {
        if (parts > 1) work_.wait(due_);
    }

    // f(begin, end) over [0, n) in pieces.
    template <class F>
    void share_range(int64_t n, F f) {
        const int64_t most = parts == 1 ? 1 : kPieces * parts, pieces = n < most ? n : most;
        share(pieces, [&](int64_t i, bool) { f(n * i / pieces, n * (i + 1) / pieces); });
    }

    // f(row) for each of the rows, then a barrier.
    template <class F>
    void share_rows(int64_t rows, F f) {
        share_range(rows, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) f(r);
        });
        barrier();
    }

    static constexpr int64_t kPieces = 4;  // of a job, for each thread

  private:
    Work& work_;
    uint64_t job_ = 0;
    int64_t due_ = 0;  // pieces of all jobs so far
};

// f(team) on each of at most `threads` threads, `floats` of the scratch for each.
template <class F>
inline void in_team(int64_t threads, float* scratch, int64_t floats, F f) {
    Work work(threads);
    parallel_region(threads, [&](int64_t part, int64_t parts) {
        Team team(part, parts, work, scratch + part * floats);
        f(team);
    });
    seconds_waited() += work.seconds_waited();
}

// f(begin, end) over [0, n) in pieces, on no more threads than there are grains.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, F f) {
    if (n <= 0) return;
    const int64_t wanted = (n + grain - 1) / grain;
    in_team(wanted < threads ? wanted : threads, nullptr, 0, [&](Team& team) { team.share_range(n, f); });
}

// The next address that begins a cache line.
inline float* aligned(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
