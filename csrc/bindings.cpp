// Python's door to the kernels. Arguments are addresses, sizes, strides and a thread count, checked by fastgpt/cpu
// before they come here; no header of torch is needed, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "pace.h"

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>
#endif
#ifdef FASTGPT_X86
#include <cpuid.h>
#endif

#ifdef FASTGPT_OPENBLAS
extern "C" void scipy_openblas_set_num_threads(int);
#endif

#ifndef FASTGPT_BLAS
#define FASTGPT_BLAS ""
#endif

namespace py = pybind11;

namespace fastgpt {

#ifdef __aarch64__
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif
#ifdef FASTGPT_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

void yield_processor() { std::this_thread::yield(); }

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double& seconds_waited() {
    thread_local double seconds = 0;
    return seconds;
}

namespace {

#ifdef FASTGPT_X86
// __builtin_cpu_supports would be shorter, but on Windows clang-cl has no library for it.
enum Register { kEax, kEbx, kEcx, kEdx };
bool cpuid_bits(unsigned leaf, unsigned subleaf, Register in, unsigned bits) {
    unsigned r[4];
    return __get_cpuid_count(leaf, subleaf, r, r + 1, r + 2, r + 3) && (r[in] & bits) == bits;
}
// The operating system must save the registers too: XCR0 says which of them it does.
bool os_saves(unsigned state) {
    if (!cpuid_bits(1, 0, kEcx, bit_OSXSAVE)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & state) == state;
}
bool has_avx2() {
    return os_saves(0x06) && cpuid_bits(1, 0, kEcx, bit_FMA | bit_F16C) && cpuid_bits(7, 0, kEbx, bit_AVX2);
}
bool has_avx512() {
    return has_avx2() && os_saves(0xe6) &&
           cpuid_bits(7, 0, kEbx, bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL);
}
bool has_avx512_bf16() {
    return has_avx512() && cpuid_bits(7, 0, kEcx, bit_AVX512VNNI) && cpuid_bits(7, 1, kEax, bit_AVX512BF16);
}
#endif

std::vector<const Kernels*> find_runnable() {  // slowest first
#ifdef __aarch64__
    std::vector<const Kernels*> found{&neon::kernels};
#else
    std::vector<const Kernels*> found{&baseline::kernels};
#endif
#ifdef FASTGPT_X86
    if (has_avx2()) found.push_back(&avx2::kernels);
    if (has_avx512()) found.push_back(&avx512::kernels);
    if (has_avx512_bf16()) found.push_back(&avx512_bf16::kernels);
#endif
    return found;
}
const std::vector<const Kernels*>& runnable() {
    static const std::vector<const Kernels*> found = find_runnable();
    return found;
}

std::atomic<const Kernels*> active{nullptr};
const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

// Floats of a workspace that do on each instruction set: another thread may change the active one before it is used.
template <class F>
int64_t most_floats(F floats) {
    int64_t most = 0;
    for (const Kernels* k : runnable()) most = std::max(most, floats(*k));
    return most;
}

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

// OpenMP's threads do not survive a fork, nor do our own, and a parallel region in the child would wait for them for
// ever.
std::atomic<bool> forked{false};

std::atomic<int> most_threads{1 << 30};
std::atomic<bool> within_affinity{true};

// More threads than processors that they may run on would only wait for each other.
int processors() {
#ifdef __linux__
    cpu_set_t set;
    if (within_affinity.load(std::memory_order_relaxed) && sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
#endif
    return 1 << 30;
}

int usable(int threads) {
    if (forked.load(std::memory_order_relaxed) || threads < 2) return 1;
    return std::min({threads, most_threads.load(std::memory_order_relaxed), processors()});
}

float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

// A struct of kernels.h comes as a flat list of its 64-bit fields, in their order.
using Fields = std::vector<int64_t>;

template <class T>
T record(const Fields& fields) {
    static_assert(sizeof(T) % sizeof(int64_t) == 0 && sizeof(void*) == sizeof(int64_t), "64-bit fields alone");
    T r;
    if (fields.size() * sizeof(int64_t) != sizeof r) throw std::invalid_argument("wrong number of fields");
    std::memcpy(static_cast<void*>(&r), fields.data(), sizeof r);
    return r;
}

void layer_norm(uintptr_t x, uintptr_t branch, uintptr_t weight, uintptr_t bias, uintptr_t total, uintptr_t y,
                uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols, float eps, int64_t seed, double dropout_p,
                int threads) {
    kernels().layer_norm(at(x), at(branch), at(weight), at(bias), at(total), at(y), at(mean), at(rstd), rows, cols, eps,
                         seed, dropout_p, usable(threads));
}

void layer_norm_backward(const Fields& fields, uintptr_t dbranch, int64_t seed, double dropout_p, int threads) {
    kernels().layer_norm_backward(record<NormBackward>(fields), at(dbranch), seed, dropout_p, usable(threads));
}

void bias_gelu(uintptr_t x, uintptr_t bias, uintptr_t y, int64_t rows, int64_t cols, int threads) {
    kernels().bias_gelu(at(x), at(bias), at(y), rows, cols, usable(threads));
}

void bias_gelu_backward(uintptr_t dy, uintptr_t x, uintptr_t bias, uintptr_t dx, uintptr_t dbias, int64_t rows,
                        int64_t cols, int threads) {
    kernels().bias_gelu_backward(at(dy), at(x), at(bias), at(dx), at(dbias), rows, cols, usable(threads));
}

void causal_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t softmax, float scale,
                      const Fields& shape, int64_t seed, double dropout_p, int threads) {
    if (!kernels().causal_attention(at(q), at(k), at(v), at(out), at(softmax), scale, record<AttentionShape>(shape),
                                    seed, dropout_p, usable(threads)))
        throw std::bad_alloc();
}

void causal_attention_backward(const std::array<uintptr_t, 9>& t, float scale, const Fields& shape,
                               const Fields& gradients, int64_t seed, double dropout_p, int threads) {
    if (!kernels().causal_attention_backward(at(t[0]), at(t[1]), at(t[2]), at(t[3]), at(t[4]), at(t[5]), at(t[6]),
                                             at(t[7]), at(t[8]), scale, record<AttentionShape>(shape),
                                             record<AttentionShape>(gradients), seed, dropout_p, usable(threads)))
        throw std::bad_alloc();
}

void dropout(uintptr_t x, int64_t rows, int64_t cols, int64_t seed, double p, int threads) {
    kernels().dropout(at(x), rows, cols, seed, p, usable(threads));
}

void embedding(const Fields& fields, uintptr_t y, int threads) {
    kernels().embedding(record<Embedding>(fields), at(y), usable(threads));
}

void embedding_backward(const Fields& fields, uintptr_t dy, uintptr_t dtok, int64_t vocab, uintptr_t dpos,
                        int64_t context, int threads) {
    kernels().embedding_backward(record<Embedding>(fields), at(dy), at(dtok), vocab, at(dpos), context,
                                 usable(threads));
}

void linear(const Fields& weight, uintptr_t x, uintptr_t y, int64_t rows, uintptr_t workspace, int threads) {
    kernels().linear(record<Linear>(weight), at(x), at(y), rows, at(workspace), usable(threads));
}

void linear_backward(const Fields& weight, uintptr_t dy, uintptr_t x, uintptr_t dx, const Fields& gradient,
                     int64_t rows, uintptr_t workspace, int threads) {
    kernels().linear_backward(record<Linear>(weight), at(dy), at(x), at(dx), record<LinearGradient>(gradient), rows,
                              at(workspace), usable(threads));
}

void linear_cross_entropy(const Fields& weight, uintptr_t x, uintptr_t targets, int64_t ignore, uintptr_t loss,
                          uintptr_t upstream, uintptr_t dx, const Fields& gradient, int64_t rows, uintptr_t workspace,
                          int threads) {
    kernels().linear_cross_entropy(record<Linear>(weight), at(x), reinterpret_cast<const int64_t*>(targets), ignore,
                                   at(loss), at(upstream), at(dx), record<LinearGradient>(gradient), rows,
                                   at(workspace), usable(threads));
}

void block_step(const Fields& step, const Fields& block, float eps, int threads) {
    const BlockStep s = record<BlockStep>(step);
    const Block b = record<Block>(block);
    py::gil_scoped_release unlocked;
    kernels().block_step(s, b, eps, usable(threads));
}

void block_step_backward(const Fields& step, const Fields& block, uintptr_t dy, uintptr_t dx, const Fields& gradients,
                         int threads) {
    const BlockStep s = record<BlockStep>(step);
    const Block b = record<Block>(block);
    const BlockGradients g = record<BlockGradients>(gradients);
    py::gil_scoped_release unlocked;
    kernels().block_step_backward(s, b, at(dy), at(dx), g, usable(threads));
}

constexpr int64_t kPacedRows = 32;

void forward(const Fields& fields, const Fields& blocks, float eps, int threads) {
    const Forward f = record<Forward>(fields);
    if (blocks.size() * sizeof(int64_t) != sizeof(Block) * static_cast<size_t>(f.n_blocks))
        throw std::invalid_argument("forward: wrong number of block fields");
    std::vector<Block> records(static_cast<size_t>(f.n_blocks));
    if (!records.empty())
        std::memcpy(static_cast<void*>(records.data()), blocks.data(), sizeof(Block) * records.size());
    py::gil_scoped_release unlocked;
    const int most = usable(threads);
    const int64_t rows = f.batch * f.tokens;
    if (most < 2 || rows > kPacedRows || records.empty()) return kernels().forward(f, records.data(), eps, most);
    // Of steps of one model's generation by this thread.
    thread_local std::array<Pace, kPacedRows + 1> paces;
    thread_local std::tuple<const void*, const Kernels*, int> of{};
    const Kernels& active_kernels = kernels();
    const std::tuple<const void*, const Kernels*, int> now{records[0].query.weight.at, &active_kernels, most};
    if (of != now) paces = {}, of = now;
    Pace& pace = paces[static_cast<size_t>(rows)];
    const double begin = seconds_now(), waited = seconds_waited();
    active_kernels.forward(f, records.data(), eps, pace.threads(most));
    pace.took(seconds_now() - begin, (seconds_waited() - waited) / (most - 1));
}

// A fresh block costs a page fault for each page that is first written to, so a large one asks for large pages. Only a
// hint, and only for what the allocator maps by itself: it goes with the block.
void ask_for_large_pages(uintptr_t block, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = (block + page - 1) / page * page, end = (block + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    static_cast<void>(block), static_cast<void>(bytes);
#endif
}

int64_t multiply_adds_float32(uintptr_t ends, int64_t pieces, int threads) {
    return kernels().multiply_adds_float32(reinterpret_cast<PieceEnd*>(ends), pieces, seconds_now, usable(threads));
}

void read_float32(uintptr_t block, int64_t size, int64_t piece, uintptr_t ends, int64_t pieces, int threads) {
    kernels().read_float32(at(block), size, piece, reinterpret_cast<PieceEnd*>(ends), pieces, seconds_now,
                           usable(threads));
}

}  // namespace
}  // namespace fastgpt

// No GIL is needed: what threads share here, the active set, `forked` and the limits of threads, is atomic.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    using namespace fastgpt;
    active = runnable().back();
#ifdef FASTGPT_OPENBLAS
    scipy_openblas_set_num_threads(1);  // ours share the blocks
#endif
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
    const auto unlocked = py::call_guard<py::gil_scoped_release>();
    m.def("isas", &isas, "Names of the instruction sets that this machine can run, slowest first.");
    m.def("isa", [] { return kernels().isa; }, "Name of the active instruction set.");
    m.def("set_isa", &set_isa, "Makes an instruction set the active one; ValueError if it cannot run.");
    m.def(
        "limit_threads",
        [](int most, bool affinity) {
            most_threads = most;
            within_affinity = affinity;
        },
        py::arg("most"), py::arg("within_affinity") = true,
        "Calls use no more threads, and no more than the processors that the process may run on.");
    m.def("usable_threads", &usable, "How many of so many threads a call uses.");
#ifdef _OPENMP
    m.def("has_openmp", [] { return true; });
#else
    m.def("has_openmp", &has_openmp, "Whether threads are those of an OpenMP runtime, which torch has loaded.");
#endif
    m.def(
        "blas", []() -> const char* { return kernels().takes_blas() ? FASTGPT_BLAS : nullptr; },
        "Name of the BLAS that makes products of many rows, or None.");
    m.def("ask_for_large_pages", &ask_for_large_pages);
    m.def("norm_partials", [](int64_t rows, int64_t cols) { return kernels().norm_partials(rows, cols); });
    m.def("few_rows", [](bool column_major) { return kernels().few_rows(column_major); });
    m.def("deepest_alike", [] { return kernels().deepest_alike(); });
    m.def("product_scratch",
          [](bool backward) { return most_floats([&](const Kernels& k) { return k.product_scratch(backward); }); });
    m.def("linear_cross_entropy_workspace", [](int64_t rows, int64_t vocab, int threads) {
        return most_floats([&](const Kernels& k) { return k.linear_cross_entropy_workspace(rows, vocab, threads); });
    });
    m.def("block_kept", [](const Fields& step) { return kernels().block_kept(record<BlockStep>(step)); });
    m.def("block_step_workspace", [](const Fields& step, bool backward, int threads) {
        const BlockStep s = record<BlockStep>(step);
        return most_floats([&](const Kernels& k) { return k.block_step_workspace(s, backward, threads); });
    });
    m.def("forward_workspace", [](const Fields& fields, int threads) {
        const Forward f = record<Forward>(fields);
        return most_floats([&](const Kernels& k) { return k.forward_workspace(f, threads); });
    });
    m.def("layer_norm", &layer_norm, unlocked);
    m.def("layer_norm_backward", &layer_norm_backward, unlocked);
    m.def("bias_gelu", &bias_gelu, unlocked);
    m.def("bias_gelu_backward", &bias_gelu_backward, unlocked);
    m.def("causal_attention", &causal_attention, unlocked);
    m.def("causal_attention_backward", &causal_attention_backward, unlocked);
    m.def("dropout", &dropout, unlocked);
    m.def("embedding", &embedding, unlocked);
    m.def("embedding_backward", &embedding_backward, unlocked);
    m.def("linear", &linear, unlocked);
    m.def("linear_backward", &linear_backward, unlocked);
    m.def("linear_cross_entropy", &linear_cross_entropy, unlocked);
    m.def("block_step", &block_step);
    m.def("block_step_backward", &block_step_backward);
    m.def("forward", &forward);
    m.def("multiply_adds_float32", &multiply_adds_float32, unlocked);
    m.def("read_float32", &read_float32, unlocked);
}
