"""A column of the log of several runs as curves in one picture.

    python examples/curves.py k k.png out/pixel out/latent
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sample import draw_curves, read_log

def main(column, out, *runs):
    """Draw a column of log.csv, such as k or loss."""
    draw_curves([{f"{column} {Path(run).name}": read_log(run, column) for run in runs}], out)

if __name__ == "__main__":
    main(*sys.argv[1:])
