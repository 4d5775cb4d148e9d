# SPDX-License-Identifier: MIT
"""Conditional DCGAN on Fashion-MNIST: name a class of clothes, and the generator generates it.

Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784, with
convolutional networks as in arXiv:1511.06434. Different here: a discriminator with a logit for each
class (compare arXiv:1802.05637) instead of the label as an input, some real images under wrong
labels as fakes (arXiv:1605.05396), and samples from an average of the generator's weights.

    python cgan_fashion_mnist.py --epochs 50             train, into outputs/cgan_fashion_mnist
    python cgan_fashion_mnist.py --epochs 80 --resume    go on with that run, up to 80 epochs in all
    python cgan_fashion_mnist.py --generate 25 --label sneaker    generate 25 sneakers
"""

import argparse
import contextlib
import copy
import io
import math
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

CLASSES = datasets.FashionMNIST.classes  # names by label

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
            nn.Tanh(),
        )

    def forward(self, noise, labels):
        one_hot = F.one_hot(labels, len(CLASSES))
        return self.network(torch.cat((noise, one_hot), dim=1))


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
            # fully connected, 7x7 to 1x1; nn.Linear would first need channels_last undone
            nn.Conv2d(4 * width, 4 * width, 7),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, len(CLASSES), 1),
        )

    def forward(self, images):
        logits = self.network(images).view(len(images), len(CLASSES))
        return logits.float()  # under autocast they are bf16: too coarse for the loss


def pick(logits, labels):
    """Return each image's logit for its label: (n,), from logits (n, classes), labels (n,)."""
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)


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

    PARTS = ["generator", "discriminator", "average", "optimizer_g", "optimizer_d"]

    def __init__(self, generator, discriminator, lr=1e-3, beta1=0.5, bf16=False):
        # for faster convolutions; always, or fused Adam would mix up the values of a loaded state
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)
        adam = {"lr": lr, "betas": (beta1, 0.999), "fused": True}
        self.generator = generator
        self.discriminator = discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False).eval()
        self.optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
        self.bf16 = bf16

    def step(self, real, labels):
        """Train on real images (n, 1, 28, 28) in [-1, 1], labels (n,); return loss_d, loss_g: (2,).

        Every eighth real image also counts as fake under a random wrong label: arXiv:1605.05396.
        """
        noise = torch.randn(len(real), self.generator.latent_dim, device=real.device)
        wrong = (labels + torch.randint_like(labels, 1, len(CLASSES))) % len(CLASSES)
        autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=self.bf16)

        # discriminator: 1 for real images, 0 for the generator's and real ones under wrong labels
        with autocast:
            fake = self.generator(noise, labels)
            real_logits = self.discriminator(real)
            fake_logits = self.discriminator(fake.detach())  # not to train the generator
        mislabelled = pick(real_logits, wrong)[::8]  # with more, classes are clearer but narrower
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
        loss_g.backward(inputs=list(self.generator.parameters()))  # not the discriminator's
        self.optimizer_g.step()
        return torch.stack((loss_d, loss_g)).detach()

    def update_average(self, weight):
        """Set each averaged weight w to (1 - weight) * w + weight * the generator's."""
        parameters = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, live in parameters:
            average.lerp_(live.detach(), weight)

    def update_statistics(self, batch_size, batches=50):
        """Give the average's BatchNorm layers the statistics of what the average generates."""
        self.average.train()  # so that BatchNorm collects them
        for _ in range(batches):
            sample(self.average, torch.randint(len(CLASSES), (batch_size,)))
        self.average.eval()

    def state_dict(self):
        """Return the state of the networks and optimizers, by name."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state):
        """Load a state_dict, but keep this GAN's learning rate."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for optimizer in (self.optimizer_g, self.optimizer_d):
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"]


