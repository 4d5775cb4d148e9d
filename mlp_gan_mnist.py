# SPDX-License-Identifier: MIT
"""The first GAN, on MNIST: two fully connected networks, and handwritten digits in two minutes.

A generator turns noise into images; a discriminator tells images of the data set from the
generator's. They are trained in turn. The discriminator learns to answer 1 for real images and 0
for fake ones, which is ordinary classification. The generator learns to make the discriminator
answer 1 for its images: its gradient comes through the discriminator, which so shows it, pixel by
pixel, what would look more real. It never sees a real image itself. As one gets better at telling,
the other has to get better at drawing; neither loss goes to zero, and the pictures, not the losses,
say how far they are. Goodfellow et al. 2014, "Generative Adversarial Networks", arXiv:1406.2661.

    python mlp_gan_mnist.py --epochs 25              train; everything goes to outputs/mlp_gan_mnist
    python mlp_gan_mnist.py --epochs 50 --resume     go on with that run, up to 50 epochs in all
    python mlp_gan_mnist.py --generate 64            draw 64 digits with the trained generator
"""
import argparse, contextlib, copy, io, os, sys, time, warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

SCRIPT = "mlp_gan_mnist"  # key in saved files: a renamed copy of this script still reads them

# ---- networks
class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) into images (n, 1, 28, 28) in [-1, 1]."""
    def __init__(self, latent_dim=100, width=128):
        super().__init__()
        self.latent_dim = latent_dim
        self.network = nn.Sequential(
            nn.Linear(latent_dim, width, bias=False),
            nn.BatchNorm1d(width), nn.ReLU(inplace=True),
            nn.Linear(width, 2 * width, bias=False),
            nn.BatchNorm1d(2 * width), nn.ReLU(inplace=True),
            nn.Linear(2 * width, 28 * 28), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)),
        )

    def forward(self, noise):
        return self.network(noise)

class Discriminator(nn.Module):
    """Judges images (n, 1, 28, 28) by logits (n,): above 0 for real, below 0 for fake."""
    def __init__(self, width=128):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 2 * width), nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(2 * width, width), nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(width, 1),
        )

    def forward(self, images):
        return self.network(images).squeeze(1).float()  # BCE needs fp32

def initialize_weights(layer):
    """Draw a layer's weights from normal(0, 0.02), as the DCGAN paper does; for `network.apply`."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)

# ---- losses (arXiv:1406.2661): BCE on logits; Sigmoid, then BCELoss, would round gradients to 0
def discriminator_loss(real_logits, fake_logits):
    """Return mean -log D(real) + mean -log(1 - D(fake)) of logits (n,), (m,), D their sigmoid."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real + fake

def generator_loss(fake_logits):
    """Return the mean of -log D(fake) over logits (n,): the paper's "non-saturating" loss."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

# ---- data
def load_images(folder):
    """Return MNIST's 60,000 training images, uint8 (n, 1, 28, 28); downloads them if need be."""
    files = ", ".join(name for name, _ in datasets.MNIST.resources)
    with explain(f"no usable MNIST in {folder}/MNIST/raw: delete that folder to download it again,"
                 f" or put there, from {datasets.MNIST.mirrors[0]}, {files}"):
        return datasets.MNIST(folder, train=True, download=True).data.unsqueeze(1)

# ---- outputs
DIGITS = "[0-9]" * 4
RUN_FILES = ["real.png", f"samples/epoch_{DIGITS}.png", "samples.gif", "losses.csv", "losses.png",
             "generator.pt", f"weights/epoch_{DIGITS}.pt", "checkpoint.pt"]  # in deletion's order

class UsageError(Exception):
    """An error that the user can put right: main prints it as one line and exits with 2."""

@contextlib.contextmanager
def explain(message):
    """Turn an error inside the block into a UsageError that begins with `message`."""
    try:
        yield
    except Exception as error:  # the libraries below raise a dozen kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise UsageError(f"{message} ({reason})") from error

