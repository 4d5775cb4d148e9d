# SPDX-License-Identifier: MIT
"""Conditional DCGAN (arXiv:1511.06434) on CIFAR-10: name a class, and the generator draws it.

Mirza and Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784.

    python cgan_cifar10.py --epochs 200               train; everything goes to outputs/cgan_cifar10
    python cgan_cifar10.py --epochs 300 --resume       go on with that run, up to 300 epochs in all
    python cgan_cifar10.py --generate 25 --label horse    draw 25 horses
"""
import argparse, contextlib, copy, io, os, sys, time, warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import distributed, nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

SCRIPT = "cgan_cifar10"  # key in saved files: a renamed copy of this script still reads them
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# ---- networks
class Generator(nn.Module):
    """Turns normal noise (n, latent_dim) and labels (n,) into images (n, 3, 32, 32) in [-1, 1]."""
    def __init__(self, latent_dim=100, width=32):
        super().__init__()
        self.latent_dim = latent_dim
        self.network = nn.Sequential(
            # a transposed convolution over a 1x1 image is this matrix product, only slower
            nn.Linear(latent_dim + len(CLASSES), 8 * width * 4 * 4, bias=False),
            nn.Unflatten(1, (8 * width, 4, 4)), nn.BatchNorm2d(8 * width), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(8 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # 8x8
            nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),  # 16x16
            nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),  # 32x32
            nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, 3, 3, padding=1), nn.Tanh(),
        )

    def forward(self, noise, labels):
        return self.network(torch.cat((noise, F.one_hot(labels, len(CLASSES))), dim=1))

class Discriminator(nn.Module):
    """Judges images (n, 3, 32, 32), labels (n,) or (k, n) by logits: above 0 if real and right."""
    def __init__(self, width=32):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),  # 16x16
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # 8x8
            nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # 4x4
            nn.BatchNorm2d(4 * width), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4 * width, 8 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(8 * width), nn.LeakyReLU(0.2, inplace=True),
            nn.Flatten(), nn.Linear(8 * width * 4 * 4, len(CLASSES)),  # projection arXiv:1802.05637
        )

    def forward(self, images, labels):
        if self.training:  # noise hides the fine grain by which it would win (arXiv:1610.04490)
            images = images + 0.1 * torch.randn_like(images)
        return (self.network(images) * F.one_hot(labels, len(CLASSES))).sum(-1).float()  # for BCE

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
    """Return CIFAR-10's training images, uint8 (50000, 3, 32, 32), and labels (50000,)."""
    with explain(f"no usable CIFAR-10 in {folder}: put {datasets.CIFAR10.url} there"):
        dataset = datasets.CIFAR10(folder, train=True, download=True)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)

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

