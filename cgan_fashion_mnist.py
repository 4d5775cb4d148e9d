# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "matplotlib>=3.9", "pillow>=10.1", "tqdm>=4.66"
# ]
# ///
"""Conditional DCGAN on Fashion-MNIST: name a class of clothes, and the generator generates it.

Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784, with
convolutional networks after arXiv:1511.06434. Different here: a discriminator with a logit for each
class (compare arXiv:1802.05637) instead of the label as an input, real images under wrong labels
as fakes (arXiv:1605.05396), and samples from an average of the generator's weights.

    python cgan_fashion_mnist.py --epochs 50             train, into outputs/cgan_fashion_mnist
    python cgan_fashion_mnist.py --epochs 80 --resume    go on with that run, up to 80 epochs in all
    python cgan_fashion_mnist.py --generate 25 --label sneaker    generate 25 sneakers
"""

import argparse
import contextlib
import copy
import csv
import math
import os
import re
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

SCRIPT = Path(__file__).stem
CLASSES = datasets.FashionMNIST.classes  # names by label
BETA2 = 0.999  # Adam's
AVERAGE_DECAY = 10  # weights are averaged over about the latest 1/10 of the steps
LABEL_SCALE = 3  # one-hot labels are multiplied by it: classes become clear sooner
WRONG_SHARE = 1 / 8  # of the real images; with more wrong labels, clearer but less varied classes
WRONG_STEPS = 10_000  # the share falls from 1 by 1 / WRONG_STEPS a step: clear classes early
NAME_WIDTH = 100  # pixels for the classes' names beside a grid: about 12 letters
NAME_SIZE = 15  # pixels

# ---- networks


class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) and labels (n,) into images (n, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=64, width=32):
        super().__init__()
        self.latent_dim = latent_dim
        self.width = width
        self.network = nn.Sequential(
            # a transposed convolution over a 1x1 image is this matrix product, only slower
            nn.Linear(latent_dim + len(CLASSES), 4 * width * 7 * 7, bias=False),
            nn.Unflatten(1, (4 * width, 7, 7)),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),  # 14x14
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),  # 28x28
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Hardtanh(),  # nn.Tanh hardly reaches pure black and white
        )

    def forward(self, noise, labels):
        one_hot = F.one_hot(labels, len(CLASSES))
        return self.network(torch.cat((noise, LABEL_SCALE * one_hot), dim=1))


class Discriminator(nn.Module):
    """Turns images (n, 1, 28, 28) into logits (n, 10): above 0 for a real one of that class."""

    def __init__(self, width=32):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),  # 14x14
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # 7x7
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 4 * width, 7),  # 1x1: a fully connected layer
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, len(CLASSES), 1),
        )

    def forward(self, images):
        logits = self.network(images).view(len(images), len(CLASSES))
        return logits.float()  # under autocast they are bf16: the loss is computed in fp32


def pick(logits, labels):
    """Return each image's logit for its label: (n,), from logits (n, classes), labels (n,)."""
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def other_labels(labels):
    """Return a random wrong label for each of labels (n,): (n,), or (0,) if there is one class."""
    if len(CLASSES) == 1:
        return labels[:0]
    return (labels + torch.randint_like(labels, 1, len(CLASSES))) % len(CLASSES)


def initialize_weights(layer):
    """Draw a layer's weights from normal(0, 0.02), as the DCGAN paper does; for `network.apply`."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)


# ---- losses: arXiv:1406.2661, of logits: a sigmoid that rounds to 0 or 1 passes no gradient


def discriminator_loss(real_logits, fake_logits):
    """Return -mean log D(real) - mean log(1 - D(fake)); D is the sigmoid of logits (n,), (m,)."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake


def generator_loss(fake_logits):
    """Return the mean of -log D(fake) over logits (n,): the non-saturating loss."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# ---- training


class GAN:
    """Both networks, their optimizers, and the averaged generator that draws the samples."""

    def __init__(self, generator, discriminator, lr=1e-3, beta1=0.5, bf16=False):
        # channels_last: faster convolutions; before Adam's first step, which copies the layout
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)
        adam = {"lr": lr, "betas": (beta1, BETA2), "fused": True}
        self.generator = generator.train()
        self.discriminator = discriminator.train()
        self.average = copy.deepcopy(generator).requires_grad_(False).eval()
        self.optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
        self.bf16 = bf16
        self.steps = 0

    def step(self, real, labels):
        """Train on real images (n, 1, 28, 28) in [-1, 1], labels (n,); return loss_d, loss_g: (2,).

        Real images also count as fake, under random wrong labels (arXiv:1605.05396): at step 1
        nearly all, later fewer.
        """
        self.steps += 1
        noise = torch.randn(len(real), self.generator.latent_dim, device=real.device)
        wrong = other_labels(labels)
        autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=self.bf16)

        # discriminator: 1 for real images, 0 for the generator's and real ones under wrong labels
        with autocast:
            fake = self.generator(noise, labels)
            real_logits = self.discriminator(real)
            fake_logits = self.discriminator(fake.detach())  # not to train the generator
        share = max(WRONG_SHARE, 1 - self.steps / WRONG_STEPS)
        mislabelled = pick(real_logits, wrong)[: max(1, int(share * len(real)))]
        negatives = torch.cat((pick(fake_logits, labels), mislabelled))
        loss_d = discriminator_loss(pick(real_logits, labels), negatives)
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        # generator: the updated discriminator should answer 1 for the same images
        with autocast:
            fake_logits = self.discriminator(fake)
        loss_g = generator_loss(pick(fake_logits, labels))
        self.optimizer_g.zero_grad()
        loss_g.backward(inputs=list(self.generator.parameters()))  # not the discriminator's: faster
        self.optimizer_g.step()
        self.update_average()
        return torch.stack((loss_d, loss_g)).detach()

    def update_average(self):
        """Average the generator's weights over about the latest 1/AVERAGE_DECAY of the steps.

        The latest weights swing with the discriminator's; their average draws better images
        (arXiv:1806.04498). Polynomial decay: Shamir and Zhang 2013, arXiv:1212.1824.
        """
        parameters = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, latest in parameters:
            average.lerp_(latest.detach(), weight=AVERAGE_DECAY / (self.steps + AVERAGE_DECAY))

    def update_bn(self, batch_size, batches=50):
        """Give the average's BatchNorm layers the statistics of what the average generates."""
        self.average.train()  # so that BatchNorm collects them
        for _ in range(batches):
            labels = torch.randint(len(CLASSES), (batch_size,))
            sample(self.average, torch.randn(batch_size, self.average.latent_dim), labels)
        self.average.eval()