def write_file(path, save):
    """Write what `save(file)` writes; a kill or a full disk leaves the old file or the new one."""
    content, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    save(content)
    with explain(f"can't write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.getbuffer())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

def save_grid(path, images, columns=8):
    """Write images (n, C, H, W) in [0, 1] as a PNG of twice their size."""
    images = F.interpolate(images, scale_factor=2)
    write_file(path, lambda file: save_image(images, file, "PNG", nrow=columns, pad_value=1.0))

def save_losses(folder, rows):
    """Write losses.csv and its plot; rows: epoch, step, both losses, seconds of training."""
    text = "epoch,step,discriminator_loss,generator_loss,seconds\n"
    text += "".join("{},{},{},{},{:.3f}\n".format(*row) for row in rows)
    write_file(folder / "losses.csv", lambda file: file.write(text.encode()))
    axes = Figure(layout="constrained").add_subplot(xlabel="step", ylabel="loss")
    for column, name in ((2, "discriminator"), (3, "generator")):
        axes.plot([row[1] for row in rows], [row[column] for row in rows], label=name)
    axes.legend()
    write_file(folder / "losses.png", lambda file: axes.figure.savefig(file, format="png"))

def save_epoch(args, epoch, parts, rows):
    """Write an epoch's files: checkpoint.pt last, for it says that the others are there."""
    folder, average = args.output_dir, parts["average"]
    if epoch % args.sample_every == 0 or epoch == args.epochs:
        torch.manual_seed(args.seed)  # the same noise each time: one can watch images form
        save_grid(folder / f"samples/epoch_{epoch:04}.png", sample(average, 64))
    if epoch == 0:
        return
    save_losses(folder, rows)
    weights = {SCRIPT: {"latent_dim": average.latent_dim, "generator": average.state_dict()}}
    write_file(folder / "generator.pt", lambda file: torch.save(weights, file))
    if epoch % args.save_every == 0:
        write_file(folder / f"weights/epoch_{epoch:04}.pt", lambda file: torch.save(weights, file))
    if epoch == args.epochs:
        grids = sorted(folder.glob(f"samples/epoch_{DIGITS}.png"))
        first, *others = map(Image.open, grids[::-(len(grids) // 50 + 1)][::-1])  # at most 50
        write_file(folder / "samples.gif", lambda file: first.save(
            file, "GIF", save_all=True, append_images=others, duration=200, loop=0))
    checkpoint = {SCRIPT: {"epoch": epoch, "rows": rows,
                           "settings": {name: getattr(args, name) for name in SETTINGS},
                           "parts": {name: part.state_dict() for name, part in parts.items()}}}
    write_file(folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))

# ---- training
def train(args, checkpoint=None):
    """Train as the command line's `args` say, from the start or from a loaded `checkpoint`."""
    device, folder = torch.device(args.device), args.output_dir
    images = load_images(args.data_dir).to(device)  # all of them, as bytes: no DataLoader
    steps = len(images) // args.batch_size  # in an epoch; an incomplete batch is left out
    if steps == 0:
        raise UsageError(f"--batch-size {args.batch_size}: there are only {len(images)} images")
    torch.manual_seed(args.seed)
    generator, discriminator = Generator(args.latent_dim), Discriminator()
    for network in (generator, discriminator):
        network.apply(initialize_weights).to(device)
    average = copy.deepcopy(generator).requires_grad_(False).eval()
    adam = {"lr": args.lr, "betas": (args.beta1, 0.999), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), **adam)
    parts = {"generator": generator, "discriminator": discriminator, "average": average,
             "optimizer_g": optimizer_g, "optimizer_d": optimizer_d}
    done, rows, seconds = 0, [], 0.0
    if checkpoint:
        with explain(f"{folder}/checkpoint.pt doesn't fit these networks"):
            for name, part in parts.items():
                part.load_state_dict(checkpoint["parts"][name])
        done, rows, seconds = checkpoint["epoch"], checkpoint["rows"], checkpoint["rows"][-1][4]
        args.epochs = max(args.epochs, done)
        for group in optimizer_g.param_groups + optimizer_d.param_groups:
            group["lr"] = args.lr  # load_state_dict brought the old one back
    elif args.overwrite:
        with explain(f"can't empty {folder}"):
            for path in [path for name in RUN_FILES for path in folder.glob(name)]:
                path.unlink()
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))
    bf16 = fast if args.precision == "auto" else args.precision == "bf16"  # AVX512-BF16: no gain
    print(f"{device}, {'bf16' if bf16 else 'fp32'}, {len(images)} images, to {folder}", flush=True)
    save_grid(folder / "real.png", images[:64] / 255)
    save_epoch(args, done, parts, rows)  # before training; or again, what a kill left undone
    totals = torch.zeros(2, device=device)  # of both losses since the last row
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        start = time.perf_counter() - seconds
        order = torch.randperm(len(images), device=device)[:steps * args.batch_size]
        bar = tqdm(order.split(args.batch_size), f"Epoch {epoch}/{args.epochs}", leave=False,
                   disable=None)  # None: no bar in a log file
        for step, indices in enumerate(bar, (epoch - 1) * steps + 1):
            real = images[indices] / 127.5 - 1  # to [-1, 1], as Tanh draws
            noise = torch.randn(args.batch_size, args.latent_dim, device=device)

            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                fake = generator(noise)
                real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
            loss_d = discriminator_loss(real_logits, fake_logits)
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                fake_logits = discriminator(fake)
            loss_g = generator_loss(fake_logits)  # of the images that the discriminator just saw
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))  # none for the discriminator
            optimizer_g.step()
            for averaged, live in zip(average.parameters(), generator.parameters()):
                averaged.lerp_(live.detach(), max(0.001, 10 / (step + 10)))  # EMA, quick at first

            totals += torch.stack((loss_d, loss_g)).detach()  # .item() would wait for the device
            if step % args.log_every == 0 or step == epoch * steps:
                if not all(part.isfinite().all() for part in (totals, *generator.parameters())):
                    raise UsageError(f"a loss or weight is not finite at step {step}: lower --lr")
                mean_d, mean_g = (totals / (step - (rows[-1][1] if rows else 0))).tolist()
                rows.append([epoch, step, mean_d, mean_g, time.perf_counter() - start])
                totals.zero_()
                if step % args.log_every == 0:
                    tqdm.write(f"Step {step}: Generator loss: {mean_g:.3f}, "
                               f"discriminator loss: {mean_d:.3f}")
        spent, seconds = rows[-1][4] - seconds, rows[-1][4]
        print(f"Epoch {epoch}/{args.epochs}: {spent:.1f} s, {len(order) / spent:,.0f} images/s",
              flush=True)
        average.train()  # for its BatchNorm to take statistics of what the averaged weights draw
        for _ in range(min(50, steps)):
            average(torch.randn_like(noise))
        average.eval()
        save_epoch(args, epoch, parts, rows)
    print(f"Finished: all is in {folder}; --generate draws more")

