# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "matplotlib>=3.9", "pillow>=10.1", "tqdm>=4.66",
#   "matplotlib-inline",  # for `!uv run` in a notebook
# ]
# ///
"""Conditional DCGAN on CIFAR-10: name a class, and the generator generates it.

Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784, with
convolutional networks after arXiv:1511.06434. Different here: a discriminator with a logit for each
class (compare arXiv:1802.05637) instead of the label as an input, real images under wrong labels
as fakes (arXiv:1605.05396), random shifts of all that the discriminator sees (arXiv:2006.10738),
nearest-neighbour upsampling at the end, PyTorch's own initialization, and samples from an average
of the generator's weights.

    python cgan_cifar10.py --epochs 48                train, into outputs/cgan_cifar10
    python cgan_cifar10.py --epochs 80 --resume       go on with that run, up to 80 epochs in all
    python cgan_cifar10.py --generate 25 --label horse    generate 25 horses
    torchrun --standalone --nproc-per-node=8 cgan_cifar10.py    8 GPUs, batches of 64 each
"""

import argparse
import copy
import csv
import io
import math
import os
import sys
from pathlib import Path

import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# samples come from weights averaged over about the latest 1/20 of the steps
AVERAGE_DECAY = 20  # the README's Frechet distance is 0.050; at 10, 0.056
LABEL_SCALE = 3  # one-hot labels are multiplied by it: classes become clear sooner
WRONG_WEIGHT = 2  # how often a mislabelled image counts as fake, for clearer classes
SHIFT = 1  # pixels, the shift's standard deviation; at 2, images teach a classifier less
NAME_SIZE = 15  # pixels, of the classes' names beside a grid
BETA2 = 0.999  # Adam's
PARTS = ["generator", "discriminator", "average", "optimizer_g", "optimizer_d"]  # of a GAN


class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) and labels (n,) into images (n, 3, 32, 32) in [-1, 1]."""

    def __init__(self, latent_dim=100, width=16):
        super().__init__()
        self.latent_dim = latent_dim
        self.network = nn.Sequential(
            # a transposed convolution over a 1x1 image is this matrix product, only slower
            nn.Linear(latent_dim + len(CLASSES), 16 * width * 4 * 4, bias=False),
            nn.Unflatten(1, (16 * width, 4, 4)),
            nn.BatchNorm2d(16 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(16 * width, 8 * width, 4, stride=2, padding=1, bias=False),  # 8x8
            nn.BatchNorm2d(8 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(8 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # 16x16
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            # a transposed convolution here left a checkerboard (doi.org/10.23915/distill.00003)
            nn.Upsample(scale_factor=2),  # 32x32
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise, labels):
        one_hot = F.one_hot(labels, len(CLASSES))
        return self.network(torch.cat((noise, LABEL_SCALE * one_hot), dim=1))


class Discriminator(nn.Module):
    """Turns images (n, 3, 32, 32) into logits (n, 10): above 0 for a real one of that class."""

    def __init__(self, width=16):
        super().__init__()
        # initialized by PyTorch: under the DCGAN paper's normal(0, 0.02), images would shrink to
        # a hundredth before the first BatchNorm layer, their variance near its epsilon
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),  # a stride here would hide details
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),  # 16x16
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # 8x8
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 8 * width, 4, stride=2, padding=1, bias=False),  # 4x4
            nn.BatchNorm2d(8 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8 * width, 16 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(16 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16 * width, len(CLASSES), 4),  # 1x1
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


def augment(images):
    """Return images (n, C, H, W) as the discriminator sees them: shifted by a pixel or so.

    The shift, one for the whole batch, keeps the discriminator from memorizing real images
    (arXiv:2006.10738). A shift of 0 is the likeliest, or generated images would be shifted, too.
    """
    shift = (SHIFT * torch.randn(2)).round().int().tolist()  # down and to the right
    return images.roll(shift, dims=(2, 3))  # what leaves at one edge comes in at the other


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

    def __init__(self, generator, discriminator, lr=5e-4, beta1=0.5, bf16=False):
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
        """Train on real images (n, 3, 32, 32) in [-1, 1], labels (n,); return loss_d, loss_g: (2,).

        Real images also count as fake, under random wrong labels (arXiv:1605.05396). In a process
        group, gradients are averaged: start all processes with the same weights.
        """
        self.steps += 1
        noise = torch.randn(len(real), self.generator.latent_dim, device=real.device)
        wrong = other_labels(labels)
        autocast = torch.autocast(real.device.type, torch.bfloat16, enabled=self.bf16)

        # discriminator: 1 for real images, 0 for the generator's and real ones under wrong labels
        with autocast:
            fake = self.generator(noise, labels)
            real_logits = self.discriminator(augment(real))
            fake_logits = self.discriminator(augment(fake.detach()))  # leaves the generator alone
        mislabelled = pick(real_logits, wrong).repeat(WRONG_WEIGHT)
        fakes = torch.cat((pick(fake_logits, labels), mislabelled))
        loss_d = discriminator_loss(pick(real_logits, labels), fakes)
        self.optimizer_d.zero_grad()
        loss_d.backward()
        average_gradients(self.discriminator)
        self.optimizer_d.step()

        # generator: the updated discriminator should answer 1 for the same images
        with autocast:
            fake_logits = self.discriminator(augment(fake))
        loss_g = generator_loss(pick(fake_logits, labels))
        self.optimizer_g.zero_grad()
        # inputs=: not the discriminator's weights, whose gradients aren't needed; nor frozen ones
        loss_g.backward(inputs=[p for p in self.generator.parameters() if p.requires_grad])
        average_gradients(self.generator)
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
    """Return CIFAR-10's training images, uint8 (50000, 3, 32, 32), and labels (50000,)."""
    dataset = datasets.CIFAR10(folder, download=True)
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)


