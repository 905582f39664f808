// How many threads a small call takes, by how long it took before.
//
// Where another program has a core, the thread there stops in the middle of a piece for some milliseconds, and the
// others wait for it at the next barrier. A call of that length may be faster on one thread, whose bits are the same.
#pragma once

#include <cstdint>

namespace fastgpt {

// Of calls that do the same work. It tries one thread where threads have waited for a good part of several calls, and
// stays with what was faster for a while.
class Pace {
  public:
    // What the next call should take, of `threads`.
    int threads(int threads) const { return state_ == kTryingOne || state_ == kOne ? 1 : threads; }

    // Seconds that a call took, and that each thread but one waited in it, on average.
    void took(double seconds, double waited) {
        seconds_ += seconds, waited_ += waited, ++calls_;
        if (state_ == kSeveral && calls_ == kTrial) {
            several_ = seconds_;
            go_on(waited_ > kMuch * seconds_ ? kTryingOne : kSeveral);
        } else if (state_ == kTryingOne && seconds_ >= several_) {  // at once: one of many may be many times slower
            stay_ = 4 * stay_ < kLongest ? 4 * stay_ : kLongest;
            go_on(kSeveralForSure);
        } else if (state_ == kTryingOne && calls_ == kTrial) {
            stay_ = kStay;
            go_on(kOne);
        } else if ((state_ == kOne || state_ == kSeveralForSure) && calls_ >= stay_) {
            go_on(kSeveral);
        }
    }

  private:
    enum State { kSeveral, kTryingOne, kOne, kSeveralForSure };
    static constexpr int kTrial = 6, kStay = 100, kLongest = 6400;  // calls
    static constexpr double kMuch = 0.15;

    void go_on(State state) { state_ = state, seconds_ = waited_ = 0, calls_ = 0; }

    State state_ = kSeveral;
    int calls_ = 0, stay_ = kStay;
    double seconds_ = 0, waited_ = 0, several_ = 0;
};

}  // namespace fastgpt
