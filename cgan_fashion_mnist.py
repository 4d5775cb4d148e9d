# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "matplotlib>=3.9", "pillow>=10.1", "tqdm>=4.66",
#   "matplotlib-inline",  # for `!uv run` in a notebook
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
import copy
import csv
import math
import os
import sys
from pathlib import Path

import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

CLASSES = datasets.FashionMNIST.classes  # names by label
# samples come from weights averaged over about the latest 1/80 of the steps
AVERAGE_DECAY = 80  # the README's Frechet distance is 0.028; at 10, 0.035
LABEL_SCALE = 3  # one-hot labels are multiplied by it: classes become clear sooner
WRONG_SHARE = 1 / 8  # of the real images; with more wrong labels, clearer but less varied classes
WRONG_STEPS = 10_000  # the share falls by 1 / WRONG_STEPS a step, from 1 to WRONG_SHARE
NAME_SIZE = 15  # pixels, of the classes' names beside a grid
BETA2 = 0.999  # Adam's
PARTS = ["generator", "discriminator", "average", "optimizer_g", "optimizer_d"]  # of a GAN


class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) and labels (n,) into images (n, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=64, width=32):
        super().__init__()
        self.latent_dim = latent_dim
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


# the losses of arXiv:1406.2661, from logits: a sigmoid that rounds to 0 or 1 passes no gradient
def discriminator_loss(real_logits, fake_logits):
    """Return -mean log D(real) - mean log(1 - D(fake)); D is the sigmoid of logits (n,), (m,)."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake


def generator_loss(fake_logits):
    """Return the mean of -log D(fake) over logits (n,): the non-saturating loss."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


class GAN:
    """Both networks, their optimizers, and the averaged generator that draws the samples.

    A step is an iteration of Algorithm 1 in arXiv:1406.2661, with the same noise in both halves.
    """

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
            fake_logits = self.discriminator(fake.detach())  # leaves the generator alone
        share = max(WRONG_SHARE, 1 - self.steps / WRONG_STEPS)
        mislabelled = pick(real_logits, wrong)[: int(share * len(real))]
        fakes = torch.cat((pick(fake_logits, labels), mislabelled))
        loss_d = discriminator_loss(pick(real_logits, labels), fakes)
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        # generator: the updated discriminator should answer 1 for the same images
        with autocast:
            fake_logits = self.discriminator(fake)
        loss_g = generator_loss(pick(fake_logits, labels))
        self.optimizer_g.zero_grad()
        # inputs=: not the discriminator's weights, whose gradients aren't needed; nor frozen ones
        loss_g.backward(inputs=[p for p in self.generator.parameters() if p.requires_grad])
        self.optimizer_g.step()

        # the generator's weights swing with the discriminator's; their average draws better images
        # (arXiv:1806.04498); polynomial decay: arXiv:1212.1824
        parameters = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        for average, latest in parameters:
            average.lerp_(latest.detach(), weight=AVERAGE_DECAY / (self.steps + AVERAGE_DECAY))
        return torch.stack((loss_d, loss_g)).detach()

    def update_bn(self, batch_size, batches=50):
        """Before sampling, give the average's BatchNorm layers the statistics of its images."""
        self.average.train()  # so that BatchNorm collects them
        for _ in range(batches):
            labels = torch.randint(len(CLASSES), (batch_size,))
            sample(self.average, torch.randn(batch_size, self.average.latent_dim), labels)
        self.average.eval()

    def state_dict(self):
        """Return all that load_state_dict needs to go on."""
        return {"steps": self.steps, **{part: getattr(self, part).state_dict() for part in PARTS}}

    def load_state_dict(self, states):
        """Go on from another GAN's state_dict()."""
        self.steps = states["steps"]
        for part in PARTS:
            getattr(self, part).load_state_dict(states[part])


def load_images(folder):
    """Return Fashion-MNIST's training images, uint8 (60000, 1, 28, 28), and labels (60000,)."""
    dataset = datasets.FashionMNIST(folder, download=True)
    return dataset.data.unsqueeze(1), dataset.targets


def ten_of_each(images, labels):
    """Return ten images of each class, by label; of a class with fewer, the same again."""
    rows = [images[labels == label][:10] for label in range(len(CLASSES))]
    if min(map(len, rows)) == 0:
        raise ValueError(f"a class has no images: of {CLASSES}, there are {labels.bincount()}")
    return torch.cat([row[torch.arange(10) % len(row)] for row in rows])


