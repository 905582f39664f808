// A team of threads that hands out pieces in phases, for ThreadSanitizer: every piece reads what another thread may
// have written in the phase before. Compiled and run by test_sharing_work.py.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define FASTGPT_ISA plain
#include "parallel.h"

void fastgpt::yield_processor() { std::this_thread::yield(); }
double fastgpt::seconds_now() { return 0; }

using namespace fastgpt::plain;

int main(int, char** arguments) {
    const int64_t threads = std::atoi(arguments[1]), rounds = std::atoi(arguments[2]), pieces = 37, phases = 60;
    for (int64_t round = 0; round < rounds; ++round) {
        Work work(threads);
        std::vector<int64_t> a(2 * pieces, 1), b(2 * pieces, 1);
        const auto member = [&](int64_t part) {
            Team team(part, threads, work, nullptr);
            for (int64_t phase = 0; phase < phases; ++phase) {
                std::vector<int64_t>&from = phase % 2 ? b : a, &to = phase % 2 ? a : b;
                team.share(pieces, [&](int64_t i, bool) { to[i] = from[(i + 1) % pieces] + 1; });
                team.share(phase % 5, [&](int64_t i, bool) { to[pieces + i] = from[i] + from[(i + 7) % pieces]; });
                team.barrier();
            }
        };
        std::vector<std::thread> started;
        for (int64_t part = 0; part < threads; ++part) started.emplace_back(member, part);
        for (std::thread& thread : started) thread.join();
        for (int64_t i = 0; i < pieces; ++i)
            if (a[i] != 1 + phases) return std::printf("piece %d is wrong\n", static_cast<int>(i)), 1;
    }
    return 0;
}
