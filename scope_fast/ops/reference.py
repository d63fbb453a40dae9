"""The five ops in plain PyTorch: the truth of the tests, the fallback, the baseline of the bench.

Chunked over rows, so that no (T, V) tensor ever exists. Logits are formed and differentiated in float32 (float64 for
float64 inputs); with `logits_dtype="bfloat16"` the matmuls of bfloat16 inputs run in bfloat16, as a GPU's would.

Every token-level loss is two scalars per row, g for the logprob l and h for the entropy H:
    dloss/dz = g * (onehot(target) - p) - h * p * (log p + H)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from scope_fast.batch import Segment
from scope_fast.ops.options import NUM_SUMS, RowOptions

LOG_RATIO_CLAMP = 20.0  # exp(20) = 5e8: far beyond any clip, and finite in float32
SHAPED_GAMMA = 0.1  # LUFFY's p / (p + gamma)
LOG_P_FLOOR = -1e4  # p is exactly 0 long before, in float64 too; keeps p * log p of an excluded token (-inf) from NaN
CHUNK_BYTES = 64 << 20  # logits of one chunk


class Rows(NamedTuple):
    """The streams of the rows at hand, each (T,); see batch.TokenStreams."""

    target: torch.Tensor
    segment: torch.Tensor
    loss_weight: torch.Tensor
    old_logprob: torch.Tensor | None
    advantage: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    rollout_logprob: torch.Tensor | None
    temperature: torch.Tensor | None

    def take(self, index: torch.Tensor) -> Rows:
        return Rows(*(None if x is None else x.index_select(0, index) for x in self))


class RowTerms(NamedTuple):
    """What a loss asks of each row: its two gradient scalars and its metrics, the first two of them its loss."""

    g: torch.Tensor  # (T,), dloss/dl
    h: torch.Tensor  # (T,), dloss/dH
    metrics: torch.Tensor  # (9, T), options.METRICS by row


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(num_rows: int, vocab_size: int, element_bytes: int, chunk_tokens: int) -> int:
    """Rows per chunk: as asked, or as many as CHUNK_BYTES of logits hold."""
    asked = chunk_tokens if chunk_tokens > 0 else max(1, CHUNK_BYTES // (vocab_size * element_bytes))
    return max(1, min(asked, num_rows))


def active_masks(rows: Rows, o: RowOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows can have a gradient, (RL, NLL): design section 4's active row."""
    weighted = rows.loss_weight != 0
    rl = (rows.segment == Segment.RL) & weighted
    if rows.advantage is not None and not o.kl and not o.entropy_coef:
        rl &= rows.advantage != 0
    return rl, (rows.segment == Segment.NLL) & weighted


def row_temperature(rows: Rows, o: RowOptions, dtype: torch.dtype) -> torch.Tensor:
    """The temperature of each row: the stream's, else the options' on RL rows and 1 on NLL rows; 1 where ignored."""
    one = torch.ones_like(rows.loss_weight, dtype=dtype)
    if rows.temperature is not None:
        return torch.where(rows.segment != Segment.IGNORE, rows.temperature.to(dtype), one)
    return torch.where(rows.segment == Segment.RL, o.temperature, one)


