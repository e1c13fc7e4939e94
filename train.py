"""The training loop: one process or many, from a laptop's minute to Table 4 on ImageNet.

    torchrun train.py --space pixel                            the demo: built-in shapes, k finds x-prediction
    torchrun train.py --space latent                           the same in latents: k stays in between
    torchrun train.py --space pixel --data photos --image_size 64                      your own pictures
    torchrun --nproc_per_node=8 train.py --space pixel --data imagenet/train           Table 4

The same command again resumes from its last checkpoint. --dry_run prints what a command would do.
"""
import copy
import math
import re
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

# the second half of data.py has what all scripts share: processes, errors, files
from data import (CORES, DATASETS, RANK, WORLD, Codec, FileError, PatchPCA, UserError, all_reduce, barrier,
                  batch_indices, exit_now, first_decides, keep_outside, new_file, new_parser, on_signals,
                  open_dataset, open_vavae, own_folder, print0, read_tensors, reading, require, run, seed_of,
                  setup, some_items)
from model import SIZES, TABLES, VAVAE, gmacs
from objective import LOSSES, TARGETS, KDiff, k_of_innovation, target_row
from sample import (Checkpoint, append_row, autocast, build_kdiff, check_interval, codec_state,
                    compile_network, default_average, draw_curves, fastest_dtype, grid, open_codec,
                    read_checkpoint, read_log, read_rows, save_picture, write_rows)

# Table 4. A row is a flag. There is a column for latent space and one for pixel space, which begin at
# characters 20 and 44. "-" sets nothing, or leaves the choice to fill_in().
TABLE_4 = """
                    latent                  pixel
    --model         LightningDiT-XL/1       -
    --image_size    256                     256
    --target        k                       k
    --k_start       0.5                     0.5
    --loss          v                       v
    --epochs        800                     600
    --warmup_epochs 0                       5
    --batch_size    1024                    1024
    --lr            2e-4                    2e-4
    --k_lr          1                       1
    --clip          0                       0
    --seed          0                       0
    --ema           .9999 .9998 .9996       .9999 .9998 .9996
    --t_mean        0                       -0.8
    --t_std         1                       0.8
    --noise_scale   1                       -
    --tau           -                       0.05
    --label_drop    0.1                     0.1
    --cfg           1.5                     2.9
    --interval      0.1 1.0                 0.1 1.0
    --log_every     50                      50
    --save_every    5000                    5000
    --keep_every    0                       0
    --sample_every  5000                    5000
"""
# The demo. JiT's patch has more values than the network is wide: noise does not fit through, data do.
DEMO = """
    --model         LightningDiT-demo/1     JiT-demo/8
    --image_size    32                      32
    --epochs        13                      10
    --warmup_epochs 0.25                    0.25
    --batch_size    64                      64
    --lr            4e-3                    4e-3
    --k_lr          1                       10
    --ema           .99 .98 .95             .99 .98 .95
    --noise_scale   1                       1
    --cfg           2                       2
    --log_every     20                      20
    --save_every    500                     500
    --sample_every  500                     500
    --tokenizer     pca                     -
"""
# The demo on 60,000 pictures.
FASHION = """
    --epochs        4.267                   4.267
    --warmup_epochs 0.03                    0.03
    --ema           .999 .998 .995          .999 .998 .995
    --save_every    1000                    1000
    --sample_every  1000                    1000
"""
# Own pictures: 1,000 to 50,000 of 64 to 128 px, on one GPU.
SMALL = """
    --model         LightningDiT-S/1        JiT-S
    --image_size    64                      64
    --epochs        400                     400
    --warmup_epochs 0                       5
    --lr            5e-4                    5e-4
    --ema           .9995 .999 .995         .9995 .999 .995
    --sample_every  1000                    1000
"""
# Own pictures on a laptop, about 1,000 of 32 px. On two cores --dry_run estimates a quarter of an hour.
LAPTOP = """
    --model         LightningDiT-demo/1     JiT-demo
    --steps         3000                    3000
"""
# A preset is flags that come before yours; of two equal flags the later wins.
PRESETS = {"paper": TABLE_4, "demo": TABLE_4 + DEMO, "fashion": TABLE_4 + DEMO + FASHION,
           "small": TABLE_4 + DEMO + SMALL, "laptop": TABLE_4 + DEMO + FASHION + LAPTOP}