def train_epoch(gan, images, labels, epoch, seconds_before, args):
    """Train on every full batch once and print how it goes; return rows for losses.csv."""
    start = time.perf_counter() - seconds_before  # as if training had never paused
    n_images = len(images) // args.batch_size * args.batch_size  # full batches
    order = torch.randperm(len(images), device=images.device)[:n_images]
    batches = order.split(args.batch_size)
    rows = []
    losses = []
    logged = 0  # batches
    # disable=None: no bar in a log file
    progress = tqdm(batches, f"Epoch {epoch}/{args.epochs}", leave=False, disable=None)
    for i, indices in enumerate(progress, 1):
        step = (epoch - 1) * len(batches) + i
        real = images[indices] / 127.5 - 1  # to [-1, 1], as Tanh gives
        losses.append(gan.step(real, labels[indices]))
        gan.update_average(weight=10 / (step + 10))  # the average: mostly of the latest tenth

        if i % args.log_every == 0 or i == len(batches):
            row = make_row(epoch, step, losses[logged:], start)
            check_finite(gan, row)
            rows.append(row)
            logged = i
        if i % args.log_every == 0:
            report_step(row)
    seconds = rows[-1]["seconds"] - seconds_before
    report_epoch(epoch, args.epochs, mean_losses(losses), seconds, n_images)
    gan.update_statistics(args.batch_size)
    return rows


def train(args):
    """Train from the start, or with --resume from the last finished epoch."""
    images, labels = load_images(args.data_dir)
    images = images.to(args.device)  # all of them, as bytes: no DataLoader
    labels = labels.to(args.device)
    if args.batch_size > len(images):
        raise UsageError(f"--batch-size {args.batch_size}: there are only {len(images)} images")
    gan = build_gan(args)
    done = 0
    rows = []
    if args.resume:
        done, rows = load_checkpoint(gan, len(images), args)
    start_outputs(gan, images, labels, rows, done, args)
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        seconds_before = rows[-1]["seconds"] if rows else 0.0
        rows += train_epoch(gan, images, labels, epoch, seconds_before, args)
        save_checkpoint(gan, rows, len(images), args)  # first: --resume makes outputs again
        save_outputs(gan, rows, epoch, args)
    save_animation(args.output_dir, rows[-1]["epoch"])
    print(f"Finished: all is in {args.output_dir}; --generate generates more")


def build_gan(args):
    """Return a new GAN on args.device, its random weights governed by args.seed."""
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width)
    discriminator = Discriminator(args.width)
    for network in (generator, discriminator):
        network.apply(initialize_weights)
        network.to(args.device)
    bf16 = args.precision == "bf16"
    if args.precision == "auto":
        bf16 = bf16_is_fast(torch.device(args.device))
    return GAN(generator, discriminator, args.lr, args.beta1, bf16)


def bf16_is_fast(device):
    """Return whether bf16 is fast: CUDA cards from Ampere on, CPUs with AMX, AMD's from Zen 4."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = torch.cpu.get_capabilities()
    # in Intel's CPUs without AMX, AVX-512's bf16 was measured to be slower than fp32
    avx512 = cpu.get("avx512_bf16", False) and cpu.get("cpu_name", "").startswith("AMD")
    return device.type == "cpu" and (avx512 or cpu.get("amx_bf16", False))


def mean_losses(losses):
    """Return the means of losses [(2,), ...] as floats."""
    return torch.stack(losses).mean(dim=0).tolist()


def make_row(epoch, step, losses, start):
    """Return a row for losses.csv, with the means of the losses since the row before."""
    mean_d, mean_g = mean_losses(losses)
    return {
        "epoch": epoch,
        "step": step,
        "discriminator_loss": mean_d,
        "generator_loss": mean_g,
        "seconds": round(time.perf_counter() - start, 3),
    }


def check_finite(gan, row):
    """Raise UsageError if training has diverged."""
    loss = row["discriminator_loss"] + row["generator_loss"]
    weights = gan.generator.parameters()
    if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in weights)):
        raise UsageError(f"a loss or weight is not finite at step {row['step']}: lower --lr")


def report_step(row):
    """Print a step's line."""
    tqdm.write(
        f"Step {row['step']}: Generator loss: {row['generator_loss']:.3f}, "
        f"discriminator loss: {row['discriminator_loss']:.3f}"
    )


def report_epoch(epoch, epochs, losses, seconds, n_images):
    """Print an epoch's line: its mean losses, its seconds, its pace, and the time that is left."""
    left = timedelta(seconds=round(seconds * (epochs - epoch)))
    mean_d, mean_g = losses
    print(
        f"Epoch {epoch}/{epochs}: generator loss {mean_g:.3f}, "
        f"discriminator loss {mean_d:.3f}, {seconds:.1f} s, "
        f"{n_images / seconds:,.0f} images/s, {left} left",
        flush=True,
    )


