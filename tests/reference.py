"""Independent references, written from the papers and the checkpoint's key names, sharing no code with the product."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F


class ReferenceUNet:
    """The DDPM UNet evaluated in the dtype of its state dict; finds its own structure from the keys."""

    def __init__(self, state: dict[str, torch.Tensor], ch: int) -> None:
        self.s, self.ch = state, ch

    def has(self, prefix: str) -> bool:
        return any(k.startswith(prefix + ".") for k in self.s)

    def conv(self, name: str, x: torch.Tensor, **kw) -> torch.Tensor:
        return F.conv2d(x, self.s[name + ".weight"], self.s[name + ".bias"], **kw)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.s[name + ".weight"].T + self.s[name + ".bias"]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        g = x.reshape(n, 32, -1)
        mean, var = g.mean(-1, keepdim=True), g.var(-1, unbiased=False, keepdim=True)
        g = ((g - mean) / (var + 1e-6).sqrt()).reshape(n, c, h, w)
        return g * self.s[name + ".weight"].view(1, c, 1, 1) + self.s[name + ".bias"].view(1, c, 1, 1)

    def res(self, name: str, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        act = lambda v: v * torch.sigmoid(v)  # noqa: E731
        h = self.conv(name + ".conv1", act(self.norm(name + ".norm1", x)), padding=1)
        h = h + self.linear(name + ".temb_proj", act(temb))[:, :, None, None]
        h = self.conv(name + ".conv2", act(self.norm(name + ".norm2", h)), padding=1)
        if self.has(name + ".nin_shortcut"):
            x = self.conv(name + ".nin_shortcut", x)
        return x + h

    def attn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        y = self.norm(name + ".norm", x)
        q, k, v = (self.conv(f"{name}.{p}", y).reshape(n, c, h * w) for p in "qkv")
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(c), dim=2)
        y = torch.einsum("ncj,nij->nci", v, weights).reshape(n, c, h, w)
        return x + self.conv(name + ".proj_out", y)

    def __call__(self, x: torch.Tensor, t: int) -> torch.Tensor:
        half = self.ch // 2
        freq = torch.tensor([math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)], dtype=x.dtype)
        emb = torch.cat([torch.sin(t * freq), torch.cos(t * freq)])[None]
        temb = self.linear("temb.dense.0", emb)
        temb = self.linear("temb.dense.1", temb * torch.sigmoid(temb))
        skips = [self.conv("conv_in", x, padding=1)]
        level = 0
        while self.has(f"down.{level}"):
            i = 0
            while self.has(f"down.{level}.block.{i}"):
                h = self.res(f"down.{level}.block.{i}", skips[-1], temb)
                if self.has(f"down.{level}.attn.{i}"):
                    h = self.attn(f"down.{level}.attn.{i}", h)
                skips.append(h)
                i += 1
            if self.has(f"down.{level}.downsample"):
                skips.append(self.conv(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
            level += 1
        h = skips[-1]
        h = self.res("mid.block_2", self.attn("mid.attn_1", self.res("mid.block_1", h, temb)), temb)
        for up in reversed(range(level)):
            i = 0
            while self.has(f"up.{up}.block.{i}"):
                h = self.res(f"up.{up}.block.{i}", torch.cat([h, skips.pop()], 1), temb)
                if self.has(f"up.{up}.attn.{i}"):
                    h = self.attn(f"up.{up}.attn.{i}", h)
                i += 1
            if self.has(f"up.{up}.upsample"):
                h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self.conv(f"up.{up}.upsample.conv", h, padding=1)
        assert not skips
        h = self.norm("norm_out", h)
        return self.conv("conv_out", h * torch.sigmoid(h), padding=1)


def linear_alpha_bar(beta_start: float = 1e-4, beta_end: float = 0.02, total: int = 1000) -> list[float]:
    out, product = [], 1.0
    for i in range(total):
        product *= 1 - (beta_start + (beta_end - beta_start) * i / (total - 1))
        out.append(product)
    return out


def reference_ddim(eps_fn, x: torch.Tensor, sequence: list[int], alpha_bar: list[float]) -> torch.Tensor:
    """DDIM with eta 0 in its predicted-x0 form; `sequence` ascending, as DDIM's code has it."""
    nexts = [-1, *sequence[:-1]]
    for t, after in zip(reversed(sequence), reversed(nexts), strict=True):
        a, b = alpha_bar[t], 1.0 if after < 0 else alpha_bar[after]
        eps = eps_fn(x, t)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(b) * x0 + math.sqrt(1 - b) * eps
    return x


def integer_conv(q: np.ndarray, w: np.ndarray, stride: int, padding: tuple[int, int, int, int]) -> np.ndarray:
    """Exact convolution of int64 arrays, by its definition."""
    top, left, bottom, right = padding
    q = np.pad(q, ((0, 0), (0, 0), (top, bottom), (left, right)))
    k = w.shape[2]
    height, width = (q.shape[2] - k) // stride + 1, (q.shape[3] - k) // stride + 1
    out = np.zeros((q.shape[0], w.shape[0], height, width), np.int64)
    for i in range(k):
        for j in range(k):
            window = q[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            out += np.einsum("nchw,oc->nohw", window, w[:, :, i, j])
    return out