def row_terms(logprob: torch.Tensor, entropy: torch.Tensor, rows: Rows, o: RowOptions) -> RowTerms:
    """Losses, gradient scalars and metrics of each row from its logprob and entropy, all (T,).

    A stream is masked before any arithmetic, so that what it holds where it does not apply never matters.
    """
    rl, nll = active_masks(rows, o)
    zero = torch.zeros_like(logprob)

    def where_rl(x: torch.Tensor | None, otherwise: torch.Tensor = zero) -> torch.Tensor:
        return otherwise if x is None else torch.where(rl, x.to(logprob.dtype), otherwise)

    logp, w = where_rl(logprob), torch.where(rl | nll, rows.loss_weight.to(logprob.dtype), zero)
    h_rl = where_rl(entropy)
    # an RL row without any advantage is an error the caller should see, so it is NaN and not 0
    advantage = where_rl(torch.full_like(zero, torch.nan) if rows.advantage is None else rows.advantage)
    old = where_rl(rows.old_logprob, logp)
    rollout = where_rl(rows.rollout_logprob, logp)

    loss, g, log_ratio, clipped = policy_terms(logp, old, rollout, advantage, w, o, rows.old_logprob is None)
    if o.kl:
        kl, kl_slope = kl_terms(logp, where_rl(rows.ref_logprob), int(o.kl))
        loss, g = loss + w * o.kl_coef * kl, g + w * o.kl_coef * kl_slope
    if o.entropy_coef:  # an entropy that nobody asked for may be anything
        loss = loss - w * o.entropy_coef * h_rl
    loss_rl = torch.where(rl, loss, zero)
    h = torch.where(rl, -w * o.entropy_coef, zero)

    loss_nll, g_nll = nll_terms(torch.where(nll, logprob, zero), torch.where(nll, entropy, zero), w, int(o.nll_shape))
    loss_nll = torch.where(nll, loss_nll, zero)
    g = torch.where(rl, g, torch.where(nll, g_nll, zero))

    ratio = torch.where(rl, log_ratio.exp(), zero)
    gap = zero if rows.rollout_logprob is None else torch.where(rl, (logp - rollout).abs(), zero)
    old_kl = torch.where(rl, ratio - 1 - log_ratio, zero)  # k3 of KL(old || new): the tokens are old's
    sums = (loss_rl, loss_nll, rl.to(logp.dtype), h_rl, old_kl, (clipped & rl).to(logp.dtype), gap)
    return RowTerms(g, h, torch.stack((*sums, ratio, gap)))