# ---- data


def load_images(folder):
    """Return Fashion-MNIST's training images, uint8 (60000, 1, 28, 28), and labels (60000,)."""
    source = datasets.FashionMNIST.mirrors[0]
    files = ", ".join(name for name, _ in datasets.FashionMNIST.resources)
    with explain(
        f"no usable Fashion-MNIST in {folder}/FashionMNIST/raw: delete that folder to download it "
        f"again, or put there, from {source}, {files}"
    ):
        dataset = datasets.FashionMNIST(folder, train=True, download=True)
    return dataset.data.unsqueeze(1), dataset.targets


# ---- sampling


@torch.no_grad()
def sample(generator, labels):
    """Turn labels (n,) into images (n, 1, 28, 28) in [0, 1]; torch.manual_seed governs which."""
    device = next(generator.parameters()).device
    noise = torch.randn(len(labels), generator.latent_dim).to(device)  # the same on any device
    labels = torch.as_tensor(labels, device=device)
    return (generator(noise, labels) + 1) / 2


def sample_rows(generator, labels, n, seed):
    """Generate n images of each label, of the same noise for each: (len(labels) * n, C, H, W)."""
    rows = []
    for label in labels:
        torch.manual_seed(seed)
        rows.append(sample(generator, [label] * n))
    return torch.cat(rows)


def load_generator(path, device="cpu"):
    """Return the generator saved in `path`, in eval mode; UsageError if there is none."""
    saved = load_file(path)
    with explain(f"{path} holds no generator of {SCRIPT}.py"):
        if saved["classes"] != CLASSES:
            raise ValueError("other classes")
        with torch.device("meta"):  # a wrong size in the file fails before memory is taken
            generator = Generator(saved["latent_dim"], saved["width"])
        generator.load_state_dict(saved["generator"], assign=True)
    generator.to(device, memory_format=torch.channels_last)
    return generator.eval()


def generate(args):
    """Generate args.generate images of a class, or of each, into one PNG and print its path."""
    generator = load_generator(args.weights or args.output_dir / "generator.pt", args.device)
    if args.label is None:
        labels = range(len(CLASSES))
        names = CLASSES
        columns = args.generate
        title = "every_class"
    else:
        labels = [args.label]
        names = []
        columns = math.ceil(math.sqrt(args.generate))
        title = re.sub(r"\W", "_", CLASSES[args.label])
    images = sample_rows(generator, labels, args.generate, args.seed)
    path = args.output_dir / f"generated_{title}_seed_{args.seed}.png"
    save_grid(path, images, columns, names)
    print(path)


# ---- files

SCRIPT = Path(__file__).stem
MAX_FRAMES = 60
NAME_WIDTH = 100  # pixels for class names beside a grid: about 12 letters


class UsageError(Exception):
    """An error that the user can put right: main prints it as one line and exits with 2."""


@contextlib.contextmanager
def explain(message):
    """Raise any error in the block as a UsageError of one line: `message` and that error."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{message} ({reason})") from error


@contextlib.contextmanager
def atomic_open(path):
    """Yield a file in memory; then move it to `path`, which never holds half a file."""
    content = io.BytesIO()
    yield content
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with explain(f"can't write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def start_outputs(gan, images, labels, rows, done, args):
    """Print the setup; save real images and, should they be missing, the last epoch's outputs."""
    precision = "bf16" if gan.bf16 else "fp32"
    print(f"{args.device}, {precision}, {len(images)} images, to {args.output_dir}", flush=True)
    shown = [(labels == label).nonzero()[:10, 0] for label in range(len(CLASSES))]
    real = images[torch.cat(shown)] / 255
    save_grid(args.output_dir / "real.png", real, columns=10, names=CLASSES)
    save_outputs(gan, rows, done, args)


def save_outputs(gan, rows, epoch, args):
    """Save an epoch's sample grid and, if it isn't epoch 0, the losses and the generator."""
    folder = args.output_dir
    save_samples(gan.average, folder / f"samples/epoch_{epoch:04}.png", args.seed)
    if epoch == 0:
        return
    save_losses(rows, folder)
    plot_losses(rows, folder)
    save_weights(gan.average, folder / "generator.pt")
    if epoch % args.save_every == 0:
        save_weights(gan.average, folder / f"weights/epoch_{epoch:04}.pt")