def init_distributed(args):
    """Join torchrun's other processes; return the rank and the world size."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a card for each process
    distributed.init_process_group()
    if distributed.get_rank() > 0:
        sys.stdout = io.StringIO()  # the first process prints
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(network):
    """Give all of torchrun's processes the mean of their gradients."""
    if distributed.is_available() and distributed.is_initialized():
        for parameter in network.parameters():
            if parameter.requires_grad:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()


def ten_of_each(images, labels):
    """Return ten images of each class, by label; of a class with fewer, the same again."""
    rows = [images[labels == label][:10] for label in range(len(CLASSES))]
    if min(map(len, rows)) == 0:
        raise ValueError(f"a class has no images: of {CLASSES}, there are {labels.bincount()}")
    return torch.cat([row[torch.arange(10) % len(row)] for row in rows])


def train(args, checkpoint):
    """Train from the start, or go on after a checkpoint's epoch; all goes to args.output_dir."""
    folder = Path(args.output_dir)
    rank, processes = init_distributed(args)
    if rank > 0:
        distributed.barrier()  # until the first process has downloaded the images
    images, labels = load_images(args.data_dir)
    if rank == 0 and processes > 1:
        distributed.barrier()
    examples = ten_of_each(images, labels)
    own = slice(rank, len(images) // processes * processes, processes)  # equally many each
    images = images[own].to(args.device)  # all fit in memory as uint8: no DataLoader
    labels = labels[own].to(args.device)
    batches = len(images) // args.batch_size  # in an epoch
    if batches == 0:
        raise ValueError(f"--batch-size {args.batch_size}: there are only {len(images)} images")

    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width).to(args.device)
    discriminator = Discriminator(args.width).to(args.device)
    gan = GAN(generator, discriminator, args.lr, args.beta1, args.bf16)
    done, history = 0, []
    if checkpoint:
        done, history = checkpoint["epoch"], checkpoint["history"]
        gan.load_state_dict(checkpoint["gan"])

    torch.manual_seed(args.seed)  # once more, so that --generate 10 draws the last grid
    fixed_noise = torch.randn(10, args.latent_dim)  # for every grid: one can watch images form
    if rank == 0:
        save_rows(examples / 255, folder / "real.png")
        save_samples(gan.average, fixed_noise, folder / f"samples/epoch_{done:04}.png")
    print(f"on {args.device} in {'bf16' if args.bf16 else 'fp32'}, to {folder}", flush=True)

    total = args.epochs * batches
    bar = tqdm(total=total, initial=done * batches, leave=False, disable=None, file=sys.stdout)
    for epoch in range(done + 1, args.epochs + 1):
        bar.set_description(f"Epoch {epoch}/{args.epochs}")
        # so that a resumed run draws the same, and each process something else
        torch.manual_seed(10_000 * args.seed + epoch + 1000 * rank)
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

        if rank > 0:
            continue  # the first process saves
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
    if "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.destroy_process_group()
    if rank == 0:
        save_animation(folder)
    print(f"Finished: all is in {folder}; --generate generates more")


@torch.no_grad()
def sample(generator, noise, labels):
    """Turn normal noise (n, latent_dim) and labels (n,) into images (n, 3, 32, 32) in [0, 1]."""
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
    # other projects train for 200; the README's distance is 0.102 after 20 epochs, 0.050 after 48
    add("--epochs", type=count, default=48, help="passes over the training images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images in a step (%(default)s)")
    # the DCGAN paper has batches of 128 and lr 2e-4; here 5e-4 was better than 3e-4 from the start
    add("--lr", type=float, default=5e-4, help="Adam's learning rate (%(default)s)")
    add("--beta1", type=float, default=0.5, help="Adam's beta1 (%(default)s)")
    add("--latent-dim", type=count, default=100, help="noise values of an image (%(default)s)")
    add("--width", type=count, default=16, help="channels of the narrowest layer (%(default)s)")
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
