"""The networks: JiT for pixels, LightningDiT (DiT) for latents, and the VA-VAE between the two.

    python model.py                                         # name, params, Gflops of every size
    net = model.build("JiT-B/16", image_size=256, num_classes=1000)
    u = net(z, t, y)                                        # (N, C, H, W), (N,), (N,) -> (N, C, H, W)

Time t is in [0, 1]. The label num_classes means "no label". The keys of the state dict are those of the
published files, so that their weights load as they are; the end of this file says what such a file contains.
JiT: arXiv 2511.13720. LightningDiT and VA-VAE: arXiv 2501.01423.
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
    """x / rms(x) * weight over the last axis, always in float32. With a condition (adaLN) the
    result is also modulated: * (1 + scale) + shift, each (N, 1, D)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, shift=None, scale=None):
        x = x.float()
        if shift is None:
            return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)
        x = F.rms_norm(x, self.weight.shape, eps=1e-6)
        # addcmul(a, b, c) is a + b c in one pass over memory, here and below: 8% of the demo's step
        return torch.addcmul(shift, x, self.weight * (1 + scale.float()))

def rotate(x, cos, sin):
    """Turn neighbouring channels of x (N, T, heads, h): (a, b) -> (a cos - b sin, b cos + a sin)."""
    pairs = x.unflatten(-1, (-1, 2))                               # (N, T, heads, h / 2, 2)
    return torch.addcmul(pairs * cos, pairs.flip(-1), sin).flatten(-2)          # sin has the signs -, +

def dropout_layer(p):
    """Dropout, or nothing where p is 0: a Dropout(0) would be 3% of the demo's step."""
    return nn.Dropout(p) if p else nn.Identity()

class Attention(nn.Module):
    """Softmax attention with rotary positions and, if asked for, normalised queries and keys."""

    def __init__(self, dim, heads, qk_norm, dropout):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = dropout_layer(dropout)
        qk = RMSNorm if qk_norm else nn.Identity                   # Identity takes any arguments
        self.q_norm = qk(dim // heads)
        self.k_norm = qk(dim // heads)

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))       # (N, T, 3, heads, h)
        q, k, v = qkv.unbind(2)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x.transpose(1, 2).flatten(2)                           # (N, T, D)
        return self.dropout(self.proj(x))

class SwiGLU(nn.Module):
    """The gated MLP: w3(silu(w1 x) * w2 x), where w12 contains the rows of w1, then of w2."""

    def __init__(self, dim, dropout):
        super().__init__()
        hidden = 4 * dim * 2 // 3                      # as many weights as a plain MLP of width 4 D
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.dropout = dropout_layer(dropout)

    def forward(self, x):
        # two products: with one, the backward pass would have to concatenate the gradients of its
        # two halves, 5% of the demo's step
        w1, w2 = self.w12.weight.chunk(2)
        b1, b2 = self.w12.bias.chunk(2)
        gate = F.linear(x, w1, b1)                                 # (N, T, hidden)
        x = F.linear(x, w2, b2)
        return self.w3(self.dropout(F.silu(gate) * x))             # (N, T, D)

class Block(nn.Module):
    """Attention and MLP. The condition modulates the input of each (adaLN) and gates its output.
    After attention the first `drop` tokens are dropped."""

    def __init__(self, dim, heads, qk_norm, dropout=0.0):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads, qk_norm, dropout)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, condition, cos, sin, drop=0):
        m = self.adaLN_modulation(condition)[:, None]              # (N, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.chunk(6, dim=-1)
        y = self.attn(self.norm1(x, shift1, scale1), cos, sin)
        x = torch.addcmul(x, gate1, y)[:, drop:]
        y = self.mlp(self.norm2(x, shift2, scale2))
        return torch.addcmul(x, gate2, y)

def named(**modules):
    """A Sequential whose parts have these names, as in the published keys."""
    return nn.Sequential(OrderedDict(modules))

