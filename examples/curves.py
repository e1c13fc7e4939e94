"""A column of several tables as curves in one picture: of the log of a run, or of a fid.csv.

    python examples/curves.py k k.png out/pixel out/latent
    python examples/curves.py pixel_distance d.png out/pixel/fid.csv
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import run
from sample import draw_curves, read_rows

def main(column, out, *paths):
    """Draw a column against the steps. A path is a table, or the folder of a run with its log.csv."""
    curves = {}
    for path in map(Path, paths):
        if path.is_dir():
            path = path / "log.csv"
        rows = sorted(read_rows(path), key=lambda row: int(row["step"]))
        steps = [float(row["step"]) for row in rows]
        curves[f"{column} {path.parent}"] = steps, [float(row[column]) for row in rows]
    draw_curves([curves], out)

if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
