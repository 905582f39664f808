// FASTGPT_PAUSE(): what a thread does between two looks at a counter that another one changes.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define FASTGPT_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define FASTGPT_PAUSE() asm volatile("isb sy")  // a pause of the length of x86's; `yield` is none on most cores
#else
#define FASTGPT_PAUSE() static_cast<void>(0)
#endif
