# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "matplotlib>=3.9", "pillow>=10.1", "tqdm>=4.66"
# ]
# ///
"""The first GAN, on MNIST: two fully connected networks, and handwritten digits in minutes.

A generator turns noise into images; a discriminator tells images of the data set from the
generator's. They are trained in turn. The discriminator learns to answer 1 for real images and 0
for fake ones, which is ordinary classification. The generator learns to make the discriminator
answer 1 for its images: its gradient comes through the discriminator, and shows it, pixel by pixel,
what would look more real. It never sees a real image itself. As one gets better, the other has to;
while both do, neither loss goes to zero, and the pictures, not the losses, say how far they are.

Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661. Different here: noise
that chooses one of ten kinds of image, BatchNorm, LeakyReLU instead of maxout with dropout, Adam,
and samples from an average of the generator's weights.

    python mlp_gan_mnist.py --epochs 25              train; everything goes to outputs/mlp_gan_mnist
    python mlp_gan_mnist.py --epochs 50 --resume     go on with that run, up to 50 epochs in all
    python mlp_gan_mnist.py --generate 64 --seed 1   generate 64 digits of other noise
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
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

SCRIPT = Path(__file__).stem
BETA2 = 0.999  # Adam's
AVERAGE_DECAY = 10  # weights are averaged over about the latest 1/10 of the steps
KINDS = 10  # of generated image: as many as there are digits; no labels are used
# they brought the Frechet distance from 0.86 to 0.24; the paper's plain generator has no `+ KINDS`,
# and its forward is `return self.network(noise)`

# ---- networks


class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) into images (n, 1, 28, 28) in [-1, 1].

    The largest of the noise's first ten values chooses one of ten kinds of image. A network is
    continuous: from noise alone it also makes shapes between two digits (arXiv:1806.00880).
    """

    def __init__(self, latent_dim=100, width=256):
        super().__init__()
        self.latent_dim = latent_dim
        self.width = width
        self.network = nn.Sequential(
            nn.Linear(latent_dim + KINDS, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, 28 * 28),
            nn.Tanh(),
            nn.Unflatten(1, (1, 28, 28)),
        )

    def forward(self, noise):
        kinds = noise[:, :KINDS].argmax(dim=1)
        one_hot = F.one_hot(kinds, KINDS).to(noise.dtype)
        # as long as the noise: a weaker signal would hardly be used, as no loss asks for kinds
        return self.network(torch.cat((noise, self.latent_dim**0.5 * one_hot), dim=1))


class Discriminator(nn.Module):
    """Turns images (n, 1, 28, 28) into logits (n,): above 0 for real, below 0 for fake."""

    def __init__(self, width=256):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Linear(2 * width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    def forward(self, images):
        logits = self.network(images).view(len(images))
        return logits.float()  # under autocast they are bf16: the loss is computed in fp32


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

    def __init__(self, generator, discriminator, lr=5e-4, beta1=0.5, bf16=False):
        adam = {"lr": lr, "betas": (beta1, BETA2), "fused": True}
        self.generator = generator.train()
        self.discriminator = discriminator.train()
        self.average = copy.deepcopy(generator).requires_grad_(False).eval()
        self.optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
        self.bf16 = bf16
        self.steps = 0

    def step(self, real):
        """Train on real images (n, 1, 28, 28) in [-1, 1]; return loss_d, loss_g: (2,)."""
        self.steps += 1
        noise = torch.randn(len(real), self.generator.latent_dim, device=real.device)
        autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=self.bf16)

        # discriminator: 1 for real images, 0 for the generator's
        with autocast:
            fake = self.generator(noise)
            real_logits = self.discriminator(real)
            fake_logits = self.discriminator(fake.detach())  # not to train the generator
        loss_d = discriminator_loss(real_logits, fake_logits)
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        # generator: the updated discriminator should answer 1 for the same images
        with autocast:
            fake_logits = self.discriminator(fake)
        loss_g = generator_loss(fake_logits)
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
            sample(self.average, torch.randn(batch_size, self.average.latent_dim))
        self.average.eval()