def train(args, checkpoint):
    """Train from the start, or go on after a checkpoint's epoch; all goes to args.output_dir."""
    folder = Path(args.output_dir)
    images, labels = load_images(args.data_dir)
    examples = ten_of_each(images, labels)
    images = images.to(args.device)  # all fit in memory as uint8: no DataLoader
    labels = labels.to(args.device)
    batches = len(images) // args.batch_size  # in an epoch
    if batches == 0:
        raise ValueError(f"--batch-size {args.batch_size}: there are only {len(images)} images")

    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width)
    discriminator = Discriminator(args.width)
    for network in (generator, discriminator):
        network.apply(initialize_weights).to(args.device)
    gan = GAN(generator, discriminator, args.lr, args.beta1, args.bf16)
    done, history = 0, []
    if checkpoint:
        done, history = checkpoint["epoch"], checkpoint["history"]
        gan.load_state_dict(checkpoint["gan"])

    torch.manual_seed(args.seed)  # once more, so that --generate 10 draws the last grid
    fixed_noise = torch.randn(10, args.latent_dim)  # for every grid: one can watch images form
    save_rows(examples / 255, folder / "real.png")
    save_samples(gan.average, fixed_noise, folder / f"samples/epoch_{done:04}.png")
    print(f"on {args.device} in {'bf16' if args.bf16 else 'fp32'}, to {folder}", flush=True)

    total = args.epochs * batches
    bar = tqdm(total=total, initial=done * batches, leave=False, disable=None, file=sys.stdout)
    for epoch in range(done + 1, args.epochs + 1):
        bar.set_description(f"Epoch {epoch}/{args.epochs}")
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        for optimizer in (gan.optimizer_g, gan.optimizer_d):
            # a checkpoint brings its own rates; a schedule would go here, too
            optimizer.param_groups[0].update(lr=args.lr, betas=(args.beta1, BETA2))
        order = torch.randperm(len(images), device=args.device)
        losses = []  # since the last row
        for i, indices in enumerate(order.split(args.batch_size)[:batches], 1):
            real = images[indices] / 127.5 - 1  # to [-1, 1], as the generator gives
            losses.append(gan.step(real, labels[indices]))
            bar.update()
            if i % args.log_every == 0 or i == batches:  # .tolist() waits for the GPU
                loss_d, loss_g = torch.stack(losses).mean(dim=0).tolist()
                line = f"Generator loss: {loss_g:.3f}, discriminator loss: {loss_d:.3f}"
                bar.write(f"Step {gan.steps}: {line}")
                sys.stdout.flush()  # for whoever watches a log file
                if not math.isfinite(loss_d + loss_g):
                    raise FloatingPointError("a loss is not finite: lower --lr")
                history.append((epoch - 1 + i / batches, gan.steps, loss_d, loss_g))
                losses = []

        gan.update_bn(args.batch_size)
        save_samples(gan.average, fixed_noise, folder / f"samples/epoch_{epoch:04}.png")
        save_losses(history, folder)
        saved = {"latent_dim": args.latent_dim, "width": args.width, "classes": CLASSES}
        saved["generator"] = gan.average.state_dict()
        save(saved, folder / "generator.pt")
        if epoch % 10 == 0:
            save(saved, folder / f"weights/epoch_{epoch:04}.pt")
        run = {"args": vars(args), "epoch": epoch, "history": history, "gan": gan.state_dict()}
        run["classes"] = CLASSES
        save(run, folder / "checkpoint.pt")  # last: now the epoch is finished
    bar.close()
    save_animation(folder)
    print(f"Finished: all is in {folder}; --generate generates more")


@torch.no_grad()
def sample(generator, noise, labels):
    """Turn normal noise (n, latent_dim) and labels (n,) into images (n, 1, 28, 28) in [0, 1]."""
    noise = noise.to(next(generator.parameters()))  # their device and dtype
    return (generator(noise, labels.to(noise.device)) + 1) / 2


def load_generator(path, device="cpu"):
    """Return the generator saved in `path`, in eval mode; ValueError if its classes are others."""
    saved = torch.load(path, device, weights_only=True)
    weights = saved.pop("generator")
    if saved.pop("classes", None) != CLASSES:
        raise ValueError(f"{path} is of other classes")
    generator = Generator(**saved).to(device)
    generator.load_state_dict(weights)
    return generator.eval()


def generate(weights, args):
    """Draw args.generate images of a class, or of each, into one PNG and print its path."""
    generator = load_generator(weights, args.device)
    torch.manual_seed(args.seed)
    noise = torch.randn(args.generate, generator.latent_dim)
    if args.label is None:
        path = Path(args.output_dir, f"{weights.stem}_seed_{args.seed}.png")
        save_samples(generator, noise, path)
    else:
        path = Path(args.output_dir, f"{weights.stem}_seed_{args.seed}_{args.label}.png")
        save_grid(sample(generator, noise, torch.full((args.generate,), args.label)), path)
    print(path)


