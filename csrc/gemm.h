// The engine of every linear layer's products: y = act(x W^T + bias) + residual, summed in float32, from the live
// weight.
//
// Three ways to do it, chosen by the number of rows and by how W lies: dots (gemm_dots.h), stream (gemm_stream.h) and
// tiles (gemm_tiles.h), which a BLAS replaces in builds that have one (gemm_blas.h). W may be narrower than float32
// (numbers.h): it is widened in registers where rows are few, and while it is packed where they are many. Processors
// with dot products of narrow numbers (arithmetic.h) multiply bfloat16 pairs where a weight is no wider than that, or
// where the caller allows it, and int8 where activations are taken to it too.
//
// The same serves backward: the gradient of x is a product with W read the other way round, that of W a product of two
// activations of which the first is read the other way round too, which only tiles can do.
//
// The order of the sums depends on m, n, k and the layouts, never on what other rows hold, on the threads or on the
// tails, so results repeat bit for bit. Nothing is read or written past the end of a row. k is at least 1.
#pragma once

#include "gemm_blas.h"
#include "gemm_dots.h"
#include "gemm_stream.h"
#include "gemm_tiles.h"
#include "parallel.h"

namespace fastgpt {
namespace FASTGPT_ISA {

enum Way { kDots, kTiles, kStream };

inline int64_t few_rows(bool column_major) { return column_major ? kMaxStreamM : kMaxDotM; }

// Four-bit weights are widened anew for each few rows.
inline int64_t most_dots(int64_t format) { return format == kInt4 ? min(kMaxDotM, kMaxInt4DotM) : kMaxDotM; }

// The deepest row-major weight whose rows can be alike: a single row of x must have room in the scratch.
inline int64_t deepest_alike() { return kPreparedX; }

inline Way way_for(const Product& p) {
    if (p.x.col != 1) return kTiles;
    if (p.w.alike && (p.w.col != 1 || p.k <= deepest_alike())) return p.w.col == 1 ? kDots : kStream;
    if (p.w.col == 1) return p.m <= most_dots(p.w.format) && p.m * unit_row(p.k) <= kPreparedX ? kDots : kTiles;
    return p.m <= kMaxStreamM ? kStream : kTiles;
}

inline bool in_blas_blocks(const Product& p) { return way_for(p) == kTiles && by_blas(p); }

// How many rows are taken together where all rows are to be alike.
inline int64_t rows_alike(const Product& p) {
    if (p.w.col != 1) return kMaxStreamM;
    const int64_t rows = min(min(p.m, most_dots(p.w.format)), max(1, kPreparedX / unit_row(p.k)));
    return p.w.format == kInt4 && rows <= 2 ? 1 : rows;
}

// The sum of neighbours in a prepared row of bfloat16.
inline float group_sum(const float* row, int64_t k, int64_t n) {
    const BFloat16* x = reinterpret_cast<const BFloat16*>(row) + k;
    Vec total = zero();
    for_each_vec(n, [&](int64_t j, int64_t c) { total = total + load(x + j, c); });
    return sum(total);
}

// Few rows of x as the dots read them, made anew where they are no longer float32 as they stand.
template <class A, class T>
static void dots_by_arithmetic(const Product& p, const ProductScratch& scratch, bool again) {
    const bool dynamic = p.w.format == kInt8Dynamic;
    if (A::in_unit == 1 && !dynamic) return dots<A, T>(p, p.x.at, p.x.row, nullptr, scratch.sums);
    const int64_t units = unit_row(units_of<A>(p.k)), groups = by_groups<A, T>(p.m) && !p.w.alike ? p.k / p.w.group : 0;
    const int64_t x_row = units + unit_row(groups);
    for (int64_t i = 0; i < p.m && !again; i++) {
        const float* x = p.x.at + i * p.x.row;
        float* to = scratch.x + i * x_row;
        const float scale = dynamic ? row_scale(x, p.k) : 1.0f;
        scratch.scales[i] = {scale, prepare_row<A>(x, p.k, scale, to)};
        for (int64_t g = 0; g < groups; g++) to[units + g] = group_sum(to, g * p.w.group, p.w.group);
    }
    dots<A, T>(p, scratch.x, x_row, dynamic ? scratch.scales : nullptr, scratch.sums);
}

template <class T>
static void by_arithmetic(const Product& p, Way way, const ProductScratch& scratch, bool again) {
    if constexpr (!quantised<T>) {
        if (way == kStream) return stream<T>(p, scratch.packed);
    }
    if constexpr (same<T, float>) {
#ifdef FASTGPT_NARROW_DOTS
        if (p.x.col != 1 && p.narrow_sums) return tiles<Pairs, T, Rows::kTurned>(p, scratch);
#endif
        if (p.x.col != 1) return tiles<Single, T, Rows::kTurned>(p, scratch);
    }
#ifdef FASTGPT_NARROW_DOTS
    if constexpr (same<T, int8_t>) {
        if (p.w.format == kInt8Dynamic)
            return way == kDots ? dots_by_arithmetic<Quads, T>(p, scratch, again)
                                : tiles<Quads, T, Rows::kPrepared>(p, scratch);
    }
    constexpr bool no_wider = quantised<T> || same<T, BFloat16>;
    if constexpr (no_wider) {
        if (way == kDots) return dots_by_arithmetic<Pairs, T>(p, scratch, again);
    }
    if constexpr (no_wider || same<T, float>) {
        if (way == kTiles && (no_wider || p.narrow_sums)) return tiles<Pairs, T, Rows::kPrepared>(p, scratch);
    }
#endif
    if (way == kDots)
        dots_by_arithmetic<Single, T>(p, scratch, again);
    else if (p.w.format == kInt8Dynamic)
        tiles<Single, T, Rows::kPrepared>(p, scratch);
    else
        tiles<Single, T, Rows::kInPlace>(p, scratch);
}

// A product in parts: of its rows and of its columns.
struct Parts {
    int64_t m, n;
};

constexpr double kPieceWork = 1 << 17;  // multiplications of a piece, at least, if a thread gets several
constexpr int64_t kStreamPiece = 512;   // columns likewise: shorter rows of W are read more slowly

// As many as a thread should have pieces, up to four, so that uneven threads finish together; as long as what each
// piece does anew (packing W, rearranging x) makes the whole at most 3 % slower.
inline Parts parts_of(const Product& p, int64_t threads) {
    if (in_blas_blocks(p)) return {up(p.m, kBlasM), up(p.n, kBlasN)};
    if (threads == 1) return {1, 1};
    const Way way = way_for(p);
    // Of few rows the time is that of reading W: a number of one byte counts as a quarter of a row in float32.
    const bool many = way == kTiles || (p.w.alike && p.m > rows_alike(p));
    const double rows_of_x = many ? static_cast<double>(p.m) : static_cast<double>(bytes(p.w.format, 4)) / 16;
    const double work = rows_of_x * static_cast<double>(p.n) * static_cast<double>(p.k);
    const int64_t panels = up(p.n, kPanel), tiles_m = way == kTiles ? up(p.m, kTileRows) : 1;
    // What a piece does anew, in tiles: for each panel to pack it, for each row of tiles to rearrange its rows of x.
    const bool turned = p.x.col != 1, rounded = p.narrow_sums || p.w.format != kFloat32;
    const int64_t packing = rounded ? 2 : 1;
    const double rearranging = turned ? 1.0 : rounded ? 0.2 : 0.0;
    Parts best{1, min(threads, panels)};
    double cheapest = 0;
    for (int64_t each = 1; each <= Team::kPieces; each *= 2) {
        const int64_t pieces = threads * each;
        if (each > 1 && work < kPieceWork * static_cast<double>(pieces)) break;
        if (each > 1 && way == kStream && p.n < kStreamPiece * pieces) break;
        Parts found{1, min(pieces, panels)};  // none empty, so that each prepares x or finds it prepared
        double least = -1;
        for (int64_t m = 1; way == kTiles && m <= pieces; m++) {
            if (pieces % m != 0) continue;
            const int64_t rows = up(tiles_m, m), cols = up(panels, pieces / m);
            const double tiles = static_cast<double>(cols * (rows + packing)) + static_cast<double>(rows) * rearranging;
            const double cost = static_cast<double>(each) * tiles;
            if (least < 0 || cost < least) least = cost, found = {m, pieces / m};
        }
        if (each == 1) cheapest = least;
        if (least <= 1.03 * cheapest) best = found;
    }
    return best;
}

// The product of some of its rows and columns.
inline Product part_of(Product p, int64_t m0, int64_t m, int64_t n0, int64_t n) {
    p.following += p.n - n0 - n;
    p.m = m, p.n = n;
    p.x.at += m0 * p.x.row;
    p.w = rows_from(p.w, n0);
    p.y = moved(p.y, bytes(p.y_format, m0 * p.y_row + n0));
    if (p.pre) p.pre += m0 * p.y_row + n0;
    if (p.act) p.act += m0 * p.y_row + n0;
    p.bias = from(p.bias, n0);
    if (p.residual) p.residual += m0 * p.residual_row + n0;
    return p;
}

// One piece of a product, into its own columns and rows of y: nothing is shared, so there is no barrier inside, and the
// bits do not depend on the parts. The workspace, product_scratch floats, belongs to the calling thread; again: what it
// prepared for the product's last piece is still there.
[[maybe_unused]] static void run_product(const Product& whole, const Parts& parts, int64_t piece, float* workspace,
                                         bool again) {
    const int64_t pm = piece / parts.n, pn = piece % parts.n;
    if (in_blas_blocks(whole)) return run_blas_block(whole, pm, pn, ProductScratch(workspace));
    const Way way = way_for(whole);
    const int64_t panels = up(whole.n, kPanel);
    const int64_t n0 = panels * pn / parts.n * kPanel, n1 = min(panels * (pn + 1) / parts.n * kPanel, whole.n);
    const int64_t tiles_m = up(whole.m, kTileRows);
    const int64_t m0 = tiles_m * pm / parts.m * kTileRows, m1 = min(tiles_m * (pm + 1) / parts.m * kTileRows, whole.m);
    if (n0 >= n1 || m0 >= m1) return;
    const Product p = part_of(whole, m0, m1 - m0, n0, n1 - n0);
    const int64_t parts_m = way == kTiles || !p.w.alike ? 1 : up(p.m, rows_alike(p));
    const int64_t cols = parts_m > 1 ? kAlikeCols : p.n;  // of W that stay in the cache for the next rows
    for (int64_t n = 0; n < p.n; n += cols)
        for (int64_t i = 0; i < parts_m; i++) {
            const int64_t first = p.m * i / parts_m, rows = p.m * (i + 1) / parts_m - first;
            const Product part = part_of(p, first, rows, n, min(cols, p.n - n));
            with_rows(p.w, [&](auto type) {
                by_arithmetic<decltype(type)>(part, way, ProductScratch(workspace), again && parts_m == 1);
            });
        }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