class FinalLayer(nn.Module):
    """From the stream (N, T, D) to the values of each patch (N, T, p p C)."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, condition):
        m = self.adaLN_modulation(condition)[:, None]              # (N, 1, 2 D)
        shift, scale = m.chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))

class Transformer(nn.Module):
    """What JiT and DiT share: everything but x_embedder, which makes a token of each patch.
    forward: x (N, C, H, W), t (N,) in [0, 1], y (N,) int64 -> (N, C, H, W). If `checkpointing`
    is set, the backward pass computes the activations of each block again. ValueError for sizes
    that do not fit."""

    def __init__(self, *, image_size, patch_size, in_channels, dim, depth, heads, num_classes, qk_norm=False,
                 dropout=0.0, context_tokens=0, context_start=0):
        super().__init__()
        if not isinstance(image_size, int):
            raise ValueError(f"image_size {image_size}: this network takes square images")
        if image_size % patch_size:
            fits = math.ceil(image_size / patch_size) * patch_size
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}: try {fits}")
        if context_tokens and context_start >= depth:
            raise ValueError(f"context_start {context_start} is after the last block: try {depth - 1}")
        self.patch_size = patch_size
        self.side = image_size // patch_size
        self.in_channels = in_channels
        self.checkpointing = False
        self.context_start = None
        if context_tokens:
            self.context_start = context_start
            self.in_context_posemb = nn.Parameter(0.02 * torch.randn(1, context_tokens, dim))
        self.register_buffer("pos_embed", sincos_positions(self.side, dim))
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, dim)})
        cos, sin = rotary_positions(self.side, dim // heads, context_tokens)
        signs = torch.tensor([-1.0, 1.0])
        # (tokens, 1, h / 2, 2)
        self.register_buffer("cos", cos.view(len(cos), 1, -1, 2), persistent=False)
        self.register_buffer("sin", sin.view(len(sin), 1, -1, 2) * signs, persistent=False)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            in_middle = depth // 4 <= i < depth // 4 * 3
            self.blocks.append(Block(dim, heads, qk_norm, dropout if in_middle else 0.0))
        self.final_layer = FinalLayer(dim, patch_size ** 2 * in_channels)

    def forward(self, x, t, y):
        p, side, T = self.patch_size, self.side, self.side ** 2
        label = self.y_embedder.embedding_table(y)                 # (N, D)
        condition = self.t_embedder(t) + label
        x = F.pixel_unshuffle(x, p).flatten(2).mT                  # (N, T, C p p)
        for conv in self.x_embedder:                               # a matrix product on patches: 4% faster
            x = F.linear(x, conv.weight.flatten(1), conv.bias)
        x = x + self.pos_embed                                     # (N, T, D)
        cos, sin = self.cos[-T:], self.sin[-T:]
        for i, block in enumerate(self.blocks):
            if i == self.context_start:                            # class tokens in front, not rotated
                x = torch.cat([label[:, None] + self.in_context_posemb.squeeze(0), x], dim=1)
                cos, sin = self.cos, self.sin
            drop = 0
            if block is self.blocks[-1]:       # nothing reads the class tokens any more: saves 6%
                drop = x.shape[1] - T
            if self.checkpointing:
                x = checkpoint(block, x, condition, cos, sin, drop, use_reentrant=False)
            else:
                x = block(x, condition, cos, sin, drop)
        x = self.final_layer(x, condition)                         # (N, T, p p C)
        x = x.view(len(x), side, side, p, p, -1)
        x = x.permute(0, 5, 1, 3, 2, 4)                            # (N, C, rows, p, columns, p)
        return x.reshape(len(x), -1, side * p, side * p)

    def initialize(self):
        """Every block starts as the identity, and the network's output as 0 (adaLN-zero)."""
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
        """Compile each block in place: keys stay, one graph serves all, gradients leave
        block by block."""
        torch._dynamo.config.recompile_limit = 64        # each number of tokens and of images is a graph
        torch._dynamo.config.optimize_ddp = False        # DDP would cut the blocks again
        for part in (*self.blocks, self.final_layer):
            part.compile(**how)

