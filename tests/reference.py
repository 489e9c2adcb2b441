"""The decoder and every policy's score once more, in NumPy float64, written from the formulas.

One row, one sequence, no cache, no chunks, no padding: observers are rows after the prompt, and
a LoRA acts on those rows only. Loops where they are clearer. Nothing here uses the package's own
computations; only its configuration and the layout of its parameters.
"""

import dataclasses
from fractions import Fraction

import numpy as np


@dataclasses.dataclass
class Layer:
    """What one layer computed for a sequence of W rows."""

    q_plain: np.ndarray  # [N, W, H] before RoPE
    q: np.ndarray  # [N, W, H]
    k: np.ndarray  # [K, W, H]
    v: np.ndarray  # [K, W, H]
    logits: np.ndarray  # [N, W, W] masked with -inf
    probs: np.ndarray  # [N, W, W]
    sinks: np.ndarray  # [N] -inf without sinks
    residual: np.ndarray  # [W, D] the layer's input


def softmax(x, axis=-1):
    """Softmax along an axis; rows that are -inf throughout come out as zeros."""
    peak = x.max(axis=axis, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(peak), peak, 0.0))
    return e / np.maximum(e.sum(axis=axis, keepdims=True), 1e-300)


def softmax_beside(sink, x):
    """Softmax along the last axis of x and one more logit, of which only x's part is returned."""
    sink = np.broadcast_to(sink, (*x.shape[:-1], 1))
    return softmax(np.concatenate([x, sink], axis=-1))[..., :-1]


def rotation(position, rope, config):
    """The RoPE matrix [H, H] of one position: q -> R q (kind `default`, may be partial)."""
    assert rope.kind in ("default", "none")
    matrix = np.eye(config.head_dim)
    if rope.kind == "none":
        return matrix
    half = rope.dim // 2
    for i in range(half):
        angle = position * rope.theta ** (-2 * i / rope.dim)
        a, b = (2 * i, 2 * i + 1) if config.rope_interleaved else (i, i + half)
        matrix[a, a] = matrix[b, b] = np.cos(angle)
        matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def norm(x, weight, config):
    """RMS norm of vectors [..., D]; of all heads of a token [W, N, H] if the weight is [N, H]."""
    if weight.ndim == 2:
        return norm(x.reshape(len(x), -1), weight.reshape(-1), config).reshape(x.shape)
    weight = weight + 1.0 if config.norm_offset else weight
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight


