# SPDX-License-Identifier: MIT
"""Make the README's picture of a run: samples after each of some epochs, a row each, and real ones.

    python .github/figures/strip.py dcgan_mnist.py 1 2 5 10 25 50

takes the first row of the grids in outputs/dcgan_mnist, or, of a conditional script's, an image of
each class, always of the same noise, and writes .github/pictures/dcgan_mnist.png.
"""

import argparse
import importlib
import sys
from pathlib import Path

from PIL import Image, ImageDraw

LEFT = 80  # pixels, for the rows' names
TOP = 18  # for the classes'
FONT = {"fill": "black", "font_size": 14}
SMALL = {"fill": "black", "font_size": 10}


def cut(path, columns, size, conditional):
    """Return a grid's first row, or the first image of each row, in squares of `size` pixels."""
    grid = Image.open(path).convert("RGB")
    left = grid.width - columns * size - 2  # class names
    for i in range(columns):
        x, y = (0, i) if conditional else (i, 0)
        yield grid.crop((left + x * size, y * size, left + (x + 1) * size, (y + 1) * size))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("epochs", type=int, nargs="+")
    parser.add_argument("--output-dir", type=Path, help="of the run (default: outputs/SCRIPT)")
    args = parser.parse_args()

    sys.path.insert(0, str(args.script.parent))
    script = importlib.import_module(args.script.stem)
    folder = args.output_dir or Path("outputs", script.SCRIPT)
    classes = getattr(script, "CLASSES", [])
    columns = len(classes) or 8
    size = 66 if script.SCRIPT == "cgan_cifar10" else 58
    rows = {f"epoch {epoch}": f"samples/epoch_{epoch:04}.png" for epoch in args.epochs}
    rows["real"] = "real.png"

    top = TOP if classes else 0
    picture = Image.new("RGB", (LEFT + columns * size, top + len(rows) * size), "white")
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(classes):
        place = (LEFT + (column + 0.5) * size, TOP / 2)
        draw.text(place, name, anchor="mm", **SMALL)
    for row, (name, path) in enumerate(rows.items()):
        draw.text((LEFT - 8, top + (row + 0.5) * size), name, anchor="rm", **FONT)
        for column, image in enumerate(cut(folder / path, columns, size, bool(classes))):
            picture.paste(image, (LEFT + column * size, top + row * size))
    path = Path(__file__).parent.parent / f"pictures/{script.SCRIPT}.png"
    picture.save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