# A row: the flag, its kind (KINDS in data.py; count: an integer >= 1, whole: >= 0, amount: a number >= 0,
# "a|b": a choice), and its help.
FLAGS = f"""
    --space         pixel|latent        the column of Table 4 (default pixel)
    --preset        {"|".join(PRESETS)}     other defaults (default: what fits --data, --image_size, --model)
    --out           text                the run's folder (default out/SPACE[-DATA][-TARGET])
    --steps         count               optimizer steps in all (default: from --epochs)
    --epochs        amount              passes over the data
    --seed          integer             of weights, order, noise, pictures (default 0)
    --init          text                start from the weights of this checkpoint, ours or published
    --dry_run       switch              print what would be done and how long it takes, and stop

    --data          text                {", ".join(DATASETS)}, or a path: images, latents, a packed file
    --image_size    count               pixels
    --tokenizer     text                for latents: pca (of patches), or VA-VAE weights
    --flip          yes/no              mirror pictures of --data at random (default yes)
    --workers       whole               loading processes of each process (default: 8 at most; short runs 0)

    --model         text                a size that `python model.py` lists
    --qk_norm       switch              LightningDiT: normalise queries and keys
    --activation_checkpointing switch   recompute activations: less memory, slower
    --compile       yes/no              compile each block (default: on GPUs, except for short runs)
    --dtype         float32|bfloat16    of autocast (default: bfloat16 if the GPU has it)

    --target        text                {", ".join(TARGETS)}, or a number in [0, 1] (default k)
    --k_start       text                where k starts: 0.001 to 0.999, or data: as foretold (default 0.5)
    --loss          {"|".join(LOSSES)}           the variable whose error is squared (default v)
    --t_mean        number              mean of logit(t)
    --t_std         amount              standard deviation of logit(t)
    --noise_scale   amount              std of the noise (preset paper in pixels: image_size / 256, else 1)
    --tau           amount              least Delta (default: 0.05; in latents 0 if Delta cannot vanish)
    --label_drop    amount              probability of having no label

    --batch_size    count               images a step, over all processes
    --micro_batch   count               images at a time on each process (default: at most 128)
    --lr            amount              learning rate after the warmup
    --k_lr          amount              learning rate of w is this times --lr; 0 keeps k fixed
    --warmup_epochs amount              of linear warmup
    --clip          amount              largest gradient norm; 0: any (default 0)
    --ema           amounts             decays of averages of the weights

    --log_every     count               steps between lines
    --save_every    count               steps between checkpoints
    --keep_every    whole               steps between checkpoints that stay, as ckpt-STEP.pt (default 0: none)
    --sample_every  whole               steps between pictures; 0: only at the end
    --samples       whole               images in a picture; 0: none (default 64; 8 on CPUs for paper, small)
    --cfg           amount              guidance scale of pictures
    --interval      amounts             two times between which guidance acts
"""

# What a resumed run must share with its checkpoint. Other settings may change; resume() prints that.
FIXED = ("model target space loss data_fingerprint shape num_classes batch_size seed flip qk_norm ema "
         "t_mean t_std noise_scale tau label_drop k_start").split()

def train(state, data, args):
    """Algorithm 1 from state.step on. Yields (loss, gradient norm, learning rate) after every
    step. state: a State; data: a Dataset; args needs steps, seed, batch_size, micro_batch,
    workers, lr, k_lr, warmup_epochs, clip, dtype. The loss is this process's. A step whose norm is not
    finite was skipped. The caller logs, saves, draws and stops."""
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")             # renamed in torch 2.13
    device = state.parameters[0].device
    model = state.kdiff
    if WORLD > 1:
        model = DistributedDataParallel(state.kdiff, broadcast_buffers=False, gradient_as_bucket_view=True)
    warmup = args.warmup_epochs * len(data) / args.batch_size
    share = args.batch_size // WORLD

    # draw a batch: uint8 images or latents (share, ...), labels (share,), in the order of batch_indices
    for step, (batch, labels) in enumerate(batches(data, args, state.step, device), state.step):
        # noise, t and label drop of an image follow from the step and its place in the global batch
        seeds = [seed_of(args.seed, step, n) for n in range(RANK * share, (RANK + 1) * share)]
        torch.manual_seed(seeds[0])                                   # for other random numbers of a network

        # the learning rate: linear warmup, then constant
        lr = args.lr * min(1.0, (step + 1) / max(warmup, 1))
        for group in state.optimizer.param_groups:
            group["lr"] = lr
            if not group.get("of_net", True):
                group["lr"] = lr * args.k_lr

        # forward and backward; gradients add up over micro batches; the backward pass of the last one
        # also averages them over processes
        loss = 0.0
        for i in range(0, share, args.micro_batch):
            part = slice(i, i + args.micro_batch)
            x = state.codec.encode(batch[part].to(device, non_blocking=True))            # (N, C, H, W)
            y = labels[part].to(device, non_blocking=True)                               # (N,)
            sync = nullcontext()
            if WORLD > 1 and i + args.micro_batch < share:
                sync = model.no_sync()
            with sync:
                with autocast(device, args.dtype):
                    part_loss = model(x, y, seeds[part]) * (len(x) / share)
                # make all gradients NaN if the loss is not finite: their average is then NaN on every
                # process, and all of them skip the step
                part_loss.backward(torch.where(part_loss.isfinite(), 1.0, torch.nan))
            loss = loss + part_loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
        if args.clip:
            torch.nn.utils.clip_grads_with_norm_(state.parameters, args.clip, norm)

        # skip the step if a gradient is not finite, on all processes alike. This check is the only
        # place where a step waits for the device
        loss, norm = torch.stack([loss, norm]).tolist()
        if math.isfinite(norm):
            # update the weights, then their averages, from which pictures are drawn:
            # decay * average + (1 - decay) * weight
            state.optimizer.step()
            for decay, average in state.averages.items():
                update = get_ema_multi_avg_fn(float(decay))
                update(list(average.parameters()), list(state.kdiff.parameters()), None)
        else:
            state.skipped += 1
        state.optimizer.zero_grad(set_to_none=True)
        state.step = step + 1
        yield loss, norm, lr

