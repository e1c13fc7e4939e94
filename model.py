"""The networks: JiT for pixels, LightningDiT (DiT) for latents, and the VA-VAE between the two.

    python model.py                                         # name, params, Gflops of every size
    net = model.build("JiT-B/16", image_size=256, num_classes=1000)
    u = net(z, t, y)                                        # (N, C, H, W), (N,), (N,) -> (N, C, H, W)

Time t runs in [0, 1]; class num_classes is the null class. State-dict keys are those of the published files,
so their weights load strictly. JiT: arXiv 2511.13720; LightningDiT and VA-VAE: arXiv 2501.01423.
"""
# N batch, C channels, H height, W width; p side of a patch, T tokens, D width of a token, h = D / heads
import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ---- The transformers --------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, always in float32; where given, * (1 + scale) + shift."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, shift=None, scale=None):
        if shift is None:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-6)
        x = F.rms_norm(x.float(), self.weight.shape, eps=1e-6)
        return torch.addcmul(shift, x, self.weight * (1 + scale.float()))

def rotate(x, rope):
    """Turn neighbouring channels of x (N, T, heads, h): (a, b) -> (a cos - b sin, b cos + a sin)."""
    x = x.unflatten(-1, (-1, 2))                                   # (N, T, heads, h / 2, 2)
    return torch.addcmul(x * rope[0], x.flip(-1), rope[1]).flatten(-2)

class Attention(nn.Module):
    """Softmax attention with rotary positions and, where asked, normalised queries and keys."""

    def __init__(self, dim, heads, qk_norm, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)   # each (N, T, heads, h)
        q, k = (rotate(a, rope).to(v.dtype) for a in (self.q_norm(q), self.k_norm(k)))
        x = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))         # (N, T, D)

class SwiGLU(nn.Module):
    """The gated MLP: w3(silu(w1 x) * w2 x), where w12 holds the rows of w1, then of w2."""

    def __init__(self, dim, dropout):
        super().__init__()
        hidden = 4 * dim * 2 // 3      # as many weights as a plain MLP of width 4 D
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x):
        w, b = self.w12.weight, self.w12.bias
        if torch.compiler.is_compiling():
            # the bias image by image: its gradient is then summed in the pass that computes the product's
            x = F.linear(x, w)                                     # (N, T, 2 hidden)
            gate, x = (x + b.to(x.dtype).expand(len(x), 1, -1)).chunk(2, dim=-1)
        else:
            # two products, or else the gradients of the halves would be copied together
            gate, x = (F.linear(x, *half) for half in zip(w.chunk(2), b.chunk(2)))
        return self.w3(self.dropout(F.silu(gate) * x))             # (N, T, D)

class Block(nn.Module):
    """Attention and MLP, each modulated by the condition (adaLN) and added to the stream through a gate.
    The first `drop` tokens leave the stream after attention: others have read them, and nobody will again."""

    def __init__(self, dim, heads, qk_norm, dropout=0.0):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads, qk_norm, dropout)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, condition, rope, drop=0):
        m = self.adaLN_modulation(condition)[:, None]              # (N, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(self.norm1(x, shift1, scale1), rope))[:, drop:]
        return torch.addcmul(x, gate2, self.mlp(self.norm2(x, shift2, scale2)))

def named(**modules):
    """A Sequential whose parts have these names, as the published keys do."""
    return nn.Sequential(OrderedDict(modules))

