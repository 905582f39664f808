// How many threads csrc/pace.h gives each of some calls whose lengths are known: `pace SEVERAL ONE WAITED CALLS`, the
// seconds of a call on four threads and on one, the share of them that a thread waits, and how many calls. Prints the
// threads of each. Compiled and run by test_sharing_work.py.
#include "pace.h"

#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {
    fastgpt::Pace pace;
    const double several = std::atof(arguments[1]), one = std::atof(arguments[2]), waited = std::atof(arguments[3]);
    for (int calls = std::atoi(arguments[4]); calls > 0; --calls) {
        const int threads = pace.threads(4);
        std::printf("%d ", threads);
        pace.took(threads > 1 ? several : one, threads > 1 ? waited * several : 0);
    }
    return 0;
}