class JiT(Transformer):
    """Just image Transformer: large patches of pixels through a bottleneck, q and k normalised, class
    tokens in front from block `context_start` on. `dropout` acts in the middle half of the blocks."""

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
        cos, sin = rotary_positions(self.side, dim // heads)
        self.feat_rope = nn.Module()       # published files contain these tables; we never use them
        self.feat_rope.register_buffer("freqs_cos", cos)
        self.feat_rope.register_buffer("freqs_sin", sin)
        self.initialize()

# The last three columns are for JiT alone. Add a row to add a size.
SIZE_TABLE = """
    name               dim  depth  heads  bottleneck  context_tokens  context_start
    JiT-B              768     12     12         128              32              4
    JiT-L             1024     24     16         128              32              8
    JiT-H             1280     32     16         256              32             10
    JiT-S              384     12      6         128              16              4
    JiT-demo            96      4      3          64               4              1
    JiT-narrow          48      4      3          64               4              1
    JiT-wide           192      4      6          64               4              1
    LightningDiT-B     768     12     12
    LightningDiT-L    1024     24     16
    LightningDiT-XL   1152     28     16
    LightningDiT-S     384     12      6
    LightningDiT-demo   96      4      3
"""
HEAD, *ROWS = [line.split() for line in SIZE_TABLE.strip().splitlines()]
SIZES = {name: dict(zip(HEAD[1:], map(int, row))) for name, *row in ROWS}
# All sizes with their usual patches. NAME/PATCH with any other patch works too.
NAMES = ("JiT-B/16 JiT-B/32 JiT-L/16 JiT-L/32 JiT-H/16 JiT-H/32 JiT-S/8 JiT-demo/8 JiT-narrow/8 JiT-wide/8 "
         "LightningDiT-B/1 LightningDiT-B/2 LightningDiT-L/1 LightningDiT-L/2 LightningDiT-XL/1 "
         "LightningDiT-XL/2 LightningDiT-S/1 LightningDiT-demo/1").split()

def build(name, image_size, num_classes, in_channels=None, **overrides):
    """The network NAME/PATCH. image_size: the side of x, in pixels for JiT and in latents
    for LightningDiT. in_channels: by default 3 for JiT, 32 for LightningDiT. overrides:
    arguments of JiT or DiT.
    ValueError for an unknown name."""
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(f"unknown model {name}: choose from {', '.join(NAMES)}, "
                         f"or NAME/PATCH with {', '.join(SIZES)} and any patch")
    config = SIZES[size] | {"patch_size": int(patch), "image_size": image_size, "num_classes": num_classes}
    if name.startswith("JiT"):
        return JiT(in_channels=in_channels or 3, **config | overrides)
    return DiT(in_channels=in_channels or 32, **config | overrides)

# ---- Time and positions ------------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """t (N,) in [0, 1] -> (N, D). Computed in float64, so that autocast and TF32 cannot round
    nearby times to the same value."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * 128, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        exact = torch.float32 if t.device.type == "mps" else torch.float64       # which Apple's GPUs lack
        w1, b1, w2, b2 = (p.to(exact) for p in self.mlp.parameters())
        i = torch.arange(128, device=t.device, dtype=exact)
        frequencies = torch.exp(-math.log(10000) * i / 128)
        a = t.to(exact)[:, None] * frequencies
        x = torch.cat([a.cos(), a.sin()], dim=1)                   # (N, 256)
        x = F.silu(F.linear(x, w1, b1))
        return F.linear(x, w2, b2).float()

def angles(side, n):
    """Two tables (T, n): the row of each token, and its column, times n frequencies that fall from 1
    towards 1/10000."""
    i = torch.arange(n, dtype=torch.float64)
    place = torch.arange(side, dtype=torch.float64)
    a = place[:, None] * 10000.0 ** (-i / n)                       # (side, n)
    return a.repeat_interleave(side, dim=0), a.repeat(side, 1)

def sincos_positions(side, dim):
    """The fixed table (1, T, D) added to the tokens: the column in the first half of D, the row
    in the second."""
    row, column = angles(side, dim // 4)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return table.float()[None]

def rotary_positions(side, dim, prefix=0):
    """cos and sin (prefix + T, h) of 2-D RoPE. The first half of a head turns with the row of
    its token, the second half with the column. The first `prefix` tokens do not turn."""
    a = torch.cat(angles(side, dim // 4), dim=1)
    a = a.repeat_interleave(2, dim=1)                              # neighbouring channels turn together
    a = F.pad(a, (0, 0, prefix, 0))
    return a.cos().float(), a.sin().float()

# ---- VA-VAE f16d32, a KL autoencoder of the latent-diffusion family ----------------------------------------

def conv(width_in, width, size=3):
    """A convolution that keeps the image's size."""
    return nn.Conv2d(width_in, width, size, padding=size // 2)

def norm(width):
    """GroupNorm as in the latent-diffusion family."""
    return nn.GroupNorm(32, width, eps=1e-6)

class ResidualBlock(nn.Module):
    """Twice GroupNorm, swish, convolution; a 1x1 shortcut where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        self.norm1 = norm(width_in)
        self.conv1 = conv(width_in, width)
        self.norm2 = norm(width)
        self.conv2 = conv(width, width)
        self.nin_shortcut = nn.Identity()
        if width_in != width:
            self.nin_shortcut = conv(width_in, width, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))

class SpatialAttention(nn.Module):
    """One head over all positions of a feature map."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q = conv(width, width, 1)
        self.k = conv(width, width, 1)
        self.v = conv(width, width, 1)
        self.proj_out = conv(width, width, 1)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))   # (N, 1, H W, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(y.mT.unflatten(2, x.shape[2:]))

class Level(nn.Module):
    """One resolution: residual blocks, attention after each if asked for, then the step to
    the next level."""

    def __init__(self, width_in, width, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        attn = SpatialAttention if attention else nn.Identity
        for _ in range(blocks):
            self.block.append(ResidualBlock(width_in, width))
            self.attn.append(attn(width))
            width_in = width
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))

def middle(width):
    """What the encoder does after its levels and the decoder before them."""
    return named(block_1=ResidualBlock(width, width), attn_1=SpatialAttention(width),
                 block_2=ResidualBlock(width, width))

def leave(width, out):
    """The last layers of the encoder or the decoder, by name."""
    return {"norm_out": norm(width), "swish": nn.SiLU(), "conv_out": conv(width, out)}

class VAVAE(nn.Module):
    """VA-VAE f16d32: images (N, 3, H, W) in [-1, 1], sides multiples of 16 <-> latents (N, 32, H/16,
    W/16). weights: the published file, or the dict in it; without them the network is untrained.
    In bfloat16 it still takes and returns float32."""
    factor, channels = 16, 32

    def __init__(self, weights=None, widths=(128, 128, 256, 256, 512)):
        super().__init__()
        first, last, deepest = widths[0], widths[-1], len(widths) - 1
        down, up = {}, {}                                          # level 0 is full resolution in both
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, blocks=2, attention=i == deepest)
            if i < deepest:                                        # padded on the right and below only
                conv2 = nn.Conv2d(width, width, 3, stride=2)
                level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv2)
            down[str(i)] = level
        for i in reversed(range(len(widths))):
            width = widths[i]
            level = Level(widths[min(i + 1, deepest)], width, blocks=3, attention=i == deepest)
            if i > 0:
                level.upsample = named(nearest=nn.Upsample(scale_factor=2), conv=conv(width, width))
            up[str(i)] = level
        # from images to the moments of latents, and from latents to images
        channels = self.channels
        self.encoder = named(conv_in=conv(3, first), down=named(**down), mid=middle(last),
                             **leave(last, 2 * channels))
        self.decoder = named(conv_in=conv(channels, last), mid=middle(last), up=named(**up),
                             **leave(first, 3))
        self.quant_conv = conv(2 * channels, 2 * channels, 1)
        self.post_quant_conv = conv(channels, channels, 1)
        if weights is not None:
            if not isinstance(weights, dict):
                weights = torch.load(weights, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
            ours = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
            self.load_state_dict({key: value for key, value in weights.items() if key.startswith(ours)})
        self.eval().requires_grad_(False)

    def moments(self, images):
        """Mean and log variance of the posterior, each (N, 32, H/16, W/16). The log variance is
        in [-30, 20]."""
        images = images.to(self.quant_conv.weight.dtype)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean.float(), logvar.float().clamp(-30, 20)

    def encode(self, images, noise=None):
        """A sample of the posterior. noise: standard normal, shaped like the latent; drawn if None."""
        mean, logvar = self.moments(images)
        if noise is None:
            noise = torch.randn_like(mean)
        return mean + torch.exp(logvar / 2) * noise

    def decode(self, latents):
        """Images (N, 3, H, W), about in [-1, 1], of latents (N, 32, H/16, W/16)."""
        latents = latents.to(self.quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(latents)).float()

# ---- Published files: which network, which weights ---------------------------------------------------------

# What sampling needs to know beside the weights (the papers' settings and Table 4).
BOTH = dict(loss="v", label_drop=0.1, t_mean=0.0, t_std=1.0, noise_scale=1.0, interval=[0.1, 1.0])
PUBLISHED = {"JiT": BOTH | dict(space="pixel", target="x", tau=0.05, cfg=2.9, t_mean=-0.8, t_std=0.8),
             "LightningDiT": BOTH | dict(space="latent", target="v", tau=0.0, cfg=1.5)}
AVERAGES = {"model_ema1": "0.9999", "model_ema2": "0.9996", "model": "none"}     # the names in JiT's files
# Tables that follow from the sizes of a network. A file need not contain them.
TABLES = "pos_embed feat_rope.freqs_cos feat_rope.freqs_sin".split()

def from_published(file):
    """The dict in a published file, in the form of our checkpoints. The file contains weights, or
    several dicts of weights such as "model" and "ema". Prefixes such as "module." are removed.
    ValueError if it is neither JiT nor LightningDiT."""
    parts = {}
    for key, part in file.items():
        if isinstance(part, dict) and any(map(torch.is_tensor, part.values())):
            parts[AVERAGES.get(key, key)] = part
    averages = {}
    for key, weights in (parts or {"none": file}).items():
        last = "t_embedder.mlp.0.weight"
        prefixes = [key.removesuffix(last) for key in weights if key.endswith(last)]
        if not prefixes or any("mlp.fc1" in key for key in weights):
            kind = f"a file with {', '.join(list(weights)[:3])}, ..."
            if prefixes:
                kind = "a DiT or SiT"
            raise ValueError(f"it is {kind}, neither JiT nor LightningDiT")
        start = prefixes[0]
        averages[key] = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
    config = published_config(next(iter(averages.values())))
    for key, weights in averages.items():
        averages[key] = {f"net.{name}": weight for name, weight in weights.items()}
    data = {"classes": [str(i) for i in range(config["num_classes"])]}
    return {"config": config, "ema": averages, "step": 0, "data": data}

def published_config(weights):
    """The config of a network, from the shapes of its weights (a dict). ValueError unless one row of
    SIZES fits."""
    family = "LightningDiT"
    embedder = weights.get("x_embedder.proj.weight")
    if embedder is None:
        family = "JiT"
        embedder = weights["x_embedder.proj1.weight"]
    _, channels, _, patch = embedder.shape
    dim = len(weights["blocks.0.attn.proj.bias"])
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    fits = [size for size, row in SIZES.items()
            if size.startswith(family) and (row["dim"], row["depth"]) == (dim, depth)]
    if len(fits) != 1:
        raise ValueError(f"it is a {family} of depth {depth} and width {dim}: {len(fits)} rows of SIZES fit")
    table = weights.get("pos_embed", torch.empty(1, 256, dim))      # 16 x 16 tokens, as published
    side = math.isqrt(table.shape[1]) * patch
    config = PUBLISHED[family] | {"model": f"{fits[0]}/{patch}", "shape": [channels, side, side]}
    config["num_classes"] = len(weights["y_embedder.embedding_table.weight"]) - 1
    if family == "JiT":
        config["noise_scale"] = side / 256
    else:
        config["qk_norm"] = "blocks.0.attn.q_norm.weight" in weights
    return config

# ---- What the sizes cost -----------------------------------------------------------------------------------

def gmacs(net, shape, label_shape=()):
    """Billions of multiply-adds in one forward of one input of this shape (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad(), next(net.parameters()).device:
        net(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, *label_shape, dtype=torch.long))
    return counter.get_total_flops() / 2e9

def main():
    """Print name, parameters and cost of every size."""
    print(f"{'name':20} {'input':>10} {'params':>8}   Gflops (multiply-adds)")
    for name in NAMES:
        size, patch = name.split("/")
        side = 16                                                  # tokens
        if SIZES[size]["dim"] < 200:                               # the demos, of 32 pixels
            side = 4
        shape = (32, side, side)
        if size.startswith("JiT"):
            shape = (3, side * int(patch), side * int(patch))
        with torch.device("meta"):                                 # shapes without numbers
            net = build(name, shape[1], num_classes=1000)
        params = sum(p.numel() for p in net.parameters()) / 1e6
        print(f"{name:20} {'x'.join(map(str, shape)):>10} {params:7.1f}M {gmacs(net, shape):8.2f}")

if __name__ == "__main__":
    main()