class FinalLayer(nn.Module):
    """The stream, normalised and modulated once more, to the values of a patch: (N, T, p p C)."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))

class Transformer(nn.Module):
    """What JiT and DiT share: everything but x_embedder, which makes a token of each patch.
    forward: x (N, C, H, W), t (N,) in [0, 1], y (N,) int64 -> (N, C, H, W). With `checkpointing` set, the
    backward pass computes each block's activations again. ValueError where a size does not fit."""

    def __init__(self, *, image_size, patch_size, in_channels, dim, depth, heads, num_classes, qk_norm=False,
                 dropout=0.0, context_tokens=0, context_start=0):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: "
                             f"try {-(-image_size // patch_size) * patch_size}")
        if context_tokens and context_start >= depth:
            raise ValueError(f"context_start {context_start} lies behind the last block: try {depth - 1}")
        self.patch_size, self.side, self.checkpointing = patch_size, image_size // patch_size, False
        self.in_channels = in_channels
        self.context_start = context_start if context_tokens else None
        if context_tokens:
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, context_tokens, dim))
        self.register_buffer("pos_embed", sincos_positions(self.side, dim))
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        cos, sin = rotary_positions(self.side, dim // heads, context_tokens)
        rope = torch.stack([cos, sin * torch.tensor([-1.0, 1.0]).repeat(dim // heads // 2)])
        self.register_buffer("rope", rope[:, :, None].unflatten(-1, (-1, 2)), persistent=False)
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(
            Block(dim, heads, qk_norm, dropout if i in middle else 0.0) for i in range(depth))
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)

    def forward(self, x, t, y):
        p, s, T = self.patch_size, self.side, self.side ** 2
        y = self.y_embedder.embedding_table(y)                     # (N, D)
        condition = self.t_embedder(t) + y
        x = F.pixel_unshuffle(x, p).flatten(2).mT                  # (N, T, C p p)
        for conv in self.x_embedder:                               # on patches that is a matrix product
            x = F.linear(x, conv.weight.flatten(1), conv.bias)
        x = x + self.pos_embed                                     # (N, T, D)
        rope = self.rope[:, -T:]                                   # (2, T, 1, h / 2, 2)
        for i, block in enumerate(self.blocks):
            if i == self.context_start:                            # class tokens in front, unturned
                x = torch.cat([y[:, None] + self.in_context_posemb.squeeze(0), x], dim=1)
                rope = self.rope
            inputs = x, condition, rope, x.shape[1] - T if block is self.blocks[-1] else 0
            x = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)
        x = self.final_layer(x, condition)                         # (N, T, p p C)
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (s, s))        # (N, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def initialize(self):
        """Every block starts as the identity and the network's output as 0 (adaLN-zero)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.t_embedder.mlp[0], self.t_embedder.mlp[2], self.y_embedder.embedding_table):
            nn.init.normal_(module.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def compile(self, **how):
        """Compile each block in place: keys stay, one graph serves all, gradients leave block by block."""
        torch._dynamo.config.recompile_limit = 64        # every number of tokens and images is a graph
        torch._dynamo.config.optimize_ddp = False        # it would cut the blocks once more
        for part in (*self.blocks, self.final_layer):
            part.compile(**how)

class JiT(Transformer):
    """Just image Transformer: large patches of pixels through a bottleneck, q and k normalised, class tokens
    in front from block `context_start` on; `dropout` acts in the middle half of the blocks."""

    def __init__(self, *, patch_size, in_channels=3, dim, bottleneck, **config):
        super().__init__(patch_size=patch_size, in_channels=in_channels, dim=dim, qk_norm=True, **config)
        self.x_embedder = named(
            proj1=nn.Conv2d(in_channels, bottleneck, patch_size, patch_size, bias=False),
            proj2=nn.Conv2d(bottleneck, dim, 1))
        self.initialize()

class DiT(Transformer):
    """LightningDiT: image_size is the side of the latent."""

    def __init__(self, *, patch_size, in_channels, dim, heads, **config):
        super().__init__(patch_size=patch_size, in_channels=in_channels, dim=dim, heads=heads, **config)
        self.x_embedder = named(proj=nn.Conv2d(in_channels, dim, patch_size, patch_size))
        self.feat_rope = nn.Module()         # for the published files: checked when one is read, never used
        for name, table in zip(("freqs_cos", "freqs_sin"), rotary_positions(self.side, dim // heads)):
            self.feat_rope.register_buffer(name, table)
        self.initialize()

# Columns: D, depth, heads; JiT alone: bottleneck, in-context tokens and the block they enter before
SIZES = {
    "JiT-B":             ( 768, 12, 12, 128, 32,  4),
    "JiT-L":             (1024, 24, 16, 128, 32,  8),
    "JiT-H":             (1280, 32, 16, 256, 32, 10),
    "JiT-S":             ( 384, 12,  6, 128, 16,  4),
    "JiT-demo":          (  96,  4,  3,  64,  4,  1),
    "JiT-narrow":        (  48,  4,  3,  64,  4,  1),
    "JiT-wide":          ( 192,  4,  6,  64,  4,  1),
    "LightningDiT-B":    ( 768, 12, 12),
    "LightningDiT-L":    (1024, 24, 16),
    "LightningDiT-XL":   (1152, 28, 16),
    "LightningDiT-S":    ( 384, 12,  6),
    "LightningDiT-demo": (  96,  4,  3),
}
COLUMNS = "dim", "depth", "heads", "bottleneck", "context_tokens", "context_start"
# The published sizes and the demos; NAME/PATCH is any other patch too
NAMES = ("JiT-B/16 JiT-B/32 JiT-L/16 JiT-L/32 JiT-H/16 JiT-H/32 JiT-demo/8 LightningDiT-B/1 LightningDiT-B/2 "
         "LightningDiT-L/1 LightningDiT-L/2 LightningDiT-XL/1 LightningDiT-XL/2 LightningDiT-demo/1").split()

def build(name, image_size, num_classes, in_channels=None, **overrides):
    """Network NAME/PATCH; image_size in pixels for JiT, in latents for the others. ValueError if unknown."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"unknown model {name}: choose from {', '.join(NAMES)}, "
                         f"or NAME/PATCH with {', '.join(SIZES)} and any patch")
    network, channels = (JiT, 3) if name.startswith("JiT") else (DiT, 32)
    config = dict(zip(COLUMNS, SIZES[size]), patch_size=int(patch))
    return network(image_size=image_size, num_classes=num_classes, in_channels=in_channels or channels,
                   **config | overrides)