def activation(x, name):
    """silu, or the tanh form of gelu."""
    if name == "silu":
        return x / (1 + np.exp(-x))
    assert name == "gelu_tanh"
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention_logits(q, k, q_pos, k_pos, config, window):
    """[N, P, H], [K, S, H] -> scaled, capped and masked logits [N, P, S]."""
    group = q.shape[0] // k.shape[0]
    logits = np.stack([q[n] @ k[n // group].T for n in range(q.shape[0])]) * config.attn_scale
    if config.attn_softcap is not None:
        logits = config.attn_softcap * np.tanh(logits / config.attn_softcap)
    distance = q_pos[:, None] - k_pos[None]
    seen = (distance >= 0) & (k_pos >= 0)[None]
    if window is not None:
        seen &= distance < window
    return np.where(seen[None], logits, -np.inf)


def run(
    params, config, tokens, rows=None, lora=None, lora_scale=1.0, kept=None, gone=None,
    lora_rows=None,
):  # fmt: skip
    """Runs `tokens` [T], then the residual rows `rows` [M, D]; -> ([Layer, ...], hidden [W, D]).

    `lora` {name: {"a": [L, in, R], "b": [L, R, out]}} acts on the rows after the prompt, or on the
    first `lora_rows` of them. Of the prompt these see all, or the positions `kept[layer][KV head]`.
    From position `gone[layer][KV head, i]` on nobody sees entry i.
    """
    params = {
        "layers": {name: np.asarray(w, np.float64) for name, w in params["layers"].items()},
        "embed": np.asarray(params["embed"], np.float64),
        "final_norm": np.asarray(params["final_norm"], np.float64),
    }
    x = params["embed"][np.asarray(tokens)] * (config.embed_scale or 1.0)
    prompt = len(x)
    if rows is not None:
        x = np.concatenate([x, np.asarray(rows, np.float64)])
    width, heads, h = len(x), config.num_heads, config.head_dim
    position = np.arange(width)
    records = []
    for index in range(config.num_layers):
        p = {name: w[index] for name, w in params["layers"].items()}
        residual = x

        def linear(name, x, p=p, index=index):
            weight = p[name].reshape(x.shape[-1], -1)
            y = x @ weight
            if lora is not None and name in lora:
                a, b = (np.asarray(lora[name][part][index], np.float64) for part in "ab")
                end = width if lora_rows is None else prompt + lora_rows
                y[prompt:end] += lora_scale * (x[prompt:end] @ a @ b)
            return y + (p[f"{name}_bias"].reshape(-1) if f"{name}_bias" in p else 0.0)

        inner = norm(x, p["attn_norm"], config) if config.pre_norms else x
        q, k, v = (linear(name, inner).reshape(width, -1, h) for name in "qkv")
        if config.qk_norm:
            q, k = norm(q, p["q_norm"], config), norm(k, p["k_norm"], config)
        rope = config.ropes[config.layer_rope[index]]
        turn = np.stack([rotation(i, rope, config) for i in position])
        q_plain, q = q, np.einsum("phi,pni->pnh", turn, q)
        k = np.einsum("phi,pni->pnh", turn, k)
        q_plain, q, k, v = (a.transpose(1, 0, 2) for a in (q_plain, q, k, v))
        logits = attention_logits(q, k, position, position, config, config.layer_window[index])
        group = heads // config.num_kv_heads
        if kept is not None:
            for n in range(heads):
                others = np.setdiff1d(np.arange(prompt), kept[index][n // group])
                logits[n][np.ix_(position >= prompt, others)] = -np.inf
        if gone is not None:
            for n in range(heads):
                until = np.full(width, width)
                until[:prompt] = gone[index][n // group][:prompt]
                logits[n][position[:, None] >= until[None]] = -np.inf
        sinks = p.get("sinks", np.full(heads, -np.inf))
        probs = softmax_beside(sinks[:, None, None], logits)
        out = np.stack([probs[n] @ v[n // group] for n in range(heads)], axis=1)
        out = linear("o", out.reshape(width, -1))
        scale = config.residual_scale or 1.0
        x = x + scale * (norm(out, p["attn_post_norm"], config) if config.post_norms else out)
        inner = norm(x, p["mlp_norm"], config) if config.pre_norms else x
        gated = activation(linear("gate", inner), config.activation) * linear("up", inner)
        out = linear("down", gated)
        x = x + scale * (norm(out, p["mlp_post_norm"], config) if config.post_norms else out)
        records.append(Layer(q_plain, q, k, v, logits, probs, sinks, residual))
    return records, norm(x, params["final_norm"], config)


def next_tokens(params, config, tokens):
    """Log probabilities [T, V] of the token after each of `tokens` [T], and hidden states [T, D].

    For models with tied embeddings and plain logits.
    """
    hidden = run(params, config, tokens)[1]
    scores = hidden @ np.asarray(params["embed"], np.float64).T
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True)), hidden


def pool(scores, kind, kernel):
    """Pools a list of scores: a centred window; zeros (avg) or nothing (max) past the ends."""
    half, n = kernel // 2, len(scores)
    out = np.zeros(n)
    for j in range(n):
        near = scores[max(0, j - half) : j + half + 1]
        out[j] = near.max() if kind == "max" else near.sum() / kernel
    return out


def group_mean(per_query_head, kv_heads):
    """[N, T] -> [K, T]."""
    size = len(per_query_head) // kv_heads
    return np.stack([per_query_head[i * size : (i + 1) * size].mean(0) for i in range(kv_heads)])


def observed(layer, length, observers, scored, kind, kernel, reduce=np.mean, group=np.mean):
    """The observers' rows reduced, pooled, groups reduced; entries from `scored` on get 0."""
    per_head = reduce(layer.probs[:, observers, :scored], axis=1)
    if kind != "none":
        per_head = np.stack([pool(row, kind, kernel) for row in per_head])
    scores = np.zeros((layer.k.shape[0], length))
    scores[:, :scored] = group(per_head.reshape(len(scores), -1, scored), axis=1)
    return scores


def snapkv(layer, length, window, kind, kernel):
    """Mean of A[i, j] over the last `window` queries i, for j before the window."""
    before = length - window
    return observed(layer, length, np.arange(before, length), before, kind, kernel)


def query_filters(queries, kv_heads):
    """Minus the main direction of each query head's rows [N, W, H], group mean: [K, H]."""
    filters = []
    for rows in queries:
        main = np.linalg.svd(rows, full_matrices=False)[2][0]
        filters.append(-main * np.sign(rows.mean(0) @ main))
    return group_mean(np.array(filters), kv_heads)


def redundancy(keys, similar):
    """Softmax of each key's mean cosine to the others; each leaves out the latest alike."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0.0)
    for row in cosine:
        alike = np.flatnonzero(row > similar)
        row[alike[-1:]] = 0.0
    return softmax(cosine.mean(0))


def rkv(layer, length, entries, observers, window, kernel, weight, similar):
    """weight * attention - (1 - weight) * redundancy of the entries of each KV head: [K, length].

    Entries of the last `window` positions get no attention. `entries` [K][n] are positions.
    """
    group = len(layer.probs) // len(entries)
    scores = np.zeros((len(entries), length))
    for head, kept in enumerate(entries):
        before = kept[kept < length - window]
        seen = layer.probs[head * group : (head + 1) * group, observers][..., before].mean(1)
        if len(before):
            scores[head, before] = weight * np.max([pool(row, "max", kernel) for row in seen], 0)
        scores[head, kept] -= (1 - weight) * redundancy(layer.k[head, kept], similar)
    return scores


def best(scores, count, first):
    """The `count` best of the entries from `first` on, ties to the earlier: ascending positions."""
    order = sorted(range(first, len(scores)), key=lambda j: (-scores[j], j))
    return np.sort(np.array(order[:count], int))


def greedy_draft(params, config, tokens, kept, steps, eos=()):
    """Tokens decoded greedily after a prompt of which each layer and head kept some entries."""
    table = np.asarray(params["embed"], np.float64)
    draft = []
    while len(draft) < steps and not (draft and draft[-1] in eos):
        rows = table[np.array(draft, int)] * (config.embed_scale or 1.0)
        _, hidden = run(params, config, tokens, rows, kept=kept)
        draft.append(int(np.argmax(hidden[-1] @ table.T)))
    return draft


def h2o(layer, length):
    """Sum of A[i, j] over all prompt queries i."""
    return group_mean(layer.probs[:, :length, :length].sum(1), layer.k.shape[0])


def tova(layer, length):
    """Mean of A[T-1, j] over all query heads, for every KV head."""
    return np.tile(layer.probs[:, length - 1, :length].mean(0), (layer.k.shape[0], 1))


def keydiff(layer, length):
    """- cos(k_j, mean of k_i / |k_i|)."""
    scores = []
    for keys in layer.k[:, :length]:
        mean = np.mean([k / np.linalg.norm(k) for k in keys], axis=0)
        scores.append([-(k @ mean) / np.linalg.norm(k) / np.linalg.norm(mean) for k in keys])
    return np.array(scores)


def expected_attention(layer, length, config, index, sinks, future, epsilon):
    """softmax_j(a k.mu + a^2 k'S k / 2), group mean, + epsilon, times |v_j|."""
    rope, window = config.ropes[config.layer_rope[index]], config.layer_window[index]
    ahead = range(length, length + future)
    mean_rotation = np.mean([rotation(i, rope, config) for i in ahead], axis=0)
    first = sinks if window is None else max(sinks, length - window + 1)
    group = config.num_heads // config.num_kv_heads
    per_head = np.zeros((config.num_heads, length))
    for n in range(config.num_heads):
        queries = layer.q_plain[n, sinks:length]
        mean = mean_rotation @ queries.mean(0)
        covariance = mean_rotation @ np.cov(queries.T, bias=True) @ mean_rotation.T
        keys, scale = layer.k[n // group, first:length], config.attn_scale
        spread = np.array([k @ covariance @ k for k in keys])
        logits = scale * keys @ mean + scale**2 * spread / 2
        per_head[n, first:] = softmax_beside(layer.sinks[n], logits)
    scores = group_mean(per_head, config.num_kv_heads) + epsilon
    scores *= np.linalg.norm(layer.v[:, :length], axis=-1)
    scores[:, :first] = 0.0
    return scores


def pairs(x, rope, config):
    """Dimensions that RoPE turns together, as complex numbers: [..., H] -> [..., F]."""
    half = rope.dim // 2
    if config.rope_interleaved:
        return x[..., : rope.dim : 2] + 1j * x[..., 1 : rope.dim : 2]
    return x[..., :half] + 1j * x[..., half : rope.dim]


def query_centre(layers, config, index):
    """Mean of queries [N, n, H] before RoPE, and mean norms of their pairs, over some texts."""
    queries = np.concatenate([layer[index].q_plain for layer in layers], axis=1)
    rope = config.ropes[config.layer_rope[index]]
    return queries.mean(1), np.abs(pairs(queries, rope, config)).mean(1)


def triattention(layer, length, config, index, centre, reach):
    """Sums over frequencies f of |q_f| |k_f| cos(w_f d + phase) and (E|q_f| - |q_f|) |k_f|."""
    mean, norms = centre
    rope, group = config.ropes[config.layer_rope[index]], config.num_heads // config.num_kv_heads
    omega = np.array([rope.theta ** (-2 * f / rope.dim) for f in range(rope.dim // 2)])
    q = pairs(mean, rope, config)
    scores = np.zeros((config.num_heads, length))
    for j in range(length):
        for n in range(config.num_heads):
            key = rotation(j, rope, config).T @ layer.k[n // group, j]
            k = pairs(key, rope, config)
            phase, size = np.angle(q[n] * k.conj()), np.abs(q[n]) * np.abs(k)
            waves = [
                (size * np.cos(omega * (length + 2**i - j) + phase)).sum()
                for i in range(int(np.log2(reach)) + 1)
            ]
            scores[n, j] = np.mean(waves) + ((norms[n] - np.abs(q[n])) * np.abs(k)).sum()
            scores[n, j] += mean[n, rope.dim :] @ key[rope.dim :]
    scores = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    return scores.reshape(-1, group, length).max(1)


def largest_remainder(shares, total):
    """Exact fractions -> integers with the given sum; ties go to the lower index."""
    floors = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (floors[i] - shares[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def pyramid(length, budget, window, layers, beta):
    """Entries per layer for one row."""
    if length <= budget:
        return [length] * layers
    low = Fraction((budget - window) // beta)
    high = 2 * (budget - window) - low
    if high > length - window:
        high = Fraction(length - window)
        low = 2 * (budget - window) - high
    if layers == 1:
        return [budget]
    shares = [high + (low - high) * i / (layers - 1) + window for i in range(layers)]
    return largest_remainder(shares, layers * budget)


def ada(ranked, budget, alpha):
    """Entries per head of one layer and row; `ranked` [K, T] has +inf for protected entries."""
    heads, tokens = ranked.shape
    budget = min(budget, tokens)
    best = sorted(
        ((-ranked[i, j], i, j) for i in range(heads) for j in range(tokens)), key=lambda e: e
    )[: heads * budget]
    counts = [sum(1 for _, i, _ in best if i == head) for head in range(heads)]
    alpha = Fraction(str(alpha))
    return largest_remainder([(1 - alpha) * n + alpha * budget for n in counts], heads * budget)
