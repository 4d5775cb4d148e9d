# SPDX-License-Identifier: MIT
"""Make the README's picture of a run: samples after each of some epochs, a row each, and real ones.

    python .github/figures/strip.py dcgan_mnist.py 1 2 5 10 25 50

takes the first row of the grids in outputs/dcgan_mnist, or the diagonal of a conditional script's,
which has an image of each class and of each noise, and writes .github/pictures/dcgan_mnist.png.
With --animate it writes a GIF of the grids instead; a conditional script's are cut after their
fifth column.
"""

import argparse
import importlib
import sys
from pathlib import Path

from PIL import Image, ImageDraw

LEFT = 80  # pixels, for the rows' names
TOP = 18  # for the classes'
BORDER = 2  # between two images


def cut(grid, columns, size, conditional):
    """Yield a grid's first row, or the diagonal, in squares of `size` pixels."""
    left = grid.width - columns * size - BORDER  # what the class names take
    for i in range(columns):
        x, y = (i, i) if conditional else (i, 0)
        yield grid.crop((left + x * size, y * size, left + (x + 1) * size, (y + 1) * size))


def strip(grids, columns, size, classes):
    """Return one picture of grids by name, a row each."""
    top = TOP if classes else 0
    picture = Image.new("RGB", (LEFT + columns * size, top + len(grids) * size), "white")
    draw = ImageDraw.Draw(picture)
    for column, name in enumerate(classes):
        place = (LEFT + (column + 0.5) * size, TOP / 2)
        draw.text(place, name, "black", anchor="mm", font_size=10)
    for row, (name, grid) in enumerate(grids.items()):
        place = (LEFT - 8, top + (row + 0.5) * size)
        draw.text(place, name, "black", anchor="rm", font_size=14)
        for column, image in enumerate(cut(grid, columns, size, bool(classes))):
            picture.paste(image, (LEFT + column * size, top + row * size))
    return picture


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("epochs", type=int, nargs="+")
    parser.add_argument("--output-dir", type=Path, help="of the run (default: outputs/SCRIPT)")
    parser.add_argument("--animate", action="store_true")
    args = parser.parse_args()

    sys.path.insert(0, str(args.script.parent))
    name = args.script.stem
    script = importlib.import_module(name)
    folder = args.output_dir or Path("outputs", name)
    classes = getattr(script, "CLASSES", [])
    columns = len(classes) or 8
    size = BORDER + (64 if name == "cgan_cifar10" else 56)
    files = {f"epoch {epoch}": f"samples/epoch_{epoch:04}.png" for epoch in args.epochs}
    if not args.animate:
        files["real"] = "real.png"
    grids = {row: Image.open(folder / file).convert("RGB") for row, file in files.items()}

    path = Path(__file__).parent.parent / "pictures" / name
    if args.animate:
        first = next(iter(grids.values()))
        width = first.width - 5 * size if classes else first.width
        frames = [grid.crop((0, 0, width, first.height)) for grid in grids.values()]
        durations = [400] * (len(frames) - 1) + [2000]  # milliseconds
        path = path.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    else:
        path = path.with_suffix(".png")
        strip(grids, columns, size, classes).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
