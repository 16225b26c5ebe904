"""The oracle: a plain dense decoder and training loop, torch only, one document at a time, no packing, no groups."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_SNH, theta):
    size, half = x_SNH.shape[0], x_SNH.shape[-1] // 2
    powers = torch.arange(half, dtype=torch.float64) / half
    angles = torch.arange(size, dtype=torch.float64)[:, None] * theta**-powers
    cos, sin = angles.cos().to(x_SNH.dtype)[:, None], angles.sin().to(x_SNH.dtype)[:, None]
    a, b = x_SNH[..., :half], x_SNH[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q_SNH, k_SKH, v_SKH):
    ratio = q_SNH.shape[1] // k_SKH.shape[1]
    k, v = k_SKH.repeat_interleave(ratio, 1), v_SKH.repeat_interleave(ratio, 1)
    scores = torch.einsum("snh,tnh->nst", q_SNH, k) / math.sqrt(q_SNH.shape[-1])
    scores = scores + torch.full((q_SNH.shape[0],) * 2, -torch.inf).triu(1).to(scores.dtype)
    return torch.einsum("nst,tnh->snh", scores.softmax(-1), v)


def document_loss(weights, spec, ids):
    """Sum of next-token losses of one document (1-D ids; the last one is only a label)."""
    x = weights["embedding.weight"][ids[:-1]]
    for number in range(spec.num_layers):
        layer = {k.split(".", 2)[2]: w for k, w in weights.items() if k.startswith(f"layers.{number}.")}
        normed = rms_norm(x, layer["attention_norm.weight"], spec.norm_eps)
        groups = (normed @ layer["qkv.weight"].T).unflatten(-1, (spec.num_kv_heads, -1, spec.head_dim))
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        if spec.qk_norm:
            q = rms_norm(q, layer["query_norm.weight"], spec.norm_eps)
            k = rms_norm(k, layer["key_norm.weight"], spec.norm_eps)
        out = attention(rotate(q, spec.rope_theta), rotate(k, spec.rope_theta), v)
        x = x + out.flatten(1) @ layer["out.weight"].T
        normed = rms_norm(x, layer["mlp_norm.weight"], spec.norm_eps)
        gate_up = normed @ layer["gate_up.weight"].T
        x = x + (functional.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]) @ layer["down.weight"].T
    x = rms_norm(x, weights["norm.weight"], spec.norm_eps)
    head = weights["embedding.weight"] if spec.tied_head else weights["head.weight"]
    return functional.cross_entropy(x @ head[: spec.vocab_size].T, ids[1:], reduction="sum")


def train(initial, spec, steps, optimizer_config, learning_rates):
    """Losses by step and final weights. ``steps``: a list of batches, each a list of 1-D id tensors."""
    weights = {name: weight.clone().requires_grad_() for name, weight in initial.items()}
    decayed = [w for w in weights.values() if w.ndim >= 2]
    plain = [w for w in weights.values() if w.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer_config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(optimizer_config.beta1, optimizer_config.beta2), eps=optimizer_config.eps,
    )
    losses = []
    for batch, lr in zip(steps, learning_rates, strict=True):
        total = sum(document_loss(weights, spec, ids) for ids in batch)
        loss = total / sum(len(ids) - 1 for ids in batch)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), optimizer_config.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        losses.append(loss.item())
    return losses, {name: weight.detach() for name, weight in weights.items()}