def train_epoch(gan, images, labels, epoch, args):
    """Train on the images once, in random full batches; return rows for losses.csv."""
    order = torch.randperm(len(images), device=images.device)
    batches = order.split(args.batch_size)[: len(images) // args.batch_size]
    rows = []
    losses = []  # since the last row
    for i, indices in enumerate(progress(batches, f"Epoch {epoch}/{args.epochs}"), 1):
        real = images[indices] / 127.5 - 1  # to [-1, 1], as the generator gives
        losses.append(gan.step(real, labels[indices]))
        if i % args.log_every == 0 or i == len(batches):
            loss_d, loss_g = torch.stack(losses).mean(dim=0).tolist()
            if not math.isfinite(loss_d + loss_g):
                raise UsageError(f"a loss is not finite by step {gan.steps}: lower --lr")
            line = f"Generator loss: {loss_g:.3f}, discriminator loss: {loss_d:.3f}"
            tqdm.write(f"Step {gan.steps}: {line}")
            sys.stdout.flush()  # for whoever watches a log file
            rows.append((epoch - 1 + i / len(batches), gan.steps, loss_d, loss_g))
            losses = []
    gan.update_bn(args.batch_size)
    return rows


def progress(items, title):
    """Return the items behind a progress bar, which a log file doesn't get."""
    return tqdm(items, title, leave=False, disable=None, file=sys.stdout)


def train(args):
    """Train from the start, or with --resume from the last finished epoch."""
    folder = args.output_dir
    images, labels = load_images(args.data_dir)
    images = images.to(args.device)  # in memory, as bytes: no DataLoader
    labels = labels.to(args.device)
    if args.batch_size > len(images):
        raise UsageError(f"--batch-size {args.batch_size}: there are only {len(images)} images")

    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width)
    discriminator = Discriminator(args.width)
    for network in (generator, discriminator):
        network.apply(initialize_weights).to(args.device)
    gan = GAN(generator, discriminator, args.lr, args.beta1, args.bf16)
    done, history = load_checkpoint(gan, args.checkpoint) if args.resume else (0, [])
    print(f"{args.device}, {'bf16' if args.bf16 else 'fp32'}, to {folder}", flush=True)

    torch.manual_seed(args.seed)  # once more: --generate as many draws the last grid
    fixed_noise = torch.randn(10, args.latent_dim)  # for every grid: one can watch images form
    # ten real images of each class; those of a class with fewer are repeated
    first = [(labels == label).nonzero()[:, 0].repeat(10)[:10] for label in range(len(CLASSES))]
    save_rows(images[torch.cat(first)] / 255, folder / "real.png")
    save_samples(gan.average, fixed_noise, folder / f"samples/epoch_{done:04}.png")
    save_losses(history, folder)  # now: a broken matplotlib stops the run before it trains

    for epoch in progress(range(done + 1, args.epochs + 1), "Epochs"):
        # a checkpoint brings the rates it was saved with; a schedule would go here, too
        for optimizer in (gan.optimizer_g, gan.optimizer_d):
            optimizer.param_groups[0].update(lr=args.lr, betas=(args.beta1, BETA2))
        # a seed for each epoch, so that a resumed run draws the same
        torch.manual_seed(10_000 * args.seed + epoch)
        history += train_epoch(gan, images, labels, epoch, args)
        save_samples(gan.average, fixed_noise, folder / f"samples/epoch_{epoch:04}.png")
        save_losses(history, folder)
        save_generator(gan.average, folder / "generator.pt")
        if epoch % 10 == 0:
            save_generator(gan.average, folder / f"weights/epoch_{epoch:04}.pt")
        save_checkpoint(gan, epoch, history, args)  # last: an epoch without it is trained again
    save_animation(folder)
    print(f"Finished: all is in {folder}; --generate generates more")


# ---- data and samples


def load_images(folder):
    """Return Fashion-MNIST's training images, uint8 (60000, 1, 28, 28), and labels (60000,)."""
    raw = f"{folder}/FashionMNIST/raw"
    hint = f"delete {raw} to download it again, or put its four *-ubyte.gz files there"
    with explain(f"can't read or download Fashion-MNIST: {hint}"):
        dataset = datasets.FashionMNIST(folder, download=True)
        return dataset.data.unsqueeze(1), dataset.targets


@torch.no_grad()
def sample(generator, noise, labels):
    """Turn normal noise (n, latent_dim) and labels (n,) into images (n, 1, 28, 28) in [0, 1]."""
    device = next(generator.parameters()).device
    return (generator(noise.to(device), labels.to(device)) + 1) / 2


def load_generator(path, device="cpu"):
    """Return the generator saved in `path`, in eval mode; UsageError if there is none."""
    with explain(f"{path} holds no generator of {SCRIPT}.py: train one, or name one by --weights"):
        saved = torch.load(path, device, weights_only=True)  # from PyTorch 2.10 on, runs no code
        weights = saved.pop("generator")
        if saved.pop("classes") != CLASSES:
            raise ValueError("other classes")
        with torch.device("meta"):  # a wrong size in the file takes no memory
            generator = Generator(**saved)  # another script's file has other arguments
        generator.load_state_dict(weights, assign=True)
    return generator.float().eval()


def generate(args):
    """Generate args.generate images of a class, or of each, into one PNG and print its path."""
    weights = args.weights or args.output_dir / "generator.pt"
    generator = load_generator(weights, args.device)
    torch.manual_seed(args.seed)
    noise = torch.randn(args.generate, generator.latent_dim)
    path = args.output_dir / f"{weights.stem}_seed_{args.seed}.png"
    if args.label is None:
        save_samples(generator, noise, path)
    else:
        name = re.sub(r"\W", "_", CLASSES[args.label])
        path = path.with_stem(f"{path.stem}_{name}")
        save_grid(sample(generator, noise, torch.full((args.generate,), args.label)), path)
    print(path)


# ---- files


class UsageError(Exception):
    """An error that the user can put right: main prints it as one line."""