def policy_terms(
    logp: torch.Tensor,
    old: torch.Tensor,
    rollout: torch.Tensor,
    advantage: torch.Tensor,
    w: torch.Tensor,
    o: RowOptions,
    on_policy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clipped policy objective of RL rows: (loss, dloss/dl, log ratio, clipped branch taken), all (T,)."""
    # on policy not logp - logp: that is NaN for -inf; but a missing value shows
    difference = torch.where(logp.isnan(), logp, 0.0) if on_policy else logp - old
    log_ratio = difference.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    if o.policy_loss == 0:
        objective, clipped = ratio * advantage, bounded * advantage < ratio * advantage
        objective = torch.where(clipped, bounded * advantage, objective)
        if o.dual_clip:
            floored = (advantage < 0) & (o.dual_clip * advantage > objective)
            objective, clipped = torch.where(floored, o.dual_clip * advantage, objective), clipped | floored
        flows = ~clipped & (difference.abs() <= LOG_RATIO_CLAMP)
        slope = torch.where(flows, ratio * advantage, 0.0)
        slope = torch.where(torch.isnan(objective), objective, slope)  # a missing value shows in the gradient too
    else:
        clipped = bounded != ratio
        objective, slope = bounded * advantage * logp, bounded * advantage
    if o.importance_cap:
        rho = torch.exp(old - rollout).clamp(max=o.importance_cap)
        w = w * rho
    return -w * objective, -w * slope, log_ratio, clipped


def kl_terms(logp: torch.Tensor, ref: torch.Tensor, kl: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row estimate of KL(policy || reference) and its slope in logp (Schulman, "Approximating KL divergence")."""
    difference = logp - ref
    if kl == 1:
        return difference, torch.ones_like(logp)
    if kl == 2:
        return difference.square() / 2, difference
    c = (-difference).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    slope = torch.where(difference.abs() <= LOG_RATIO_CLAMP, 1 - c.exp(), 0.0)
    return c.exp() - c - 1, slope


def nll_terms(
    logp: torch.Tensor, entropy: torch.Tensor, w: torch.Tensor, nll_shape: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted likelihood of NLL rows: (loss, dloss/dl)."""
    if nll_shape == 1:
        p = logp.exp()
        return -w * p / (p + SHAPED_GAMMA), -w * SHAPED_GAMMA * p / (p + SHAPED_GAMMA).square()
    weight = w * torch.exp(-entropy) if nll_shape == 2 else w
    return -weight * logp, -weight


def reduce_metrics(metrics: torch.Tensor) -> torch.Tensor:
    """(9, T) per row -> (9,): sums of the first NUM_SUMS, maxima of the rest (0 over no rows)."""
    if metrics.shape[1] == 0:
        return metrics.new_zeros(metrics.shape[0])
    return torch.cat((metrics[:NUM_SUMS].sum(1), metrics[NUM_SUMS:].amax(1)))


def scope_loss(
    logprob: torch.Tensor, entropy: torch.Tensor | None, rows: Rows, o: RowOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metrics (9,), g (T,), h (T,) from logprob (T,) and entropy (T,); h is (0,) without an entropy."""
    logprob = logprob.to(compute_dtype(logprob.dtype))
    terms = row_terms(logprob, torch.zeros_like(logprob) if entropy is None else entropy.to(logprob.dtype), rows, o)
    metrics = reduce_metrics(terms.metrics)
    return metrics[0] + metrics[1], metrics, terms.g, logprob.new_empty(0) if entropy is None else terms.h


class RowStats(NamedTuple):
    """Softmax statistics of one chunk: the scaled logits' log-softmax (C, V) and what is read from it, (C,)."""

    log_p: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    state: torch.Tensor  # (2, C): max z and log sum exp(z - max z), apart because their sum loses digits of a huge max


class Head:
    """The output layer in the dtype its matmuls run in: logits of a chunk, and the products of its gradient."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, logits_dtype: str) -> None:
        self.accumulate = compute_dtype(weight.dtype)
        keep = weight.dtype == torch.bfloat16 and logits_dtype == "bfloat16"
        self.operand = torch.bfloat16 if keep else self.accumulate
        self.weight = weight.to(self.operand)
        self.bias = None if bias is None else bias.to(self.accumulate)

    def stats(self, hidden: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        """hidden (C, D), target (C,), temperature (C,). An out-of-range target has logprob NaN, never another's."""
        z = (hidden.to(self.operand) @ self.weight.T).to(self.accumulate)
        if self.bias is not None:
            z += self.bias
        z /= temperature.unsqueeze(1)
        top = z.amax(1)
        z -= top.unsqueeze(1)
        log_sum = torch.logsumexp(z, dim=1)
        z -= log_sum.unsqueeze(1)
        inside = (target >= 0) & (target < z.shape[1])
        logprob = z.gather(1, torch.where(inside, target, 0).unsqueeze(1)).squeeze(1)
        logprob = torch.where(inside, logprob, torch.nan)
        z.clamp_(min=LOG_P_FLOOR)
        entropy = -(z.exp() * z).sum(1)
        return RowStats(z, logprob, entropy, top + log_sum, torch.stack((top, log_sum)))

    def dlogits(
        self, stats: RowStats, target: torch.Tensor, temperature: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None
    ) -> torch.Tensor:
        """Gradient in the unscaled logits (C, V) of g * logprob + h * entropy, row by row."""
        slope = -g.unsqueeze(1)
        if h is not None:
            slope = slope - h.unsqueeze(1) * (stats.log_p + stats.entropy.unsqueeze(1))
        dz = stats.log_p.exp().mul_(slope)
        inside = (target >= 0) & (target < dz.shape[1])
        dz.scatter_add_(1, torch.where(inside, target, 0).unsqueeze(1), torch.where(inside, g, 0.0).unsqueeze(1))
        return dz.div_(temperature.unsqueeze(1))


class Gradients:
    """dhidden, dweight, dbias, filled chunk by chunk; one that is not needed is an empty tensor."""

    def __init__(self, hidden: torch.Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head, self.needs = head, needs
        vocab_size, dim = head.weight.shape
        new = {"device": hidden.device, "dtype": head.accumulate}
        self.dhidden = torch.zeros(hidden.shape if needs[0] else (0,), device=hidden.device, dtype=hidden.dtype)
        self.dweight = torch.zeros((vocab_size, dim) if needs[1] else (0,), **new)
        self.dbias = torch.zeros((vocab_size,) if needs[2] else (0,), **new)

    def add(self, hidden: torch.Tensor, dz: torch.Tensor, index: torch.Tensor) -> None:
        """hidden (C, D) and dz (C, V) of the rows `index` (C,), each of which appears once."""
        need_dhidden, need_dweight, need_dbias = self.needs
        if need_dbias:
            self.dbias += dz.sum(0)
        dz = dz.to(self.head.operand)
        if need_dhidden:
            self.dhidden.index_copy_(0, index, (dz @ self.head.weight).to(self.dhidden.dtype))
        if need_dweight and self.head.operand == self.head.accumulate:
            self.dweight.addmm_(dz.T, hidden.to(dz.dtype))
        elif need_dweight:
            self.dweight += dz.T @ hidden.to(dz.dtype)

    def result(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.dhidden, self.dweight.to(dtype), self.dbias.to(dtype)


def linear_scope_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: Rows,
    index: torch.Tensor,
    o: RowOptions,
    logits_dtype: str,
    chunk_tokens: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metrics (9,), dhidden, dweight, dbias over the rows `index` of hidden (T, D): one pass, 6*T*V*D flops."""
    head = Head(weight, bias, logits_dtype)
    gradients = Gradients(hidden, head, needs)
    size = chunk_rows(index.numel(), weight.shape[0], head.accumulate.itemsize, chunk_tokens)
    metrics = []
    for chunk in index.split(size):
        x, part = hidden.index_select(0, chunk), rows.take(chunk)
        temperature = row_temperature(part, o, head.accumulate)
        stats = head.stats(x, part.target, temperature)
        terms = row_terms(stats.logprob, stats.entropy, part, o)
        metrics.append(reduce_metrics(terms.metrics))
        if any(needs):
            h = terms.h if o.entropy_coef else None
            gradients.add(x, head.dlogits(stats, part.target, temperature, terms.g, h), chunk)
    table = torch.stack(metrics, 1)
    totals = reduce_metrics(table)
    return totals[0] + totals[1], totals, *gradients.result(weight.dtype)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor,
    logits_dtype: str,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprob, entropy, logsumexp, each (T,), of softmax((hidden @ weight.T + bias) / temperature); state (2, T)."""
    head = Head(weight, bias, logits_dtype)
    size = chunk_rows(hidden.shape[0], weight.shape[0], head.accumulate.itemsize, chunk_tokens)
    stats = [
        head.stats(*chunk)[1:]
        for chunk in zip(hidden.split(size), target.split(size), temperature.split(size), strict=True)
    ]
    logprob, entropy, logsumexp, state = (torch.cat(parts, -1) for parts in zip(*stats, strict=True))
    return logprob, entropy, logsumexp, state


def linear_logprob_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor,
    logits_dtype: str,
    chunk_tokens: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dhidden, dweight, dbias from the gradients of logprob, entropy and logsumexp; the logits are recomputed."""
    head = Head(weight, bias, logits_dtype)
    gradients = Gradients(hidden, head, needs)
    size = chunk_rows(hidden.shape[0], weight.shape[0], head.accumulate.itemsize, chunk_tokens)
    for index in torch.arange(hidden.shape[0], device=hidden.device).split(size):
        x, scale = hidden[index], temperature[index]
        g, h, k = (grad[index] for grad in grads)
        stats = head.stats(x, target[index], scale)
        dz = head.dlogits(stats, target[index], scale, g, h)
        dz += stats.log_p.exp() * (k / scale).unsqueeze(1)
        gradients.add(x, dz, index)
    return gradients.result(weight.dtype)


def step_scores(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden_weight: torch.Tensor | None,
    hidden_bias: torch.Tensor | None,
    positive: int,
) -> torch.Tensor:
    """Probability (S,) that a step is right, from its boundary's hidden state (S, D), in float32."""
    x = rows.float()
    if hidden_weight is not None:
        x = torch.nn.functional.linear(x, hidden_weight.float(), None if hidden_bias is None else hidden_bias.float())
        x = x.relu()
    z = torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    return z[:, 0].sigmoid() if z.shape[1] == 1 else z.softmax(1)[:, positive].clone()


def step_pools(prob: torch.Tensor, cu_steps: torch.Tensor, tau: float) -> tuple[torch.Tensor, ...]:
    """first_error (R,) int64 and min, mean, prod, last (R,) of prob (S,) over the segments of cu_steps (R+1,)."""
    start, count = cu_steps[:-1], cu_steps.diff()
    num_steps = prob.shape[0]
    if num_steps == 0:
        return torch.zeros_like(start), *(torch.zeros_like(start, dtype=prob.dtype) for _ in range(4))
    step = torch.arange(num_steps, device=prob.device)
    rollout = torch.searchsorted(cu_steps, step, right=True) - 1
    error = torch.where(prob >= tau, num_steps, step)  # NaN >= tau is false: an error
    first = torch.full_like(start, num_steps).scatter_reduce(0, rollout, error, "amin")
    first_error = torch.minimum(first - start, count)

    def pool(reduce: str) -> torch.Tensor:
        pooled = torch.segment_reduce(prob, reduce, offsets=cu_steps, initial=None)
        return torch.where(count > 0, pooled, 0.0)

    last = torch.where(count > 0, prob[(cu_steps[1:] - 1).clamp(min=0)], 0.0)
    return first_error, pool("min"), pool("mean"), pool("prod"), last