def save(state, path):
    """Save a state with torch.save, so that `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def save_grid(images, path, columns=None):
    """Save images (n, C, H, W) in [0, 1] as a PNG of twice their size, by default about square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns or math.ceil(math.sqrt(len(images)))
    save_image(F.interpolate(images, scale_factor=2), path, nrow=columns, pad_value=0.5)


def save_rows(images, path):
    """Save images as a grid with a row for each class, its name beside it."""
    save_grid(images, path, len(images) // len(CLASSES))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), NAME_SIZE)
    width = max(math.ceil(font.getlength(f" {name} ")) for name in CLASSES)
    picture = ImageOps.expand(Image.open(path), (width, 0, 0, 0), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(CLASSES):
        place = (width, (row + 0.5) * picture.height / len(CLASSES))
        draw.text(place, f"{name} ", "black", font, anchor="rm")
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
        header = ("epoch", "step", "discriminator_loss", "generator_loss")
        csv.writer(file, lineterminator="\n").writerows([header, *history])
    epochs, _, losses_d, losses_g = zip(*history, strict=True)
    figure = Figure(layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    axes.plot(epochs, losses_d, label="discriminator")
    axes.plot(epochs, losses_g, label="generator")
    axes.legend()
    figure.savefig(folder / "losses.png")


def find_label(text):
    """Return the label of a class, for argparse, from its name, in any case, or its number."""
    for names in ([name.lower() for name in CLASSES], [str(i) for i in range(len(CLASSES))]):
        if text.lower() in names:
            return names.index(text.lower())
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CLASSES)}")


def count(text):
    """Return a whole number above 0, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def bf16_is_fast(device):
    """Return whether bf16 is fast: NVIDIA's cards from Ampere, CPUs with AMX, AMD's from Zen 4."""
    if device.startswith("cuda"):
        return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")  # Linux's: on other systems, CPUs compute in fp32
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    # Intel's AVX-512 alone was measured to be slower in bf16 than in fp32
    fast = "amx_bf16" in text or ("AuthenticAMD" in text and "avx512_bf16" in text)
    return device == "cpu" and fast


def main(argv=None):
    """Run a command line (default: the process's)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--epochs", type=count, default=50, help="passes over the training images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images in a step (%(default)s)")
    # the DCGAN paper has batches of 128 and lr 2e-4; here 1e-3 was better than 5e-4 from the start
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (%(default)s)")
    add("--beta1", type=float, default=0.5, help="Adam's beta1 (%(default)s)")
    add("--latent-dim", type=count, default=64, help="noise values of an image (%(default)s)")
    add("--width", type=count, default=32, help="channels of the narrowest layer (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--device", default=device, help="cpu, cuda, cuda:1, mps (%(default)s)")
    bf16 = "compute in bf16 (default: where it's fast; with --resume, as the run began)"
    add("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    # str, not Path: the checkpoint holds the flags, and weights_only=True refuses a Path
    add("--data-dir", default="data", help="where downloads go (%(default)s)")
    add("--output-dir", default=f"outputs/{Path(__file__).stem}", help="for all else (%(default)s)")
    add("--log-every", type=count, default=500, help="steps between loss lines (%(default)s)")
    add("--resume", action="store_true", help="go on with the output folder's run")
    add("--generate", type=count, metavar="N", help="draw N images of each class")
    add("--label", type=find_label, help=f"with --generate, the one class: {', '.join(CLASSES)}")
    add("--weights", help="generator for --generate (the output folder's)")
    args = parser.parse_args(argv)

    if args.generate:
        weights = Path(args.weights or f"{args.output_dir}/generator.pt")
        if not weights.exists():
            parser.error(f"there is no {weights}: train first, or name weights with --weights")
        return generate(weights, args)
    if args.weights or args.label is not None:
        parser.error("--weights and --label go with --generate")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("torchrun is for cgan_cifar10.py: here, each process would train alone")
    checkpoint = None
    checkpoint_path = Path(args.output_dir, "checkpoint.pt")
    if args.resume:
        if not checkpoint_path.exists():
            parser.error(f"there is no {checkpoint_path} to go on from")
        checkpoint = torch.load(checkpoint_path, "cpu", weights_only=True)
        if checkpoint.get("classes") != CLASSES:
            parser.error(f"{checkpoint_path} is of other classes")
        parser.set_defaults(**{**checkpoint["args"], "output_dir": args.output_dir})
        args = parser.parse_args(argv)  # again: the defaults are now the run's
    elif any(Path(args.output_dir).glob("*.pt")):
        parser.error(f"{args.output_dir} holds *.pt: --resume, or name another --output-dir")
    if args.bf16 is None:
        args.bf16 = bf16_is_fast(args.device)
    train(args, checkpoint)


if __name__ == "__main__":
    main()
