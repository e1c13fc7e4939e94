"""The networks: JiT for pixels, LightningDiT (DiT) for latents, and the VA-VAE between the two.

    python model.py                                         # name, params, Gflops of every size
    net = model.build("JiT-B/16", image_size=256, num_classes=1000)
    u = net(z, t, y)                                        # (N, C, H, W), (N,), (N,) -> (N, C, H, W)

The transformers share Block, Attention, RMSNorm and RoPE. Time t runs in [0, 1]; class num_classes is the
null class. State-dict keys are those of the published files, so their weights load strictly.
JiT: arXiv 2511.13720; LightningDiT and VA-VAE: arXiv 2501.01423.
"""
# N batch, C channels, H height, W width; T tokens, D width of a token, h = D / heads
import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Positions


def grid(side):
    """Row and column of each of the side * side tokens, read row by row: two float64 tensors (T,)."""
    row, column = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    return row.flatten(), column.flatten()


def angles(position, n):
    """position (T,) at n geometric frequencies from 1 down to 1/10000 (exclusive): (T, n)."""
    return position[:, None] * 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)


def sincos_positions(side, dim):
    """The fixed table (1, T, D) added to the tokens: first half of D the column, second half the row."""
    row, column = (angles(p, dim // 4) for p in grid(side))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]


class RoPE(nn.Module):
    """Tables of 2-D rotary positions: the first half of a head turns by the row, the second by the column.

    `prefix` rows in front (angle 0) leave the in-context tokens unturned. Tables in a loaded file are checked
    for shape and otherwise ignored, so that no file brings other positions in.
    """

    def __init__(self, side, head_dim, prefix=0, persistent=False):
        super().__init__()
        theta = torch.cat([angles(p, head_dim // 4) for p in grid(side)], dim=1)   # (T, h/2)
        theta = F.pad(theta.repeat_interleave(2, dim=1), (0, 0, prefix, 0))        # (prefix + T, h)
        self.register_buffer("freqs_cos", theta.cos().float(), persistent)
        self.register_buffer("freqs_sin", theta.sin().float(), persistent)

    def forward(self, tokens):
        """The tables' last rows as `rotate` takes them: cos and (-sin, sin), each (tokens, 1, h/2, 2)."""
        cos, sin = (a[-tokens:, None].unflatten(-1, (-1, 2)) for a in (self.freqs_cos, self.freqs_sin))
        return cos, torch.stack([-sin[..., 0], sin[..., 1]], dim=-1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, table in self.named_buffers():
            if prefix + name in state_dict and state_dict[prefix + name].shape == table.shape:
                state_dict[prefix + name] = table
        super()._load_from_state_dict(state_dict, prefix, *args)


# ------------------------------------------------------------------------------------------------------------
# Parts of the transformers


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


class TimeEmbedding(nn.Module):
    """t (N,) in [0, 1] -> (N, D), in float32 also under autocast: bfloat16 cannot tell nearby times apart."""

    def __init__(self, dim, frequencies=128):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, t):
        i = torch.arange(self.frequencies, device=t.device, dtype=torch.float32)
        a = t.float()[:, None] * torch.exp(-math.log(10000) * i / self.frequencies)
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):
            return self.mlp(torch.cat([a.cos(), a.sin()], dim=1))


def rotate(x, rope):
    """Turn neighbouring channels of x (N, T, heads, h): (a, b) -> (a cos - b sin, b cos + a sin)."""
    x = x.unflatten(-1, (-1, 2))
    return torch.addcmul(x * rope[0], x.flip(-1), rope[1]).flatten(-2)


class Attention(nn.Module):
    """Softmax attention with rotary positions and, where asked, normalised queries and keys."""

    def __init__(self, dim, heads, qk_norm, dropout):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if qk_norm:
            self.q_norm = RMSNorm(dim // heads)
            self.k_norm = RMSNorm(dim // heads)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)   # each (N, T, heads, h)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(a, rope).to(v.dtype) for a in (q, k))
        x = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """The gated MLP: w3(silu(w1 x) * w2 x), where w12 holds the rows of w1, then of w2."""

    def __init__(self, dim, dropout):
        super().__init__()
        hidden = 4 * dim * 2 // 3      # as many weights as a plain MLP of width 4 D
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x):
        # two products, or else the gradients of the two halves would be copied together, tokens x hidden;
        # the price: w12 is read, not called, so that hooks on it do not run
        (w1, w2), (b1, b2) = self.w12.weight.chunk(2), self.w12.bias.chunk(2)
        return self.w3(self.dropout(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2)))


class Block(nn.Module):
    """Attention and MLP, each modulated by the condition (adaLN) and added to the stream through a gate.

    The first `drop` tokens leave the stream after attention: others have read them, and nobody will again.
    """

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


# ------------------------------------------------------------------------------------------------------------
# The transformers


class Transformer(nn.Module):
    """What JiT and DiT share: positions, condition, blocks, final layer, the way to patches and back."""

    def __init__(self, image_size, patch_size, in_channels, dim, depth, heads, num_classes,
                 qk_norm, dropout=0.0):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: "
                             f"try {-(-image_size // patch_size) * patch_size}")
        self.image_size, self.patch_size, self.in_channels = image_size, patch_size, in_channels
        self.num_classes, self.checkpointing = num_classes, False
        self.side = image_size // patch_size
        self.register_buffer("pos_embed", sincos_positions(self.side, dim))
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(
            Block(dim, heads, qk_norm, dropout if i in middle else 0.0) for i in range(depth))
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)

    def run(self, block, *inputs):
        """The block's output; with `checkpointing` the backward pass computes its activations again."""
        return checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)

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

    def patchify(self, x):
        """(N, C, H, W) -> (N, T, C p p). A convolution with stride = size is then a matrix product."""
        p, s = self.patch_size, self.side
        x = x.unflatten(3, (s, p)).unflatten(2, (s, p))            # (N, C, rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, x):
        """(N, T, p p C) -> (N, C, H, W)"""
        p, s = self.patch_size, self.side
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (s, s))        # (N, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def linear(x, conv):
    """A convolution's weights applied to patches already unfolded: (N, T, C p p) -> (N, T, out)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class JiT(Transformer):
    """Just image Transformer: large patches of pixels through a bottleneck, class tokens in front.

    forward: x (N, C, H, W), t (N,) in [0, 1], y (N,) int64 -> (N, C, H, W). `dropout` acts in the middle half
    of the blocks. ValueError where image_size does not divide into patches.
    """

    def __init__(self, *, image_size, patch_size, in_channels=3, dim, depth, heads, num_classes,
                 bottleneck, context_tokens, context_start, dropout=0.0):
        super().__init__(image_size, patch_size, in_channels, dim, depth, heads, num_classes,
                         qk_norm=True, dropout=dropout)
        self.x_embedder = nn.ModuleDict({
            "proj1": nn.Conv2d(in_channels, bottleneck, patch_size, patch_size, bias=False),
            "proj2": nn.Conv2d(bottleneck, dim, 1)})
        self.context_start = context_start if context_tokens else None
        if context_tokens:
            assert context_start < depth, "the in-context tokens would never enter"
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, context_tokens, dim))
        self.rope = RoPE(self.side, dim // heads, prefix=context_tokens)
        self.initialize()

    def forward(self, x, t, y):
        y = self.y_embedder.embedding_table(y)                     # (N, D)
        condition = self.t_embedder(t) + y
        x = linear(self.patchify(x), self.x_embedder.proj1)
        x = linear(x, self.x_embedder.proj2) + self.pos_embed      # (N, T, D)
        T = x.shape[1]
        rope = self.rope(T)
        for i, block in enumerate(self.blocks):
            if i == self.context_start:
                x = torch.cat([y[:, None] + self.in_context_posemb, x], dim=1)
                rope = self.rope(x.shape[1])                       # the class tokens stand in front, unturned
            last = block is self.blocks[-1]
            x = self.run(block, x, condition, rope, x.shape[1] - T if last else 0)
        return self.unpatchify(self.final_layer(x, condition))


class DiT(Transformer):
    """LightningDiT: image_size is the side of the latent. forward as in JiT."""

    def __init__(self, *, image_size, patch_size, in_channels, dim, depth, heads, num_classes, qk_norm=False):
        super().__init__(image_size, patch_size, in_channels, dim, depth, heads, num_classes, qk_norm)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, dim, patch_size, patch_size)})
        self.feat_rope = RoPE(self.side, dim // heads, persistent=True)
        self.initialize()

    def forward(self, x, t, y):
        condition = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = linear(self.patchify(x), self.x_embedder.proj) + self.pos_embed
        rope = self.feat_rope(x.shape[1])
        for block in self.blocks:
            x = self.run(block, x, condition, rope)
        return self.unpatchify(self.final_layer(x, condition))


# ------------------------------------------------------------------------------------------------------------
# VA-VAE f16d32, a KL autoencoder of the latent-diffusion family


def norm(width):
    """The normalisation of every part of the autoencoder."""
    return nn.GroupNorm(32, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Twice GroupNorm, swish, convolution; a 1x1 shortcut where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """One head over all positions of a feature map."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))   # (N, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y[:, 0].mT.unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked."""

    def __init__(self, width_in, width, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(width) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def named(**modules):
    """A Sequential whose parts have these names, as the published keys do."""
    return nn.Sequential(OrderedDict(modules))


def middle(width):
    """The lowest resolution between encoder and decoder levels."""
    return named(block_1=ResidualBlock(width, width), attn_1=SpatialAttention(width),
                 block_2=ResidualBlock(width, width))


def downsample(width):
    """Half the size: a pixel of padding right and below, then a convolution of stride 2."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))


def upsample(width):
    """Twice the size: nearest neighbour, then a convolution."""
    return named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(width, width, 3, padding=1))


class Encoder(nn.Module):
    """Images to the moments of the posterior before quant_conv."""

    def __init__(self, widths, blocks, out):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            self.down.append(Level(widths[max(i - 1, 0)], width, blocks, attention=i == last))
            self.down[i].downsample = downsample(width) if i < last else nn.Identity()
        self.mid = middle(width)
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents after post_quant_conv to images."""

    def __init__(self, widths, blocks, latent):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1])
        self.up = nn.ModuleList()                                  # as in the encoder, 0 is full resolution
        last = len(widths) - 1
        for i, width in enumerate(widths):
            self.up.append(Level(widths[min(i + 1, last)], width, blocks, attention=i == last))
            self.up[i].upsample = upsample(width) if i else nn.Identity()
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """VA-VAE f16d32: images (N, 3, H, W) in [-1, 1], multiples of 16 <-> latents (N, 32, H/16, W/16)."""

    def __init__(self, widths=(128, 128, 256, 256, 512), latent=32):
        super().__init__()
        self.encoder = Encoder(widths, blocks=2, out=2 * latent)
        self.decoder = Decoder(widths, blocks=3, latent=latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, images):
        """The posterior's mean and log variance, each (N, 32, H/16, W/16)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


# Columns: patch, D, depth, heads; JiT alone: bottleneck, in-context tokens and the block they enter before
SIZES = {
    "JiT-B/16":            (16,  768, 12, 12, 128, 32,  4),
    "JiT-B/32":            (32,  768, 12, 12, 128, 32,  4),
    "JiT-L/16":            (16, 1024, 24, 16, 128, 32,  8),
    "JiT-L/32":            (32, 1024, 24, 16, 128, 32,  8),
    "JiT-H/16":            (16, 1280, 32, 16, 256, 32, 10),
    "JiT-H/32":            (32, 1280, 32, 16, 256, 32, 10),
    "JiT-demo/8":          ( 8,   96,  4,  3,  64,  4,  1),
    "LightningDiT-B/1":    ( 1,  768, 12, 12),
    "LightningDiT-B/2":    ( 2,  768, 12, 12),
    "LightningDiT-L/1":    ( 1, 1024, 24, 16),
    "LightningDiT-L/2":    ( 2, 1024, 24, 16),
    "LightningDiT-XL/1":   ( 1, 1152, 28, 16),
    "LightningDiT-XL/2":   ( 2, 1152, 28, 16),
    "LightningDiT-demo/1": ( 1,   96,  4,  3),
}
COLUMNS = "patch_size", "dim", "depth", "heads", "bottleneck", "context_tokens", "context_start"


def build(name, image_size, num_classes, in_channels=None, **overrides):
    """Network `name`; image_size in pixels for JiT, in latents for LightningDiT. ValueError if unknown."""
    if name not in SIZES:
        raise ValueError(f"unknown model {name}: choose from {', '.join(SIZES)}")
    network, channels = (JiT, 3) if name.startswith("JiT") else (DiT, 32)
    return network(image_size=image_size, num_classes=num_classes, in_channels=in_channels or channels,
                   **dict(zip(COLUMNS, SIZES[name])) | overrides)


def gmacs(net):
    """Billions of multiply-adds in one forward of one image."""
    from torch.utils.flop_counter import FlopCounterMode
    device, C, S = net.pos_embed.device, net.in_channels, net.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, C, S, S, device=device), torch.zeros(1, device=device),
            torch.zeros(1, dtype=torch.long, device=device))
    return counter.get_total_flops() / 2e9


def main():
    print(f"{'name':20} {'input':>10} {'params':>8}   Gflops (multiply-adds)")
    for name, (patch, *_) in SIZES.items():
        pixels = name.startswith("JiT")
        size = (32 if pixels else 4) if "demo" in name else (16 * patch if pixels else 16)
        with torch.device("meta"):
            net = build(name, size, num_classes=1000)
        params = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{name:20} {f'{net.in_channels}x{size}x{size}':>10} {params:7.1f}M {gmacs(net):8.2f}")


if __name__ == "__main__":
    main()
