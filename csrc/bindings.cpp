// Python's door to the kernels. Arguments are addresses, sizes, strides and a thread count, checked by fastgpt/cpu
// before they come here; no header of torch is needed, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#ifndef _WIN32
#include <pthread.h>
#endif
#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace py = pybind11;

namespace fastgpt {

namespace baseline {
extern const Kernels kernels;
}
#ifdef FASTGPT_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(FASTGPT_X86) && defined(_MSC_VER)
bool cpuid_bit(int leaf, int reg, int bit) {
    int r[4];
    __cpuidex(r, leaf, 0);
    return (r[reg] >> bit) & 1;
}
// The operating system must save the registers too: XCR0 names which.
bool os_saves(unsigned long long state) { return cpuid_bit(1, 2, 27) && (_xgetbv(0) & state) == state; }
bool has_avx2() { return os_saves(0x6) && cpuid_bit(7, 1, 5) && cpuid_bit(1, 2, 12); }
bool has_avx512() {
    return has_avx2() && os_saves(0xe6) && cpuid_bit(7, 1, 16) && cpuid_bit(7, 1, 17) && cpuid_bit(7, 1, 30) &&
           cpuid_bit(7, 1, 31);
}
#elif defined(FASTGPT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernels*> runnable() {  // slowest first
    std::vector<const Kernels*> found{&baseline::kernels};
#ifdef FASTGPT_X86
    if (has_avx2()) found.push_back(&avx2::kernels);
    if (has_avx512()) found.push_back(&avx512::kernels);
#endif
    return found;
}

std::atomic<const Kernels*> active{nullptr};
const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* k : runnable()) names.emplace_back(k->isa);
    return names;
}

void set_isa(const std::string& name) {
    for (const Kernels* k : runnable())
        if (name == k->isa) {
            active = k;
            return;
        }
    throw std::invalid_argument("instruction set " + name + " cannot run here");
}

// GNU OpenMP's worker threads do not survive a fork, and a parallel region in the child would wait for them for ever.
std::atomic<bool> forked{false};
int usable(int threads) { return forked.load(std::memory_order_relaxed) || threads < 1 ? 1 : threads; }

float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

void layer_norm(uintptr_t x, uintptr_t branch, uintptr_t weight, uintptr_t bias, uintptr_t total, uintptr_t y,
                uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols, float eps, int threads) {
    kernels().layer_norm(at(x), at(branch), at(weight), at(bias), at(total), at(y), at(mean), at(rstd), rows, cols, eps,
                         usable(threads));
}

void bias_gelu(uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int64_t cols, int threads) {
    kernels().bias_gelu(at(x), at(bias), at(y), rows, cols, usable(threads));
}

using Strides = std::array<int64_t, 3>;  // along batch, head and token

void causal_attention(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
                      const Strides& v_strides, uintptr_t out, const Strides& out_strides, uintptr_t lse, int64_t batch,
                      int64_t heads, int64_t queries, int64_t keys, int64_t head_dim, float scale, int threads) {
    const AttentionShape shape{batch,        heads,        queries,        keys,           head_dim,      q_strides[0],
                               q_strides[1], q_strides[2], k_strides[0],   k_strides[1],   k_strides[2],  v_strides[0],
                               v_strides[1], v_strides[2], out_strides[0], out_strides[1], out_strides[2]};
    if (!kernels().causal_attention(at(q), at(k), at(v), at(out), at(lse), scale, shape, usable(threads)))
        throw std::bad_alloc();
}

// The records come as flat lists of 64-bit fields, in the order of the structs in kernels.h.
using Record = std::vector<int64_t>;

Forward forward_record(const Record& fields) {
    Forward f;
    static_assert(sizeof(Forward) % sizeof(int64_t) == 0 && sizeof(void*) == sizeof(int64_t), "64-bit fields alone");
    if (fields.size() * sizeof(int64_t) != sizeof f) throw std::invalid_argument("forward: wrong number of fields");
    std::memcpy(&f, fields.data(), sizeof f);
    return f;
}

int64_t forward_workspace(const Record& fields, int threads) {
    return kernels().forward_workspace(forward_record(fields), threads);
}

void forward(const Record& fields, const Record& blocks, float eps, int threads) {
    const Forward f = forward_record(fields);
    if (blocks.size() * sizeof(int64_t) != sizeof(Block) * static_cast<size_t>(f.n_blocks))
        throw std::invalid_argument("forward: wrong number of block fields");
    std::vector<Block> records(static_cast<size_t>(f.n_blocks));
    if (!records.empty()) std::memcpy(records.data(), blocks.data(), sizeof(Block) * records.size());
    py::gil_scoped_release unlocked;
    kernels().forward(f, records.data(), eps, usable(threads));
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_C, m) {
    using namespace fastgpt;
    active = runnable().back();
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("isas", &isas, "Names of the instruction sets that this machine can run, slowest first.");
    m.def("isa", [] { return kernels().isa; }, "Name of the active instruction set.");
    m.def("set_isa", &set_isa, "Makes an instruction set the active one; ValueError where it cannot run.");
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("layer_norm", &layer_norm, unlocked);
    m.def("bias_gelu", &bias_gelu, unlocked);
    m.def("causal_attention", &causal_attention, unlocked);
    m.def("forward_workspace", &forward_workspace);
    m.def("forward", &forward);
}