def save_grid(path, images, columns, names=()):
    """Save images (n, C, H, W) in [0, 1] as a PNG of twice their size, `names` beside its rows."""
    images = F.interpolate(images.cpu(), scale_factor=2)
    margin = NAME_WIDTH if names else 0
    grid = F.pad(make_grid(images, columns, pad_value=0.5), (margin, 0), value=1.0)
    picture = to_pil_image(grid)
    for row, name in enumerate(names):
        middle = (row + 0.5) * picture.height / len(names)
        place = (NAME_WIDTH - 8, middle)
        ImageDraw.Draw(picture).text(place, name, "black", anchor="rm", font_size=15)
    with atomic_open(path) as file:
        picture.save(file, "PNG")


def save_samples(generator, path, seed):
    """Save a row of generated images for each class, always of the same noise."""
    images = sample_rows(generator, range(len(CLASSES)), 10, seed)
    save_grid(path, images, columns=10, names=CLASSES)


def save_animation(folder, last_epoch):
    """Save samples.gif of at most MAX_FRAMES sample grids, leaving out any that can't be read."""
    epochs = torch.linspace(0, last_epoch, MAX_FRAMES).round().int().unique()
    frames = []
    for epoch in epochs.tolist():
        path = folder / f"samples/epoch_{epoch:04}.png"
        # damaged files raise nearly anything
        with contextlib.suppress(Exception), Image.open(path) as picture:
            frames.append(picture.copy())
    durations = [200] * (len(frames) - 1) + [2000]  # milliseconds
    with atomic_open(folder / "samples.gif") as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )


def save_losses(rows, folder):
    """Save losses.csv."""
    table = [rows[0].keys(), *(row.values() for row in rows)]
    with atomic_open(folder / "losses.csv") as file:
        for line in table:
            file.write(f"{','.join(map(str, line))}\n".encode())


def plot_losses(rows, folder):
    """Save losses.png, losses.csv's plot over epochs."""
    steps_per_epoch = rows[-1]["step"] / rows[-1]["epoch"]
    epochs = [row["step"] / steps_per_epoch for row in rows]
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(title=SCRIPT, xlabel="epoch", ylabel="loss")
    for name in ("discriminator", "generator"):
        axes.plot(epochs, [row[f"{name}_loss"] for row in rows], label=name)
    axes.legend()
    with atomic_open(folder / "losses.png") as file:
        figure.savefig(file, format="png")


def save_weights(generator, path):
    """Save a generator as load_generator reads it: its classes, its sizes and its weights."""
    saved = {
        "classes": CLASSES,
        "latent_dim": generator.latent_dim,
        "width": generator.width,
        "generator": generator.state_dict(),
    }
    with atomic_open(path) as file:
        torch.save(saved, file)