@contextlib.contextmanager
def explain(message):
    """Raise any error in the block as a UsageError of one line: `message` and that error."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise UsageError(f"{message} ({reason})") from error


def save(state, path):
    """Save a state with torch.save, so that `path` never holds half a file."""
    temporary = path.with_suffix(".tmp")
    with explain(f"can't write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, temporary)
        os.replace(temporary, path)


def save_grid(images, path, columns=None):
    """Save images (n, C, H, W) in [0, 1] as a PNG of twice their size, by default as a square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or math.ceil(math.sqrt(len(images)))
    save_image(F.interpolate(images, scale_factor=2), path, nrow=columns, pad_value=0.5)


def save_rows(images, path):
    """Save images as a grid with a row for each class, its name beside it."""
    save_grid(images, path, len(images) // len(CLASSES))
    picture = ImageOps.expand(Image.open(path), (NAME_WIDTH, 0, 0, 0), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(CLASSES):
        place = (NAME_WIDTH, (row + 0.5) * picture.height / len(CLASSES))
        draw.text(place, f"{name} ", "black", anchor="rm", font_size=NAME_SIZE)
    picture.save(path)


def save_samples(generator, noise, path):
    """Save a grid with a row of generated images for each class, all rows of the same noise."""
    labels = torch.arange(len(CLASSES)).repeat_interleave(len(noise))
    images = sample(generator, noise.repeat(len(CLASSES), 1), labels)
    save_rows(images, path)


def save_animation(folder):
    """Save samples.gif of the sample grids."""
    grids = map(Image.open, sorted(folder.glob("samples/epoch_*.png")))  # opened one by one
    first = next(grids)
    first.save(folder / "samples.gif", save_all=True, append_images=grids, duration=200, loop=0)


def save_losses(history, folder):
    """Save losses.csv and its plot."""
    with open(folder / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("epoch", "step", "discriminator_loss", "generator_loss"))
        writer.writerows(history)

    if "inline" in os.environ.get("MPLBACKEND", "") and not find_spec("matplotlib_inline"):
        del os.environ["MPLBACKEND"]  # a notebook's, which its `!uv run` inherits but can't load
    from matplotlib import style
    from matplotlib.figure import Figure

    epochs, _, losses_d, losses_g = zip(*history, strict=True) if history else [()] * 4
    with style.context("default"):  # a user's style may need LaTeX
        figure = Figure(layout="constrained")
        axes = figure.add_subplot(title=SCRIPT, xlabel="epoch", ylabel="loss")
        axes.plot(epochs, losses_d, label="discriminator")
        axes.plot(epochs, losses_g, label="generator")
        axes.legend()
        figure.savefig(folder / "losses.png")


def save_generator(generator, path):
    """Save a generator as load_generator reads it: its arguments, classes and weights."""
    arguments = {"latent_dim": generator.latent_dim, "width": generator.width, "classes": CLASSES}
    save({**arguments, "generator": generator.state_dict()}, path)


# ---- resuming a run

PARTS = ["generator", "discriminator", "average", "optimizer_g", "optimizer_d"]


def save_checkpoint(gan, epoch, history, args):
    """Save all that --resume needs."""
    # numbers and bools are the run's settings; paths and the device may be others next time
    flags = {name: value for name, value in vars(args).items() if isinstance(value, (int, float))}
    states = {name: getattr(gan, name).state_dict() for name in PARTS}
    checkpoint = {"flags": flags, "epoch": epoch, "history": history, **states}
    save(checkpoint, args.output_dir / "checkpoint.pt")


def load_checkpoint(gan, checkpoint):
    """Put a checkpoint's states into `gan`; return the epochs done and the rows of losses.csv."""
    with explain("the checkpoint is of another script, --width or --latent-dim"):
        for name in PARTS:
            getattr(gan, name).load_state_dict(checkpoint[name])
        gan.steps = checkpoint["history"][-1][1]
        return checkpoint["epoch"], checkpoint["history"]


# ---- command line


def between(convert, low, high):
    """Return an argparse type: an int or a float from `low` to below `high`."""

    def number(text):
        value = convert(text)
        if not low <= value < high:  # NaN is refused too
            raise argparse.ArgumentTypeError(f"must be at least {low} and below {high}")
        return value

    return number


def find_label(text):
    """Return the label that `text` means: a name, a number or a name's beginning, in any case."""
    text = text.lower()
    names = [name.lower() for name in CLASSES]
    if text in names:
        return names.index(text)
    if text in map(str, range(len(CLASSES))):
        return int(text)
    found = [label for label, name in enumerate(names) if name.startswith(text)]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} doesn't say which of {', '.join(CLASSES)}")
    return found[0]


def make_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count = between(int, 1, 10**6)
    rate = between(float, 0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--epochs", type=count, default=50, help="passes over the training images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images in a step (%(default)s)")
    # the DCGAN paper has batches of 128 and lr 2e-4; here 1e-3 was better than 5e-4 from the start
    add("--lr", type=rate, default=1e-3, help="Adam's learning rate (%(default)s)")
    add("--beta1", type=rate, default=0.5, help="Adam's beta1 (%(default)s)")
    add("--latent-dim", type=count, default=64, help="noise values of an image (%(default)s)")
    # 10,000 times the seed, and an epoch, have to fit the CPU generator's 32 bits
    add("--seed", type=between(int, 0, 400_000), default=0, help="random seed (%(default)s)")
    add("--device", default=device, help="cpu, cuda, cuda:1, mps (%(default)s)")
    bf16 = "compute in bf16 (default: where it's fast; with --resume, as the run began)"
    add("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    add("--data-dir", type=Path, default="data", help="where downloads go (%(default)s)")
    add("--output-dir", type=Path, default=f"outputs/{SCRIPT}", help="for all else (%(default)s)")
    add("--log-every", type=count, default=500, help="steps between loss lines (%(default)s)")
    add("--width", type=count, default=32, help="channels of the narrowest layer (%(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on with the output folder's run")
    mode.add_argument("--generate", type=count, metavar="N", help="draw N images of each class")
    add("--label", type=find_label, help="the one class to draw: a number, name or its beginning")
    add("--weights", type=Path, help="generator for --generate (the output folder's)")
    return parser


def parse_args(argv):
    """Return the command line's arguments; with --resume, the defaults are the run's own."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.weights or args.label is not None) and not args.generate:
        parser.error("--weights and --label go with --generate")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("torchrun is for cgan_cifar10.py: here, each process would train alone")
    path = args.output_dir / "checkpoint.pt"
    if args.resume:
        with explain(f"{path} holds no run to go on with: start one in another --output-dir"):
            checkpoint = torch.load(path, "cpu", weights_only=True)
            parser.set_defaults(**checkpoint["flags"], checkpoint=checkpoint)
        args = parser.parse_args(argv)
    elif not args.generate and any(args.output_dir.glob("*.pt")):
        resume = "--resume, or " if path.exists() else ""
        raise UsageError(f"{args.output_dir} holds *.pt: {resume}name another --output-dir")
    with explain(f"can't compute on --device {args.device}"):
        device = torch.zeros(1, device=args.device).device
    if args.bf16 is None:
        args.bf16 = bf16_is_fast(device)
    return args


def bf16_is_fast(device):
    """Return whether bf16 is fast: CUDA cards from Ampere on, CPUs with AMX, AMD's from Zen 4."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")  # Linux's: on other systems, CPUs compute in fp32
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    # Intel's AVX-512 alone was measured to be slower in bf16 than in fp32
    fast = re.search("amx_bf16|AuthenticAMD.*avx512_bf16", text, re.DOTALL)
    return device.type == "cpu" and fast is not None


def main(argv=None):
    """Run a command line (default: the process's)."""
    try:
        args = parse_args(argv)
        if args.generate:
            generate(args)
        else:
            train(args)
    except (UsageError, OSError) as error:
        # without `from None`, IPython 8 would fail to show it
        raise SystemExit(f"{SCRIPT}: error: {error}") from None


def excepthook(kind, error, traceback):
    """Print a line for Ctrl-C and a traceback for all else, as sys.excepthook."""
    if kind is KeyboardInterrupt:
        print("stopped; --resume goes on after the last finished epoch, if any", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if __name__ == "__main__":
    sys.excepthook = excepthook  # Python still dies of SIGINT, so that a shell's loop stops, too
    main()