def main():
    """Prepare a run as the flags say, print what it is, and train."""
    args = parse()
    device = setup(args.device)
    # what follows from flags and data, the same on every process
    data = open_data(args)
    codec = make_codec(args, data)
    if WORLD > 1:                                          # machines may differ in a component's sign
        for buffer in codec.buffers():
            dist.broadcast(buffer, 0)
    config = make_config(args, data, codec, device)
    k_start = 0.5
    new = not first_decides((args.out / "ckpt.pt").exists())
    if new:
        require(not args.init or Path(args.init).is_file(), f"--init {args.init}: no such file")
        require(not any(args.out.glob("ckpt-*.pt")), f"--out {args.out} contains checkpoints of another run: "
                "name another --out")
    if args.dry_run or new:                                # a resumed run knows its k
        k_start = start_of_k(args, config, data, codec)
    # the network, and what it costs
    torch.manual_seed(args.seed % 2 ** 63)
    kdiff = build_kdiff(config, k_start)
    describe(args, config, kdiff, data)
    if args.dry_run:
        return estimate(args, config, kdiff.to(device))
    # the run: new, from weights of another, or resumed
    if args.init and new:
        codec = start_from(args, config, kdiff, codec, data.classes)
    state = State(kdiff.to(device).train(), codec, config, data.classes)
    with own_folder(args.out):
        resume(args, state)
        state.codec.to(device)
        if args.compile:
            compile_network(kdiff.net)
        kdiff.net.checkpointing = args.activation_checkpointing
        run_training(args, state, data)

def run_training(args, state, data):
    """Train to the last step, or until a signal. Log, save and draw on the way."""
    path = args.out / "ckpt.pt"
    curves = args.out / "curves.png"                       # drawn last, after the last save
    finished = state.step >= args.steps and curves.exists()
    if first_decides(finished and curves.stat().st_mtime >= path.stat().st_mtime):
        return print0(f"{path} is finished at step {state.step:,}: nothing to do "
                      "(--steps for more, --out for another run)")
    saved = state.step
    began = time.perf_counter()
    log = Log(args.out / "log.csv", state, args, data)
    signals = []
    on_signals(lambda number, frame: signals.append(number))
    try:
        for loss, norm, lr in train(state, data, args):
            # all leave after the same step
            stop = all_reduce(torch.tensor(max(signals, default=0)), dist.ReduceOp.MAX).item()
            last = state.step == args.steps or stop
            # log
            log.add(loss, norm)
            if state.step % args.log_every == 0 or last:
                log.write(lr)
            require(log.bad_in_a_row < min(10, args.steps),
                    f"the last {log.bad_in_a_row} steps had a loss or gradient that is not finite; "
                    f"{path} at step {saved} is intact: try a lower --lr, --clip 1 or --dtype float32")
            # save
            if state.step % args.save_every == 0 or last:
                save(path, state)
                saved = state.step
            if args.keep_every and state.step % args.keep_every == 0:
                save(args.out / f"ckpt-{state.step:07}.pt", state)
            if stop:
                barrier()                                  # until the first process has written it
                print0(f"stopped by signal {stop} after step {state.step:,}; the same command resumes {path}")
                exit_now(128 + stop)
            # draw
            if args.sample_every and state.step % args.sample_every == 0 and not last:
                if RANK == 0:
                    draw(args, state, f"samples-{state.step:07}.png")
                barrier()                                  # the others' wait does not count as training
                log.restart()
    except (FileError, OSError, RuntimeError) as error:
        # expected failures save first: a damaged image, a lost process, a closed terminal
        with suppress(UserError, RuntimeError):
            # but when a loading process dies, a step may be half done: do not save
            step_is_whole = "DataLoader worker (pid" not in str(error)
            if step_is_whole and state.step > saved and not log.bad_in_a_row:
                save(path, state)
        raise
    on_signals(signal.SIG_DFL)                             # all is saved: nothing can be lost from here on
    if RANK == 0:
        written = draw(args, state, "samples.png")
        print0(f"done in {timedelta(seconds=int(time.perf_counter() - began))}. Look at {written}; "
               f"more samples: python sample.py {path} --seed 1 --out more.png")