def train_epoch(gan, images, epoch, args):
    """Train on the images once, in random full batches; return rows for losses.csv."""
    order = torch.randperm(len(images), device=images.device)
    batches = order.split(args.batch_size)[: len(images) // args.batch_size]
    rows = []
    losses = []  # since the last row
    for i, indices in enumerate(progress(batches, f"Epoch {epoch}/{args.epochs}"), 1):
        real = images[indices] / 127.5 - 1  # to [-1, 1], as the generator gives
        losses.append(gan.step(real))
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
    images = load_images(args.data_dir).to(args.device)  # in memory, as bytes: no DataLoader
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
    fixed_noise = torch.randn(64, args.latent_dim)  # for every grid: one can watch a digit form
    save_grid(images[:64] / 255, folder / "real.png")
    save_grid(sample(gan.average, fixed_noise), folder / f"samples/epoch_{done:04}.png")
    save_losses(history, folder)  # now: a broken matplotlib stops the run before it trains

    for epoch in progress(range(done + 1, args.epochs + 1), "Epochs"):
        # a checkpoint brings the rates it was saved with; a schedule would go here, too
        for optimizer in (gan.optimizer_g, gan.optimizer_d):
            optimizer.param_groups[0].update(lr=args.lr, betas=(args.beta1, BETA2))
        # a seed for each epoch, so that a resumed run draws the same
        torch.manual_seed(10_000 * args.seed + epoch)
        history += train_epoch(gan, images, epoch, args)
        save_grid(sample(gan.average, fixed_noise), folder / f"samples/epoch_{epoch:04}.png")
        save_losses(history, folder)
        save_generator(gan.average, folder / "generator.pt")
        if epoch % 10 == 0:
            save_generator(gan.average, folder / f"weights/epoch_{epoch:04}.pt")
        save_checkpoint(gan, epoch, history, args)  # last: an epoch without it is trained again
    save_animation(folder)
    print(f"Finished: all is in {folder}; --generate generates more")


# ---- data and samples


def load_images(folder):
    """Return MNIST's training images, uint8 (60000, 1, 28, 28); download them if need be."""
    raw = f"{folder}/MNIST/raw"
    hint = f"delete {raw} to download it again, or put its four *-ubyte.gz files there"
    with explain(f"can't read or download MNIST: {hint}"):
        return datasets.MNIST(folder, download=True).data.unsqueeze(1)


@torch.no_grad()
def sample(generator, noise):
    """Turn normal noise (n, latent_dim) into images (n, 1, 28, 28) in [0, 1]."""
    device = next(generator.parameters()).device
    return (generator(noise.to(device)) + 1) / 2


def load_generator(path, device="cpu"):
    """Return the generator saved in `path`, in eval mode; UsageError if there is none."""
    with explain(f"{path} holds no generator of {SCRIPT}.py: train one, or name one by --weights"):
        saved = torch.load(path, device, weights_only=True)  # from PyTorch 2.10 on, runs no code
        weights = saved.pop("generator")
        with torch.device("meta"):  # a wrong size in the file takes no memory
            generator = Generator(**saved)  # another script's file has other arguments
        generator.load_state_dict(weights, assign=True)
    return generator.float().eval()


def generate(args):
    """Generate args.generate images into one PNG and print its path."""
    weights = args.weights or args.output_dir / "generator.pt"
    generator = load_generator(weights, args.device)
    torch.manual_seed(args.seed)
    noise = torch.randn(args.generate, generator.latent_dim)
    path = args.output_dir / f"{weights.stem}_seed_{args.seed}.png"
    save_grid(sample(generator, noise), path)
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
    """Save a generator as load_generator reads it: its arguments and its weights."""
    weights = generator.state_dict()
    save({"latent_dim": generator.latent_dim, "width": generator.width, "generator": weights}, path)


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


def make_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    count = between(int, 1, 10**6)
    rate = between(float, 0, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--epochs", type=count, default=25, help="passes over the training images (%(default)s)")
    two_up = between(int, 2, 10**6)  # BatchNorm needs two images
    add("--batch-size", type=two_up, default=64, help="images in a step (%(default)s)")
    # at 1e-3, the digits were less varied after 25 epochs
    add("--lr", type=rate, default=5e-4, help="Adam's learning rate (%(default)s)")
    add("--beta1", type=rate, default=0.5, help="Adam's beta1 (%(default)s)")
    add("--latent-dim", type=count, default=100, help="noise values of an image (%(default)s)")
    # 10,000 times the seed, and an epoch, have to fit the CPU generator's 32 bits
    add("--seed", type=between(int, 0, 400_000), default=0, help="random seed (%(default)s)")
    add("--device", default=device, help="cpu, cuda, cuda:1, mps (%(default)s)")
    bf16 = "compute in bf16 (default: where it's fast; with --resume, as the run began)"
    add("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    add("--data-dir", type=Path, default="data", help="where downloads go (%(default)s)")
    add("--output-dir", type=Path, default=f"outputs/{SCRIPT}", help="for all else (%(default)s)")
    add("--log-every", type=count, default=500, help="steps between loss lines (%(default)s)")
    add("--width", type=count, default=256, help="units of the smallest hidden layer (%(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on with the output folder's run")
    mode.add_argument("--generate", type=count, metavar="N", help="draw N images")
    add("--weights", type=Path, help="generator for --generate (the output folder's)")
    return parser


def parse_args(argv):
    """Return the command line's arguments; with --resume, the defaults are the run's own."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.weights and not args.generate:
        parser.error("--weights goes with --generate")
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