def save_checkpoint(gan, rows, n_images, args):
    """Save all that --resume needs."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    checkpoint = {"settings": settings, "rows": rows, "images": n_images, "gan": gan.state_dict()}
    with atomic_open(args.output_dir / "checkpoint.pt") as file:
        torch.save(checkpoint, file)


def load_file(path):
    """Return what torch.save wrote to `path`, but run no code hidden in it."""
    if not os.path.exists(path):
        raise UsageError(f"there is no {path}; `python {SCRIPT}.py` trains a generator")
    with explain(f"{path} can't be read"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(gan, n_images, args):
    """Put the saved state into `gan`; return how many epochs are done, and their rows."""
    path = args.output_dir / "checkpoint.pt"
    saved = load_file(path)
    with explain(f"{path} doesn't fit these networks"):
        gan.load_state_dict(saved["gan"])
        rows = saved["rows"]
        done = int(rows[-1]["epoch"])
        n_images_then = int(saved["images"])
    if n_images_then != n_images:
        raise UsageError(f"{path} is of {n_images_then} images; {args.data_dir} holds {n_images}")
    return done, rows


# ---- command line

FIXED = ["batch_size", "beta1", "latent_dim", "width", "seed"]  # --resume can't change them
SETTINGS = [*FIXED, "epochs", "lr", "precision", "log_every", "save_every"]
MAX_SEED = 400_000  # 10_000 * seed + epoch has to fit the 32 bits that torch's CPU generator takes


def between(convert, low, high):
    """Return an argparse type: an int or a float from `low` to `high`."""

    def number(text):
        value = convert(text)
        if not low <= value <= high:  # NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


def find_label(text):
    """Return the label that `text` means: a number, a name or the beginning of one, in any case."""
    text = text.lower()
    names = [name.lower() for name in CLASSES]
    if text in names:
        return names.index(text)
    found = [i for i, name in enumerate(names) if text == str(i) or name.startswith(text)]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} doesn't say which of {', '.join(CLASSES)}")
    return found[0]


def make_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    integer = between(int, 1, 9999)

    def add(group, flag, text, **options):
        if "default" in options:
            text += " (default: %(default)s)"
        group.add_argument(flag, help=text, **options)

    training = parser.add_argument_group("training")
    add(training, "--epochs", "passes over the training images", type=integer, default=50)
    add(training, "--batch-size", "images in a step", type=between(int, 2, 10**6), default=64)
    # the DCGAN paper has batches of 128 and lr 2e-4; here 1e-3 was better than 5e-4 from the start
    add(training, "--lr", "Adam's learning rate", type=between(float, 1e-9, 1), default=1e-3)
    add(training, "--beta1", "Adam's beta1", type=between(float, 0, 0.9999), default=0.5)
    add(training, "--latent-dim", "noise values of an image", type=integer, default=64)
    add(training, "--seed", "random seed", type=between(int, 0, MAX_SEED), default=0)
    add(training, "--device", "cpu, cuda, cuda:1, mps (untried)", default=device)
    precisions = ["auto", "fp32", "bf16"]
    add(training, "--precision", "auto: bf16 where it is fast", choices=precisions, default="auto")
    add(training, "--width", "channels of the narrowest layer", type=integer, default=32)
    add(training, "--resume", "go on with the run in the output folder", action="store_true")

    files = parser.add_argument_group("files")
    add(files, "--data-dir", "where downloads go", type=Path, default="data")
    add(files, "--output-dir", "where everything else goes", type=Path, default=f"outputs/{SCRIPT}")
    add(files, "--log-every", "steps between loss lines", type=between(int, 1, 10**9), default=500)
    add(files, "--save-every", "epochs between kept weights", type=integer, default=10)

    generating = parser.add_argument_group("generating, in place of training")
    add(generating, "--generate", "N images a class", type=between(int, 1, 1000), metavar="N")
    add(generating, "--label", "one class: a number, name or its beginning", type=find_label)
    add(generating, "--weights", "the generator's file (default: the output folder's)", type=Path)
    return parser


def parse_args(argv):
    """Return the command line's arguments, with --resume on top of the run's own settings."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.generate and args.resume:
        parser.error("--generate and --resume exclude each other")
    if (args.weights or args.label is not None) and not args.generate:
        parser.error("--label and --weights are for --generate")
    if args.generate and args.generate > 100 and args.label is None:
        parser.error("--generate: at most 100 of each class without --label")
    path = args.output_dir / "checkpoint.pt"
    if args.resume:
        saved = load_file(path)
        with explain(f"{path} holds no run of {SCRIPT}.py"):
            settings = {name: saved["settings"][name] for name in SETTINGS}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        args = parser.parse_args(argv, namespace=parser.parse_args(flags))
        for name in FIXED:
            if getattr(args, name) != settings[name]:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag}: the run to resume has {settings[name]}")
    elif not args.generate and os.path.exists(path):
        raise UsageError(
            f"{args.output_dir} holds a run: go on with --resume, name another --output-dir, "
            "or delete it yourself"
        )
    with explain(f"can't compute on --device {args.device}; any computer has --device cpu"):
        torch.zeros(1, device=args.device).item()
    return args


def main(argv=None):
    """Run a command line (default: the process's); exit with 2 after a mistake, 130 on Ctrl-C."""
    try:
        args = parse_args(argv)
        if args.generate:
            generate(args)
        else:
            train(args)
    except UsageError as error:
        tqdm.write(f"{SCRIPT}: error: {error}", file=sys.stderr)  # clear of the bar
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write(
            "stopped; a run goes on after its last finished epoch with --resume and the same flags",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