# ---- Time and positions ------------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """t (N,) in [0, 1] -> (N, D), in float64, which neither autocast nor TF32 makes less: in bfloat16 nearby
    times would be one."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * 128, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        exact = torch.float32 if t.device.type == "mps" else torch.float64       # which Apple's GPUs lack
        w1, b1, w2, b2 = (p.to(exact) for p in self.mlp.parameters())
        i = torch.arange(128, device=t.device, dtype=exact)
        a = t.to(exact)[:, None] * torch.exp(-math.log(10000) * i / 128)
        x = F.linear(torch.cat([a.cos(), a.sin()], dim=1), w1, b1)
        return F.linear(F.silu(x), w2, b2).float()

def angles(side, n):
    """Row and column of each token, read row by row, at n frequencies from 1 down to 1/10000: two (T, n)."""
    i, place = torch.arange(n, dtype=torch.float64), torch.arange(side, dtype=torch.float64)
    a = place[:, None] * 10000.0 ** (-i / n)                       # (side, n)
    return a.repeat_interleave(side, dim=0), a.repeat(side, 1)

def sincos_positions(side, dim):
    """The fixed table (1, T, D) added to the tokens: first half of D the column, second half the row."""
    row, column = angles(side, dim // 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]

def rotary_positions(side, dim, prefix=0):
    """cos and sin (prefix + T, h) of 2-D RoPE, the first `prefix` of angle 0: the first half of a head turns
    by the row, the second by the column."""
    a = torch.cat(angles(side, dim // 4), dim=1).repeat_interleave(2, dim=1)
    a = F.pad(a, (0, 0, prefix, 0))
    return a.cos().float(), a.sin().float()

# ---- VA-VAE f16d32, a KL autoencoder of the latent-diffusion family ----------------------------------------

def conv(width_in, width, size=3):
    """A convolution that keeps the image's size."""
    return nn.Conv2d(width_in, width, size, padding=size // 2)

def norm(width):
    """GroupNorm as the latent-diffusion family has it."""
    return nn.GroupNorm(32, width, eps=1e-6)

class ResidualBlock(nn.Module):
    """Twice GroupNorm, swish, convolution; a 1x1 shortcut where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), conv(width_in, width)
        self.norm2, self.conv2 = norm(width), conv(width, width)
        self.nin_shortcut = conv(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))

class SpatialAttention(nn.Module):
    """One head over all positions of a feature map."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (conv(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))   # (N, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y[:, 0].mT.unflatten(2, x.shape[2:]))

class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where asked, then the way to the next."""

    def __init__(self, width_in, width, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(width) if attention else nn.Identity() for _ in self.block)
        self.downsample, self.upsample = nn.Identity(), nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))

class Autoencoder(nn.Module):
    """VA-VAE f16d32: images (N, 3, H, W) in [-1, 1], multiples of 16 <-> latents (N, 32, H/16, W/16)."""

    def __init__(self, widths=(128, 128, 256, 256, 512), latent=32):
        super().__init__()
        first, last, n = widths[0], widths[-1], len(widths) - 1
        down, up = {}, {}                                          # in both, level 0 is full resolution
        for i, width in enumerate(widths):
            down[str(i)] = Level(widths[max(i - 1, 0)], width, blocks=2, attention=i == n)
            if i < n:                                              # padded on the right and below alone
                down[str(i)].downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                                conv=nn.Conv2d(width, width, 3, stride=2))
        for i, width in reversed(list(enumerate(widths))):
            up[str(i)] = Level(widths[min(i + 1, n)], width, blocks=3, attention=i == n)
            if i > 0:
                up[str(i)].upsample = named(nearest=nn.Upsample(scale_factor=2), conv=conv(width, width))
        mid = [named(block_1=ResidualBlock(last, last), attn_1=SpatialAttention(last),
                     block_2=ResidualBlock(last, last)) for _ in range(2)]
        self.encoder = named(conv_in=conv(3, first), down=named(**down), mid=mid[0],
                             norm_out=norm(last), swish=nn.SiLU(), conv_out=conv(last, 2 * latent))
        self.decoder = named(conv_in=conv(latent, last), mid=mid[1], up=named(**up),
                             norm_out=norm(first), swish=nn.SiLU(), conv_out=conv(first, 3))
        self.quant_conv, self.post_quant_conv = conv(2 * latent, 2 * latent, 1), conv(latent, latent, 1)

    def encode(self, images):
        """The posterior's mean and log variance, each (N, 32, H/16, W/16)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

# ---- What the sizes cost -----------------------------------------------------------------------------------

def gmacs(net, shape):
    """Billions of multiply-adds in one forward of one input of this shape (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad(), next(net.parameters()).device:
        net(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 2e9

def main():
    """Print name, parameters and cost of every size."""
    print(f"{'name':20} {'input':>10} {'params':>8}   Gflops (multiply-adds)")
    for name in NAMES:
        size, patch = name.split("/")
        pixels, side = size.startswith("JiT"), 4 if size.endswith("demo") else 16
        shape = (3, side * int(patch), side * int(patch)) if pixels else (32, side, side)
        with torch.device("meta"):
            net = build(name, shape[1], num_classes=1000)
        params = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{name:20} {'x'.join(map(str, shape)):>10} {params:7.1f}M {gmacs(net, shape):8.2f}")

if __name__ == "__main__":
    main()