# ---- sampling
def load_generator(path, device="cpu"):
    """Return the generator saved in `path`, in eval mode; UsageError if there is none."""
    with explain(f"{path} holds no generator of {SCRIPT}; {Path(__file__).name} trains one"):
        # tensors and plain values only: no code that the file may hold is run
        saved = torch.load(path, map_location="cpu", weights_only=True)[SCRIPT]
        generator = Generator(saved["latent_dim"])
        generator.load_state_dict(saved["generator"])
    return generator.to(device).eval()

@torch.no_grad()
def sample(generator, n):
    """Draw n images, float (n, 1, 28, 28) in [0, 1]; torch.manual_seed governs which."""
    noise = torch.randn(n, generator.latent_dim).to(next(generator.parameters()).device)
    return torch.cat([generator(part) for part in noise.split(500)]).add(1).div(2)

def generate(args):
    """Draw args.generate images into one PNG and print its path."""
    generator = load_generator(args.weights or args.output_dir / "generator.pt", args.device)
    torch.manual_seed(args.seed)
    path = args.output_dir / f"generated_seed_{args.seed}.png"
    save_grid(path, sample(generator, args.generate))
    print(path)

# ---- command line
FIXED = ["batch_size", "beta1", "latent_dim", "seed"]  # of a run: --resume can't change them
SETTINGS = [*FIXED, "epochs", "lr", "precision", "sample_every", "log_every", "save_every"]