def save_grid(path, images, columns=10, names=()):
    """Write images (n, C, H, W) in [0, 1] as a PNG of twice their size; `names`: of its rows."""
    grid = make_grid(F.interpolate(images.cpu(), scale_factor=2), columns, pad_value=1.0)
    picture = to_pil_image(F.pad(grid, (80 if names else 0, 0), value=1.0))
    for row, name in enumerate(names):
        ImageDraw.Draw(picture).text((4, (row + 0.4) * picture.height / len(names)), name, "black")
    write_file(path, lambda file: picture.save(file, "PNG"))

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
        labels = torch.arange(len(CLASSES)).repeat_interleave(10)
        save_grid(folder / f"samples/epoch_{epoch:04}.png", sample(average, labels), names=CLASSES)
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
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    data = [None if rank else load_images(args.data_dir)]
    if processes > 1:  # torchrun started them: all compute, the first one also prints and saves
        distributed.init_process_group()  # gloo between CPUs, nccl between CUDA devices
        distributed.broadcast_object_list(data)
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    images, labels = (part.to(device) for part in data[0])  # no DataLoader
    steps = len(images) // args.batch_size  # in an epoch; an incomplete batch is left out
    if steps == 0 or args.batch_size % processes:
        raise UsageError(f"--batch-size {args.batch_size}: too big, or no multiple of {processes}")
    torch.manual_seed(args.seed)
    generator, discriminator = Generator(args.latent_dim), Discriminator()
    for network in (generator, discriminator):
        network.apply(initialize_weights).to(device, memory_format=torch.channels_last)
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
    elif args.overwrite and rank == 0:
        with explain(f"can't empty {folder}"):
            for path in [path for name in RUN_FILES for path in folder.glob(name)]:
                path.unlink()
    if processes > 1:  # DDP averages gradients; it can, as each backward is for one network alone
        warnings.filterwarnings("ignore", ".broadcast_buffers")  # its heir, forward_..., is too new
        generator, discriminator = (nn.parallel.DistributedDataParallel(
            part, broadcast_buffers=False) for part in (generator, discriminator))
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))
    bf16 = fast if args.precision == "auto" else args.precision == "bf16"  # AVX512-BF16: no gain
    print(f"{device}, {'bf16' if bf16 else 'fp32'}, {len(images)} images, to {folder}", flush=True)
    shown = torch.cat([(labels == label).nonzero()[:10, 0] for label in range(len(CLASSES))])
    if rank == 0:
        save_grid(folder / "real.png", images[shown] / 255, names=CLASSES)
        save_epoch(args, done, parts, rows)  # before training; or again, what a kill left undone
    totals = torch.zeros(2, device=device)  # of both losses since the last row
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(10_000 * args.seed + epoch)  # so that a resumed run draws the same
        start = time.perf_counter() - seconds
        order = torch.randperm(len(images), device=device)[:steps * args.batch_size]
        bar = tqdm(order.view(steps, -1)[:, rank::processes], f"Epoch {epoch}/{args.epochs}",
                   leave=False, disable=rank > 0 or None)  # None: no bar in a log file
        for step, indices in enumerate(bar, (epoch - 1) * steps + 1):
            label = labels[indices]  # real images count as fake under `wrong`: arXiv:1605.05396
            real = images[indices] / 127.5 - 1  # to [-1, 1], as Tanh draws
            kept = torch.rand(args.batch_size, 1, 1, 1, device=device)[rank::processes] < 0.5
            real = torch.where(kept, real, real.flip(3))  # half of them mirrored
            noise = torch.randn(args.batch_size, args.latent_dim, device=device)[rank::processes]
            wrong = (label + torch.randint_like(label, 1, len(CLASSES))) % len(CLASSES)

            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                fake = generator(noise, label)
                real_logits, wrong_logits = discriminator(real, torch.stack((label, wrong)))
                fake_logits = discriminator(fake.detach(), label)
            loss_d = discriminator_loss(real_logits, torch.cat((fake_logits, wrong_logits)))
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                fake_logits = discriminator(fake, label)
            loss_g = generator_loss(fake_logits)  # of the images that the discriminator just saw
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))  # none for the discriminator
            optimizer_g.step()
            for averaged, live in zip(average.parameters(), generator.parameters()):
                averaged.lerp_(live.detach(), max(0.001, 10 / (step + 10)))  # EMA, quick at first

            totals += torch.stack((loss_d, loss_g)).detach()  # .item() would wait for the device
            if step % args.log_every == 0 or step == epoch * steps:
                if processes > 1:
                    distributed.all_reduce(totals.div_(processes))
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
            average(torch.randn_like(noise), torch.randint_like(label, len(CLASSES)))
        average.eval()
        if rank == 0:
            save_epoch(args, epoch, parts, rows)
    if processes > 1:
        distributed.destroy_process_group()
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
def sample(generator, labels):
    """Draw images of labels (n,), (n, 3, 32, 32) in [0, 1]; torch.manual_seed governs which."""
    labels, noise = torch.as_tensor(labels), torch.randn(len(labels), generator.latent_dim)
    inputs = [part.to(next(generator.parameters()).device).split(500) for part in (noise, labels)]
    return torch.cat([generator(*part) for part in zip(*inputs)]).add(1).div(2)

def generate(args):
    """Draw args.generate images of args.label, or of each class, into a PNG and print its path."""
    generator = load_generator(args.weights or args.output_dir / "generator.pt", args.device)
    torch.manual_seed(args.seed)
    every = args.label is None
    labels = torch.tensor(range(len(CLASSES)) if every else [args.label])
    title = "every_class" if every else CLASSES[args.label].replace("/", "_").replace(" ", "_")
    path = args.output_dir / f"generated_{title}_seed_{args.seed}.png"
    images = sample(generator, labels.repeat_interleave(args.generate))
    save_grid(path, images, *((args.generate, CLASSES) if every else ()))
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

def find_label(text):
    """Return the label that `text` means: a number, a name or the beginning of one, in any case."""
    found = [i for i, name in enumerate(CLASSES) if text.lower() in (str(i), name.lower())] or [
        i for i, name in enumerate(CLASSES) if name.lower().startswith(text.lower())]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} doesn't say which of {', '.join(CLASSES)}")
    return found[0]

def parse_args(argv):
    """Return the arguments and, with --resume, the run's checkpoint; exit on a mistake."""
    parser = argparse.ArgumentParser(
        prog=SCRIPT, description=__doc__.splitlines()[0], usage=argparse.SUPPRESS,  # 1-line errors
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, whole = parser.add_argument, number(int, 1, 9999)
    add("--epochs", type=whole, default=200, help="passes over the training images, in all")
    add("--batch-size", type=number(int, 2, 10**6), default=64, help="images in a step")
    add("--lr", type=number(float, 1e-9, 1), default=5e-4, help="learning rate of both Adams")
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
    alone("--generate", type=number(int, 1, 1000), metavar="N", help="draw N images a class")
    add("--label", type=find_label, help="class to draw: number, name or beginning of a name")
    add("--weights", type=Path, help="for --generate, if not the output folder's generator.pt")
    args, checkpoint = parser.parse_args(argv), None
    file = args.output_dir / "checkpoint.pt"
    if (args.weights or args.label is not None) and not args.generate:
        parser.error("--label and --weights are for --generate")
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
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun: one each
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
