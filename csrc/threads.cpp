// The threads of the OpenMP runtime that torch has loaded, whatever its file is called, so that a process has one pool
// of them; where there is none, threads of our own. On Windows on x86 the compiler calls torch's runtime.
#ifndef _OPENMP
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "kernels.h"
#include "pause.h"

#ifndef _WIN32
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace fastgpt {
namespace {

constexpr int kLooks = 20000;  // for the next call, a fraction of a millisecond, before a helper sleeps

// GNU's entry point, which LLVM's runtime has too: GCC makes a call of it of a parallel region.
typedef void (*GompParallel)(void (*f)(void*), void* of, unsigned threads, unsigned flags);

// As the loader finds it for torch's operations: on a Mac in what they were linked to, else among what all libraries
// see first.
GompParallel find_openmp() {
#if defined(_WIN32) || defined(FASTGPT_OWN_THREADS)
    return nullptr;
#else
    const char* const name = "GOMP_parallel";
#ifdef __APPLE__
    void* const torch = dlopen("@rpath/libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
    void* found = torch ? dlsym(torch, name) : nullptr;
    if (!found) found = dlsym(RTLD_DEFAULT, name);
#else
    void* found = dlsym(RTLD_DEFAULT, name);
    void* const torch = found ? nullptr : dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch) found = dlsym(torch, name);
#endif
    return reinterpret_cast<GompParallel>(found);
#endif
}

GompParallel openmp() {
    static const GompParallel found = find_openmp();
    return found;
}

// condition_variable::wait would ask for a newer libstdc++ than many an environment has.
template <class Condition>
void wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Condition condition) {
    while (!condition()) changed.wait_until(lock, std::chrono::system_clock::now() + std::chrono::hours(1));
}

// What a calling thread and its helpers share.
struct Crew {
    std::mutex mutex;
    std::condition_variable called, left;
    std::atomic<uint64_t> calls{0};   // so far
    std::atomic<int64_t> at_work{0};  // helpers
    // Under the mutex: the call, the part that the next helper takes of it, and whether the calling thread has ended.
    PartOfRegion f = nullptr;
    void* of = nullptr;
    int64_t parts = 0, next = 0;
    bool over = false;
};

void help(const std::shared_ptr<Crew>& crew) {
    uint64_t seen = 0;
    for (;;) {
        for (int looks = 0; looks < kLooks && crew->calls == seen; ++looks) FASTGPT_PAUSE();
        std::unique_lock<std::mutex> lock(crew->mutex);
        wait_until(crew->called, lock, [&] { return crew->calls != seen || crew->over; });
        if (crew->over) return;
        seen = crew->calls;
        if (crew->next >= crew->parts) continue;
        const int64_t part = crew->next++;
        ++crew->at_work;
        lock.unlock();
        crew->f(crew->of, part, crew->parts);  // they stay as they are while anybody is at work
        lock.lock();
        if (--crew->at_work == 0) crew->left.notify_one();
    }
}

int64_t process() {
#ifdef _WIN32
    return 0;
#else
    return getpid();
#endif
}

// The calling thread's own, which sleep between its calls and end with it.
class Helpers {
  public:
    Helpers() = default;
    Helpers(const Helpers&) = delete;
    Helpers& operator=(const Helpers&) = delete;

    ~Helpers() {
        if (process_ != process()) return;  // a fork leaves them behind, the mutex perhaps with one of them
        const std::lock_guard<std::mutex> lock(crew->mutex);
        crew->over = true;
        crew->called.notify_all();
    }

    void be(int64_t number) {
        try {
            for (; number_ < number; ++number_) std::thread(help, crew).detach();
        } catch (const std::system_error&) {  // no more threads are to be had: fewer do the work
        }
    }

    const std::shared_ptr<Crew> crew = std::make_shared<Crew>();

  private:
    const int64_t process_ = process();
    int64_t number_ = 0;
};

void run_on_our_own(int64_t parts, PartOfRegion f, void* of) {
    thread_local Helpers helpers;
    helpers.be(parts - 1);
    Crew& crew = *helpers.crew;
    {
        const std::lock_guard<std::mutex> lock(crew.mutex);
        crew.f = f, crew.of = of, crew.parts = parts, crew.next = 1;
        ++crew.calls;
    }
    crew.called.notify_all();
    f(of, 0, parts);
    std::unique_lock<std::mutex> lock(crew.mutex);
    crew.next = parts;  // a helper that has not begun is no longer needed
    lock.unlock();
    for (int looks = 0; looks < kLooks && crew.at_work > 0; ++looks) FASTGPT_PAUSE();
    lock.lock();
    wait_until(crew.left, lock, [&] { return crew.at_work == 0; });
}

}  // namespace

bool has_openmp() { return openmp() != nullptr; }

void run_parts(int64_t parts, PartOfRegion f, void* of) {
    if (!has_openmp()) return run_on_our_own(parts, f, of);
    struct Region {
        PartOfRegion f;
        void* of;
        int64_t parts;
        std::atomic<int64_t> next{0};
    } region{f, of, parts};
    openmp()(
        [](void* r) {
            Region& region = *static_cast<Region*>(r);
            region.f(region.of, region.next++, region.parts);
        },
        &region, static_cast<unsigned>(parts), 0);
}

}  // namespace fastgpt
#endif