def number(kind, low, high):
    """Return an argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:  # NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse

def parse_args(argv):
    """Return the arguments and, with --resume, the run's checkpoint; exit on a mistake."""
    parser = argparse.ArgumentParser(
        prog=SCRIPT, description=__doc__.splitlines()[0], usage=argparse.SUPPRESS,  # 1-line errors
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, whole = parser.add_argument, number(int, 1, 9999)
    add("--epochs", type=whole, default=25, help="passes over the training images, in all")
    # the papers have batches of 128 and lr 2e-4; here 1e-3 was ahead of 5e-4 from the first epoch
    add("--batch-size", type=number(int, 2, 10**6), default=64, help="images in a step")
    add("--lr", type=number(float, 1e-9, 1), default=1e-3, help="learning rate of both Adams")
    add("--beta1", type=number(float, 0, 0.9999), default=0.5, help="decay of Adam's mean gradient")
    add("--latent-dim", type=whole, default=100, help="noise values that make an image")
    add("--seed", type=number(int, 0, 10**9), default=0, help="of all that is random")
    add("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"),
        help="cpu, cuda, cuda:1, ... (mps is untried)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of arithmetic")
    add("--data-dir", type=Path, default=Path("data"), help="where downloads go")
    add("--output-dir", type=Path, default=Path("outputs", SCRIPT), help="where all else goes")
    add("--sample-every", type=whole, default=1, help="epochs between sample grids")
    add("--log-every", type=number(int, 1, 10**9), default=500, help="steps between loss lines")
    add("--save-every", type=whole, default=10, help="epochs between weights that are kept")
    alone = parser.add_mutually_exclusive_group().add_argument
    alone("--resume", action="store_true", help="go on with the run in the output folder")
    alone("--overwrite", action="store_true", help="delete the run in the output folder first")
    alone("--generate", type=number(int, 1, 1000), metavar="N", help="draw N images; don't train")
    add("--weights", type=Path, help="for --generate, if not the output folder's generator.pt")
    args, checkpoint = parser.parse_args(argv), None
    file = args.output_dir / "checkpoint.pt"
    if args.weights and not args.generate:
        parser.error("--weights is for --generate; --resume goes on with a run")
    if args.resume:
        with explain(f"{file} holds no run of {SCRIPT}; --overwrite starts one"):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)[SCRIPT]
            own = {name: checkpoint["settings"][name] for name in SETTINGS}
        args = parser.parse_args(argv, argparse.Namespace(**own))  # the run's own are the defaults
        for name in FIXED:
            if getattr(args, name) != own[name]:
                parser.error(f"--{name.replace('_', '-')}: the run to resume has {own[name]}")
    elif os.path.exists(file) and not args.overwrite and not args.generate:
        parser.error(f"{args.output_dir} holds a run: --resume goes on, --overwrite starts afresh")
    with explain(f"--device {args.device}: not here"):
        torch.zeros(1, device=args.device).item()
    return args, checkpoint

def main(argv=None):
    """Run a command line (default: the process's); exit with 2 after a mistake, 130 on Ctrl-C."""
    warnings.filterwarnings("ignore", "'torch.load' received|Detected pickle protocol")
    try:
        args, checkpoint = parse_args(argv)
        generate(args) if args.generate else train(args, checkpoint)
    except UsageError as error:
        tqdm.write(f"{SCRIPT}: error: {error}", file=sys.stderr)  # clear of the bar
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write("stopped; --resume goes on after the last finished epoch, if any", sys.stderr)
        sys.exit(130)

if __name__ == "__main__":
    main()
