// The gradients of one transformer block of a training step, from what block_forward kept. What is cheap to compute
// again is: the norms' outputs from the stream, GELU's from its input, the dropouts' masks from their seed.
#pragma once

#include "causal_attention_backward.h"
#include "linear.h"
#include "transformer_block.h"

namespace fastgpt {
namespace FASTGPT_ISA {

struct BlockBackward {
    int64_t hidden;
    const float* dy;
    float* dx;  // or null
    BlockGradients to;
    // Scratch of all threads: [rows, width] each, the last two as wide as said.
    float *h, *dh, *dmiddle, *dbranch;
    float* wide;       // [rows, max(hidden, 3 width)]
    float* act;        // [rows, max(hidden, width)]
    float* partials;   // norm_partials
    float* attention;  // AttentionBackward::shared

    static int64_t scratch(int64_t head_dim) {
        return up(max(product_scratch(true), AttentionBackward::scratch(head_dim)), 16) * 16;
    }
};

inline AttentionBackward attention_of(const BlockRun& r, const float* dcontext, float* dqkv) {
    const int64_t T = r.tokens, D = r.head_dim, W = r.width, row = r.qkv_row, batch = T * row;
    const AttentionShape s{r.batch, r.heads, T, T, D, batch, D, row, batch, D, row, batch, D, row, T * W, D, W};
    const int64_t out = 3 * W, outs = T * out;
    const AttentionShape d{r.batch, r.heads, T, T, D, outs, D, out, outs, D, out, outs, D, out, T * W, D, W};
    return {r.qkv,    r.qkv + W,    r.qkv + 2 * W, r.context, dcontext, r.softmax,       dqkv,
            dqkv + W, dqkv + 2 * W, r.scale(),     s,         d,        r.drop_attention};
}

inline void block_backward(Team& team, const BlockRun& r, const Block& b, const BlockBackward& back) {
    const int64_t M = r.rows(), D = r.width, F = back.hidden;
    const BlockGradients& to = back.to;
    const bool through_qkv = back.dx || to.scale1 || to.query.any() || to.key.any() || to.value.any();
    const bool through_attention = through_qkv || to.out_proj.any();
    const bool through_middle = through_attention || to.scale2 || to.up.any();
    const auto norm_again = [&](const float* x, const float* mean, const float* rstd, const Numbers& scale,
                                const Numbers& shift) {
        team.share_rows(M, [&](int64_t i) { normalise(x + i * D, mean[i], rstd[i], scale, shift, back.h + i * D, D); });
    };
    const auto dropped = [&](const Dropout& drop, const float* d) {
        if (!drop.on()) return d;
        team.share_rows(M, [&](int64_t i) { drop.row(i, d + i * D, nullptr, back.dbranch + i * D, D); });
        return static_cast<const float*>(back.dbranch);
    };

    const auto gradient = [&](const Linear& w, const float* d, int64_t d_row, float* dx, int64_t dx_row) {
        Product p = input_gradient(w, d, d_row, M, dx, dx_row);
        p.narrow_sums = r.narrow_sums;
        return p;
    };

    const float* dy = dropped(r.drop_shortcut2, back.dy);
    Product through_gelu = gradient(b.down, dy, D, back.wide, F);
    through_gelu.epilogue = kGeluBackward, through_gelu.pre = r.pre, through_gelu.act = back.act;
    share(team, through_gelu);
    norm_again(r.middle, r.mean2, r.rstd2, b.scale2, b.shift2);
    share_parameter_gradients(team, to.down, dy, D, D, back.act, F, F, M, r.narrow_sums);
    if (!through_middle) return;
    share_parameter_gradients(team, to.up, back.wide, F, F, back.h, D, D, M, r.narrow_sums);
    if (!through_attention && !to.scale2) return;
    share(team, gradient(b.up, back.wide, F, back.dh, D));
    team.barrier();
    norm_backward(team, {back.dh, r.middle, b.scale2, r.mean2, r.rstd2, back.dy, back.dmiddle, to.scale2, to.shift2,
                         back.partials, M, D});
    if (!through_attention) return;

    const float* dmiddle = dropped(r.drop_shortcut1, back.dmiddle);
    share_parameter_gradients(team, to.out_proj, dmiddle, D, D, r.context, D, D, M, r.narrow_sums);
    if (!through_qkv) return;
    share(team, gradient(b.out_proj, dmiddle, D, back.act, D));
    norm_again(r.x, r.mean1, r.rstd1, b.scale1, b.shift1);
    attention_backward(team, attention_of(r, back.act, back.wide), back.attention);
    const Linear* projections[] = {&b.query, &b.key, &b.value};
    const LinearGradient* gradients[] = {&to.query, &to.key, &to.value};
    for (int64_t i = 0; i < 3; ++i)
        share_parameter_gradients(team, *gradients[i], back.wide + i * D, 3 * D, D, back.h, D, D, M, r.narrow_sums);
    if (!back.dx && !to.scale1) return;
    for (int64_t i = 0; i < 3; ++i) {
        Product p = gradient(*projections[i], back.wide + i * D, 3 * D, back.dh, D);
        if (i > 0) add_to_result(p);
        share(team, p);
        team.barrier();
    }
    norm_backward(team, {back.dh, r.x, b.scale1, r.mean1, r.rstd1, back.dmiddle, back.dx, to.scale1, to.shift1,
                         back.partials, M, D});
}

// What is kept for backward, one after the other: of the softmax, [batch, heads, tokens, 2]; the stream after
// the attention, [rows, width]; query, key and value, [rows, 3 width]; the heads' outputs, [rows, width]; the
// feed-forward's middle before its GELU, [rows, hidden]; the norms' means and deviations, [4, rows].
inline int64_t block_kept(const BlockStep& s) {
    return s.batch * s.tokens * (2 * s.heads + 5 * s.width + s.hidden + 4);
}

// One block of a training step: addresses and sizes have been checked by fastgpt/cpu/transformer_block.py.
inline BlockRun run_of(const BlockStep& s) {
    BlockRun r{};
    r.batch = s.batch, r.tokens = s.tokens, r.width = s.width, r.heads = s.heads, r.head_dim = s.head_dim;
    const int64_t M = r.rows(), D = s.width;
    r.x = s.x, r.y = s.y, r.qkv_row = 3 * D, r.act_row = s.hidden;
    r.softmax = s.kept;
    r.middle = s.kept + 2 * M * s.heads, r.qkv = r.middle + M * D, r.context = r.qkv + M * 3 * D,
    r.pre = r.context + M * D;
    r.mean1 = r.pre + M * s.hidden, r.rstd1 = r.mean1 + M, r.mean2 = r.rstd1 + M, r.rstd2 = r.mean2 + M;
    r.narrow_sums = s.narrow_sums;
    r.drop_attention = {s.attention_seed, s.attention_p, s.tokens};
    r.drop_shortcut1 = {s.shortcut1_seed, s.shortcut_p, D};
    r.drop_shortcut2 = {s.shortcut2_seed, s.shortcut_p, D};
    return r;
}

inline int64_t block_step_workspace(const BlockStep& s, bool backward, int threads) {
    const int64_t M = s.batch * s.tokens, D = s.width;
    if (!backward) return M * (D + s.hidden) + threads * BlockRun::scratch(s.tokens, s.head_dim) + 32;
    AttentionBackward a{};
    a.s.batch = s.batch, a.s.heads = s.heads, a.s.queries = a.s.keys = s.tokens, a.s.head_dim = s.head_dim;
    return M * (4 * D + max(s.hidden, 3 * D) + max(s.hidden, D)) + norm_partials(M, D) + a.shared() +
           threads * BlockBackward::scratch(s.head_dim) + 64;
}

inline void block_step(const BlockStep& s, const Block& b, float eps, int threads) {
    BlockRun r = run_of(s);
    r.h = aligned(s.workspace), r.act = r.h + r.rows() * s.width;
    float* scratches = aligned(r.act + r.rows() * s.hidden);
    const int64_t scratch = BlockRun::scratch(s.tokens, s.head_dim);
    in_team(threads, scratches, scratch, [&](Team& team) { block_forward(team, r, b, eps); });
}

inline void block_step_backward(const BlockStep& s, const Block& b, const float* dy, float* dx,
                                const BlockGradients& to, int threads) {
    const BlockRun r = run_of(s);
    const int64_t M = r.rows(), D = s.width;
    BlockBackward back{};
    back.hidden = s.hidden, back.dy = dy, back.dx = dx, back.to = to;
    back.h = aligned(s.workspace), back.dh = back.h + M * D, back.dmiddle = back.dh + M * D;
    back.dbranch = back.dmiddle + M * D, back.wide = back.dbranch + M * D;
    back.act = back.wide + M * max(s.hidden, 3 * D), back.partials = back.act + M * max(s.hidden, D);
    back.attention = back.partials + norm_partials(M, D);
    AttentionBackward shape{};
    shape.s = attention_of(r, nullptr, nullptr).s;
    float* scratches = aligned(back.attention + shape.shared());
    const int64_t scratch = BlockBackward::scratch(s.head_dim);
    in_team(threads, scratches, scratch, [&](Team& team) { block_backward(team, r, b, back); });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