# ---- What training changes, and its checkpoints ------------------------------------------------------------

class State:
    """What a checkpoint contains: a KDiff, its optimizer, its averages (KDiffs too) at the decays of
    config["ema"], the Codec of the data, the config, the names of the classes, the number of steps
    taken and of those skipped."""

    def __init__(self, kdiff, codec, config, classes):
        self.kdiff = kdiff
        self.codec = codec
        self.config = config
        self.classes = classes
        self.step = 0
        self.skipped = 0
        self.averages = {}
        for decay in config["ema"]:
            self.averages[str(decay)] = copy.deepcopy(kdiff).eval().requires_grad_(False)
        self.parameters = [p for p in kdiff.parameters() if p.requires_grad]
        of_net = set(kdiff.net.parameters())
        groups = [{"of_net": True, "params": [p for p in self.parameters if p in of_net]}]
        others = [p for p in self.parameters if p not in of_net]           # w, which has a rate of its own
        if others:
            groups.append({"of_net": False, "params": others})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

def save(path, state):
    """Write a checkpoint, whole or not at all. UserError if a number in it is not finite."""
    # every process looks, so that all of them stop
    weights = state.kdiff.state_dict()
    averages = {decay: average.state_dict() for decay, average in state.averages.items()}
    for numbers in (weights, *averages.values(), *state.optimizer.state.values()):
        finite = all(number.isfinite().all() for number in numbers.values() if torch.is_tensor(number))
        require(finite, f"the weights after step {state.step} are not finite: {path} is as before; "
                "try a lower --lr")
    if RANK == 0:
        data = codec_state(state.codec, state.config.get("tokenizer")) | {"classes": state.classes}
        checkpoint = {"model": weights, "ema": averages, "optimizer": state.optimizer.state_dict()}
        checkpoint |= {"step": state.step, "skipped": state.skipped, "data": data, "config": state.config}
        with new_file(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:                  # torch's own for a full disk
                raise OSError(str(error)) from error

def resume(args, state):
    """Load the run's checkpoint, if any, into the state. UserError that names what differs."""
    path = args.out / "ckpt.pt"
    if not path.exists():
        return
    file = read_tensors(path, mmap=state.parameters[0].is_cuda)          # many processes share one copy
    # what must be the same, then what may change and is told
    before, config = file.get("config"), state.config
    require(isinstance(before, dict), f"{path}: no checkpoint of a run; name another --out or remove it")
    for key in FIXED:
        require(before.get(key) == config[key],
                f"--out {args.out} contains a run with {key} {before.get(key)}, not {config[key]}: "
                f"name another --out, or remove it (--init {path} starts from its weights)")
    require(before.get("init") or not args.init, f"--out {args.out} contains a run that did not start from "
            f"--init {args.init}: name another --out")
    config["init"], config["k_of_theory"] = before.get("init"), before.get("k_of_theory")
    for key in sorted({*before, *config} - {"out", "data", "preset", "cfg_given", "k_given", "label_shape"}):
        if before.get(key) != config.get(key):
            print0(f"resuming with {key} {config.get(key)}, before: {before.get(key)}")
    with reading(path, "a checkpoint of this version", "; name another --out or remove it"):
        state.kdiff.load_state_dict(file["model"])
        for decay, average in state.averages.items():
            average.load_state_dict(file["ema"][decay])
        state.optimizer.load_state_dict(file["optimizer"])
        state.step, state.skipped = file["step"], file["skipped"]
        data = file["data"]
    state.codec = open_codec(data, vavae_file(args))
    print0(f"resuming from {path} at step {state.step:,}")

def start_from(args, config, kdiff, codec, classes):
    """Load the weights of --init, ours or published, and return the codec that belongs to them. The
    w of another target and the embeddings of other classes are left out. Fixed tables are computed
    for this run's sizes."""
    file, _, weights = read_checkpoint(args.init)
    source, kept = file["config"], file["data"]
    name = f"--init {args.init}"
    require(source["model"] == args.model, f"{name} contains a {source['model']}, not a {args.model}")
    # what of the weights does not fit this run is left out, and told
    left_out = [f"net.{table}" for table in TABLES]
    require(bool(source.get("components")) == config["components"],
            f"{name}: one of the two has principal components as channels, the other pixels")
    if args.k_given or source["target"] != args.target:
        left_out.append("w")
        print0(f"{name} predicts {source['target']}, this run {args.target}: w, if it has one, is left out")
    if source["shape"] != config["shape"]:
        print0(f"{name} is for x of {source['shape']}, this run for {config['shape']}: positions are new")
    known = kept["classes"]
    same = known == classes
    if "data_fingerprint" not in source:                   # a published file has numbers, not names
        same = len(known) == len(classes)
    if not same:
        left_out.append("net.y_embedder.embedding_table.weight")
        print0(f"{name} has {len(known)} classes, which are not these {len(classes)}: labels start again")
    # weights belong to the statistics that they were trained with
    if kept.get("mean") is not None or kept.get("pca"):
        codec = open_codec(kept, vavae_file(args))
        print0(f"{name} brings its statistics of the data: they are kept")
    weights = {key: value for key, value in weights.items() if key not in left_out}
    with reading(args.init, f"a {args.model} for these data"):
        kdiff.load_state_dict(kdiff.state_dict() | weights)
    return codec

def vavae_file(args):
    """The VA-VAE that --tokenizer names, if any."""
    if args.tokenizer != "pca":
        return args.tokenizer

# ---- Settings: a flag, else the preset's value -------------------------------------------------------------

def parse(argv=None):
    """The command line after its preset. argv: a list of words; None: the program's."""
    if argv is None:
        argv = sys.argv[1:]
    parser = new_parser(__doc__, FLAGS)
    parser.set_defaults(space="pixel", data="shapes", flip=True)
    # parse twice: first for space and preset, then with the preset's flags before yours
    typed = parser.parse_args(argv)
    preset = typed.preset or choose_preset(typed)
    args = parser.parse_args(preset_flags(preset, typed.space) + argv)
    args.preset = preset
    args.cfg_given = typed.cfg is not None
    args.k_given = typed.k_start is not None
    try:
        kdiff = KDiff(None, args.target, num_classes=0, loss=args.loss, channels=VAVAE.channels)
    except ValueError as error:
        raise UserError(f"--target: {error}") from error
    # flags without effect are refused; your --epochs replaces the preset's --steps
    for name in ("k_start", "k_lr"):
        require(kdiff.w is not None or getattr(typed, name) is None,
                f"--{name} has no effect on --target {args.target}, where nothing is learned")
    require(typed.steps is None or typed.epochs is None, "--epochs has no effect next to --steps")
    if typed.epochs is not None:
        args.steps = None
    fill_in(args, kdiff)
    return args

def choose_preset(args):
    """The preset that fits the data and the size."""
    # built in: a preset of the same name, if there is one
    if args.data in DATASETS:
        if args.data in PRESETS:
            return args.data
        return "demo"
    # a path, and a size of the paper or a named model
    if args.model or args.image_size in (None, 256, 512):
        return "paper"
    # your own pictures, large or small
    if args.image_size >= 64:
        return "small"
    return "laptop"

def preset_flags(preset, space):
    """The flags of a preset, as words, from the column of a space."""
    column = {"latent": slice(20, 44), "pixel": slice(44, None)}[space]
    words = []
    for row in PRESETS[preset].splitlines():
        name, values = row[:20].split(), row[column].split()
        if name and values != ["-"]:
            words += name + values
    return words

def fill_in(args, kdiff):
    """Set what follows from other flags. UserError for what cannot work. kdiff: one with
    this target, without a network."""
    latent = args.space == "latent"
    require(latent or not args.tokenizer, "--tokenizer has no effect in pixel space")
    if not args.model:
        args.model = {256: "JiT-B/16", 512: "JiT-B/32"}.get(args.image_size)
        require(args.model, f"--image_size {args.image_size} has no network in Table 4: "
                "try --preset small, or name one, such as --model JiT-B/16")
    if args.model in SIZES:                                # no patch named: 8 patches a side
        patch = math.ceil(args.image_size / 8)
        require(args.image_size == 8 * patch,
                f"--image_size {args.image_size} is no multiple of 8: try {8 * patch}, or name a patch that "
                f"divides it, such as --model {args.model}/1")
        args.model += f"/{patch}"
    require(not (args.qk_norm and args.model.startswith("JiT")),
            "--qk_norm has no effect on JiT, which has it always")
    # what Table 4 leaves open: tau in latents, the noise of pixels
    c, d = kdiff.coefficients(torch.tensor([0.0, 1.0]))    # Delta is c at t = 0 and -d at t = 1
    if c[0].all() and d[1].all():
        fill(args, tau=0.0)
    fill(args, tau=0.05, noise_scale=args.image_size / 256)
    require(args.k_start == "data" or re.fullmatch(r"0?\.(?!0+$)\d{1,3}", args.k_start),
            f"--k_start {args.k_start}: data, or a number from 0.001 to 0.999 of at most three digits")
    check_interval(args.interval)
    require(all(0 < decay < 1 for decay in args.ema), f"--ema {args.ema}: decays are between 0 and 1")
    require(args.label_drop < 1, f"--label_drop {args.label_drop}: a probability below 1 is needed")
    require(args.label_drop or not args.cfg_given or args.cfg == 1,
            f"--cfg {args.cfg} has no effect with --label_drop 0: guidance needs images without a label")
    require(args.steps or args.epochs, "--epochs 0: there is nothing to do")
    require(args.noise_scale and args.t_std, "--noise_scale and --t_std must be above 0")
    require(args.tau or c[0].all(),
            f"--tau 0 with --target {args.target} divides by 0 at t = 0: try --tau 0.05")

def fill(args, **values):
    """Set the flags that were not given."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)

def open_data(args):
    """The dataset that --data names. UserError if it does not fit the other flags."""
    data = open_dataset(args.data, args.image_size)
    data.flips = data.flips and args.flip
    args.flip = data.flips
    data.seed = args.seed
    latents = data.mean is not None
    _, height, width = data[0][0].shape
    size = height
    if latents:
        size = height * VAVAE.factor
    require(size == args.image_size, f"--data {args.data}: its items need --image_size {size}")
    require(args.space == "latent" or not latents,
            f"--data {args.data} contains latents: pass --space latent")
    require(latents or args.space == "pixel" or args.tokenizer == "pca",
            f"--data {args.data} contains images: pass --tokenizer pca, or run "
            f"`python data.py encode {args.data} --tokenizer FILE --image_size {args.image_size} "
            "--out latents` and pass --data latents")
    return data

def make_codec(args, data):
    """The Codec between the dataset and the network's x. The latents of images are
    principal components."""
    # latents in files, which bring their statistics
    if data.mean is not None:
        file, vavae = vavae_file(args), None
        if file:
            vavae = open_vavae(file)
            require(data.shape[0] == VAVAE.channels,
                    f"--data {args.data}: {data.shape[0]} channels, --tokenizer has {VAVAE.channels}")
        codec = Codec(vavae, data.mean, data.std)
        std = codec.encode(some_items(data, 64)).std().item()
        require(0.5 < std < 2, f"--data {args.data}: std {std:.2f}, not about 1: statistics of other latents")
        return codec
    # pixels as they are, unless the target has one k for each component
    components = target_row(args.target)[0] == "C"
    if args.space == "pixel" and not components:
        return Codec()
    # principal components of patches, fitted to what training sees: mirrored, too
    require(data[0][0].shape[0] == 3, f"--data {args.data}: principal components need RGB pictures")
    patch = "8"
    if args.space == "pixel":
        patch = args.model.rpartition("/")[2]
    require(patch.isdecimal() and args.image_size % max(int(patch), 1) == 0,
            f"--model {args.model}: a patch that divides --image_size {args.image_size} is needed")
    patch = int(patch)
    images = Codec().encode(some_items(data))
    if data.flips:
        images = torch.cat([images, images.flip(-1)])
    if args.space == "pixel":              # all components, orthonormal: noise stays white, nothing is lost
        return Codec(PatchPCA.fit(images, patch, 3 * patch ** 2))
    # a latent is the strongest components, each scaled to variance 1
    pca = PatchPCA.fit(images, patch, 16)
    std, mean = torch.std_mean(pca.encode(images), (0, 2, 3), keepdim=True)
    kept = int((std > 0.01).sum())         # the others are the rounding of pixels to 256 levels
    require(kept, f"--data {args.data}: its pictures are all alike: there is nothing to learn")
    if kept < 16:
        print0(f"latents   {kept} of 16 channels, for the others hardly vary")
    return Codec(PatchPCA(pca.mean, pca.basis[:, :kept]), mean[:, :kept], std[:, :kept])

def make_config(args, data, codec, device):
    """Fill in what depends on data and machine. Returns the config: all that made a run, as
    plain values."""
    share = args.batch_size // WORLD
    require(args.batch_size % WORLD == 0, f"--batch_size {args.batch_size} does not divide over {WORLD} "
            f"processes: try {max(share, 1) * WORLD}")
    # the largest micro batch that divides the share of a process
    most = min(share, args.micro_batch or 128)
    fits = next(m for m in range(most, 0, -1) if share % m == 0)
    require(args.micro_batch in (None, fits),
            f"--micro_batch {args.micro_batch} of {share} images: try {fits}")
    # a run of minutes is too short for loading processes and a compiler to pay off
    if args.preset not in ("paper", "small"):
        fill(args, workers=0, compile=False, samples=64)
    elif device.type == "cuda":
        fill(args, compile=True, samples=64)
    fill(args, workers=min(8, CORES), compile=False, samples=8)
    fill(args, micro_batch=fits, dtype=fastest_dtype(device),
         steps=max(1, round(args.epochs * len(data) / args.batch_size)))
    # what the run must remember beside its flags
    shape = codec.encode(data[0][0][None])[0].shape
    config = vars(args) | {"shape": list(shape), "num_classes": len(data.classes), "processes": WORLD}
    config["components"] = args.space == "pixel" and codec.tokenizer is not None
    config["data_fingerprint"] = data.fingerprint()
    config["label_shape"] = list(torch.as_tensor(data[0][1]).shape)      # longer for captions
    if not args.cfg_given and (len(data.classes) == 1 or args.label_drop == 0):
        config["cfg"] = 1.0                                # there is nothing to guide away from
    # where it writes: not among the pictures that it reads
    words = [args.space, Path(args.data).resolve().stem, args.target]
    name = "-".join(word for word in words if word not in ("shapes", "k"))
    args.out = Path(args.out or f"out/{name}")
    config["out"] = str(args.out)
    keep_outside(args.out, args.data)
    return config

def start_of_k(args, config, data, codec):
    """Print the k that the data foretell. Returns where k starts: there, or where --k_start says."""
    shape = config["shape"]
    each = target_row(args.target)[0] == "C"
    k = torch.zeros(shape[0] if each else 1)               # 0: nothing is foretold
    if RANK == 0:
        x = codec.encode(some_items(data))
        try:
            k = k_of_innovation(x, args.t_mean, args.t_std, args.noise_scale, together=not each)
        except ValueError as error:
            print0(f"theory    none: {error}")
        else:
            nearest = ("eps", "v", "x")[round(2 * k.mean().item())]             # at 0, 1/2, 1
            print0(f"theory    k {k.mean():.3f} from {len(x):,} pictures; "
                   f"of fixed targets {nearest} is nearest")
            if each:
                print0(f"theory    k of the channels from {k.min():.3f} to {k.max():.3f}")
    all_reduce(k)                                          # zeros elsewhere: all get the first one's k
    config["k_of_theory"] = k.mean().item()
    if args.k_start != "data":
        return float(args.k_start)
    require(k.min() > 0, f"--k_start data: --data {args.data} foretells no k")
    if each:
        return k.view(-1, 1, 1)
    return k[0]

def describe(args, config, kdiff, data):
    """Print the settings in force and what they amount to."""
    params = sum(p.numel() for p in kdiff.net.parameters())
    per_epoch = len(data) / args.batch_size
    hidden = "out steps epochs dry_run cfg_given k_given k_of_theory label_shape".split()
    settings = [f"{key}={value}" for key, value in config.items() if value is not None and key not in hidden]
    print0("settings  " + "  ".join(settings))
    cost = gmacs(kdiff.net, config["shape"], config["label_shape"])
    print0(f"network   {args.model}: {params / 1e6:,.1f}M parameters, {cost:.2f} billion multiply-adds an "
           "image and forward")
    print0(f"steps     {args.steps:,} = {args.steps / per_epoch:,.2f} epochs of {per_epoch:,.1f} steps")
    average = default_average(map(str, args.ema), args.steps)
    print0(f"pictures  from the weights' average {average} (the longest that has forgotten the start; "
           f"if none has, the weights themselves); guidance {config['cfg']}")
    print0(f"writes to {args.out}")

def estimate(args, config, kdiff):
    """Print how long the run would take here, from forward and backward passes of a few images."""
    parameter = next(kdiff.net.parameters())
    device = parameter.device
    # so few images that a pass takes about a second: its cost is proportional to their number
    cost = 6 * gmacs(kdiff.net, config["shape"], config["label_shape"])  # billions of operations an image
    n = min(args.micro_batch, max(1, int(50 / cost)))
    x = torch.randn(n, *config["shape"], device=device)
    cores = watch_cores()
    end = time.perf_counter() + 6                          # long enough for watch_cores() to act
    while time.perf_counter() < end:
        start = time.perf_counter()
        with autocast(device, args.dtype):
            loss = kdiff(x, torch.zeros(n, *config["label_shape"], dtype=torch.long, device=device))
        loss.backward()
        parameter.grad.sum().item()                        # waits for the device
        seconds = (time.perf_counter() - start) / n * args.batch_size / WORLD
        if device.type == "cpu":
            next(cores)
    print0(f"time      {seconds:.3g} s a step here (a share of {n} images timed, not compiled), "
           f"{seconds * args.steps / 3600:.3g} hours in all, without loading and pictures")

# ---- Around the loop ---------------------------------------------------------------------------------------

def batches(data, args, start, device):
    """(batch, labels) of this process for the steps left, in an order that the step alone decides."""
    steps = batch_indices(len(data), args.batch_size, args.seed, start, args.steps, RANK, WORLD)
    return torch.utils.data.DataLoader(
        data, batch_sampler=steps, num_workers=args.workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals)

def ignore_signals(worker):
    """A loading process ends with its parent, not with the signal that asks the parent to save first."""
    on_signals(signal.SIG_IGN)

def watch_cores():
    """Call next() after each step on the CPU. Threads spin while they wait for each other. So if other
    programs leave them less than 0.7 of their cores, one thread fewer is faster: this reduces
    their number by one."""
    while True:
        began, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < 2:
            yield
        cores = (time.process_time() - used) / (time.perf_counter() - began)
        threads = torch.get_num_threads()
        if threads > 1 and cores < 0.7 * threads:
            torch.set_num_threads(threads - 1)
            print0(f"other programs left {cores:.1f} of {threads} cores: one thread less from now")

class Log:
    """Lines on the screen and in log.csv. A resumed run first drops the rows that it will write again."""

    def __init__(self, path, state, args, data):
        self.path = path
        self.state = state
        self.args = args
        self.per_epoch = len(data) / args.batch_size
        self.bad_in_a_row = 0
        self.good = []
        self.restart()
        if RANK == 0:
            rows = []
            if state.step and path.exists():
                rows = read_rows(path)
            with reading(path, "a log that can be continued"):
                rows = [row for row in rows if int(row["step"]) <= state.step]
            columns = ["step", "epoch", "loss", *state.kdiff.ks(), "lr", "grad", "img_per_s", "skipped"]
            write_rows(path, columns, rows)

    def restart(self):
        """Count time and steps from here."""
        self.written = self.state.step
        self.since = time.perf_counter()
        self.cores = watch_cores()

    def add(self, loss, norm):
        """Note a step. Its norm is not finite if it was skipped."""
        if not self.state.parameters[0].is_cuda:
            next(self.cores)
        if math.isfinite(norm):
            self.bad_in_a_row = 0
            self.good.append((loss, norm))
        else:
            self.bad_in_a_row += 1

    def write(self, lr):
        """The mean of the steps since the last line, over all processes."""
        state, args = self.state, self.args
        # the means over the steps that were not skipped
        means = torch.tensor(self.good or [(math.nan, math.nan)]).mean(0) / WORLD
        loss, grad = all_reduce(means).tolist()            # a mean of means: all count the same steps
        self.good = []
        speed = (state.step - self.written) * args.batch_size / (time.perf_counter() - self.since)
        self.written = state.step
        self.since = time.perf_counter()
        left = timedelta(seconds=int((args.steps - state.step) * args.batch_size / speed))
        epoch = state.step / self.per_epoch
        # a line on the screen; its columns for k are those that the target has
        ks = {name: k.item() for name, k in state.kdiff.ks().items()}
        shown = " | ".join(f"{name} {k:.3f}" for name, k in ks.items())
        line = (f"step {state.step:,}/{args.steps:,} | epoch {epoch:.1f} | loss {loss:.4f} | {shown} "
                f"| lr {lr:.1e} | grad {grad:.2f} | {speed:,.0f} img/s | eta {left}")
        if state.skipped:
            line += f" | skipped {state.skipped}"
        print0(line)
        if RANK == 0:
            row = {"step": state.step, "epoch": epoch, "loss": loss, **ks, "lr": lr, "grad": grad}
            row |= {"img_per_s": speed, "skipped": state.skipped}
            append_row(self.path, {name: f"{value:.10g}" for name, value in row.items()})

def draw(args, state, name):
    """Draw samples of the default average, and curves of the log. Returns the paths, as a text."""
    written = f"{args.out / 'curves.png'}"
    if args.samples and state.codec.can_decode:
        # a row for each of the first eight classes
        rows = min(8, len(state.classes), args.samples)
        average = default_average(state.averages, state.step)
        kdiff = state.averages.get(average, state.kdiff).eval()
        checkpoint = Checkpoint(kdiff, state.codec, state.config, state.classes, state.step, average)
        images = checkpoint.sample(range(rows), math.ceil(args.samples / rows), steps=25, dtype=args.dtype)
        state.kdiff.train()
        save_picture(grid(images, state.classes[:rows]), args.out / name)
        written = f"{args.out / name}, {written}"
    # k next to what the data have foretold
    ks = {name: read_log(args.out, name) for name in state.kdiff.ks()}
    theory = state.config.get("k_of_theory")
    if theory:
        ks["theory"] = [0, state.step], [theory, theory]
    draw_curves([{"loss": read_log(args.out, "loss")}, ks], args.out / "curves.png")
    return written

if __name__ == "__main__":
    run(main)
