"""Train several targets with several seeds, sample and measure each run, and print one table.

    python examples/compare.py out/pixel-1000 k "k --k_start data" x v --space pixel --steps 1000
    python examples/compare.py out/cells k "k --loss x" "x --loss eps" --space pixel --steps 300 --seeds 1

First the folder, then the variants: a target, and perhaps more flags of train.py. Then the flags that all
runs share, --seeds (default 3) and --n, the number of samples (500). A run with a distance.txt is finished
and only read: other flags need another folder. A loss in the table is a mean over 20 steps; "last" over 100.
"""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from sample import read_log

def call(script, *words):
    """Run a script of the repository, with the targets of rows.py. Returns what it printed."""
    command = [sys.executable, HERE / "rows.py", script, *words]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{script} failed: {done.stdout}")
    return done.stdout

def train_and_measure(out, variant, seed, data, n, shared):
    """One run: train, draw n samples, and measure their distance to the training pictures."""
    once = "--samples 0 --sample_every 0 --save_every 1000000".split()      # a checkpoint at the end
    call("train.py", "--data", data, *shared, "--target", *variant.split(), "--seed", seed, *once, "--out", out)
    call("sample.py", out / "ckpt.pt", "--n", n, "--steps", 25, "--out", out / "s.npz")
    reference = out.parent / f"{Path(data).name}.npz"
    if not reference.exists():
        call("fid.py", "--make_ref", data, "--image_size", 32, "--out", reference, "--features", "pixels")
    distance = call("fid.py", out / "s.npz", reference, "--features", "pixels")
    (out / "distance.txt").write_text(distance)

def numbers(out):
    """A run's columns of the table. None where the run is too short."""
    steps, losses = read_log(out, "loss")
    at = dict(zip(steps, losses))
    last = statistics.mean(loss for step, loss in at.items() if step > steps[-1] - 100)
    distance = float((out / "distance.txt").read_text().split()[2])
    return at.get(100), at.get(300), last, read_log(out, "k")[1][-1], distance

def cell(values, digits):
    """Mean and standard deviation over the seeds."""
    if None in values:
        return "-"
    std = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=500)
    args, shared = parser.parse_known_args()
    print("| variant | loss at 100 | at 300 | last 100 | k | distance |\n|" + "---|" * 6)
    for variant in args.variants:
        runs = [args.folder / f"{variant.replace(' ', '-')}-{seed}" for seed in range(args.seeds)]
        for seed, out in enumerate(runs):
            if not (out / "distance.txt").exists():
                train_and_measure(out, variant, seed, args.data, args.n, shared)
        columns = zip(zip(*map(numbers, runs)), (4, 4, 4, 3, 2))
        print("|", " | ".join([variant, *(cell(*column) for column in columns)]), "|", flush=True)
