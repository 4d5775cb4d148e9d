"""Tests of the four scripts on tiny data sets made here: no network, no GPU, about a minute."""

import ast
import copy
import csv
import functools
import importlib
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar
from torchvision.transforms.functional import pil_to_tensor

NAMES = ["mlp_gan_mnist", "dcgan_mnist", "cgan_fashion_mnist", "cgan_cifar10"]
HERE = Path(__file__).parent
WEIGHTS = HERE / ".github/weights"
README = (HERE / "README.md").read_text(encoding="utf-8")
N = 120  # tiny training images


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Lay tiny data sets out as torchvision's downloads do; an image's top row shows its label."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data")
    labels = torch.arange(N, dtype=torch.uint8) % 10
    for dataset in ("MNIST", "FashionMNIST"):
        pixels = torch.randint(0, 256, (N, 28 * 28), dtype=torch.uint8)
        pixels[:, :28] = labels.unsqueeze(1)
        raw = folder / dataset / "raw"
        raw.mkdir(parents=True)
        header = struct.pack(">4I", 2051, N, 28, 28)
        (raw / "train-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">2I", 2049, N)
        (raw / "train-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
        for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            (raw / name).touch()  # they only have to be there
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = torch.randint(0, 256, (N // 5, 3 * 32 * 32), dtype=torch.uint8)
        pixels[:, :32] = labels[: N // 5].unsqueeze(1)  # in the red channel
        batch = {"data": pixels.numpy(), "labels": labels[: N // 5].tolist()}
        (batches / name).write_bytes(pickle.dumps(batch))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return folder


@pytest.fixture(autouse=True)
def seeded_and_offline(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no network")))
    # CIFAR-10's tiny files don't have the published MD5
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5: os.path.exists(path))


@pytest.fixture(params=NAMES)
def script(request):
    return importlib.import_module(request.param)


conditional_only = pytest.mark.parametrize("script", NAMES[2:], indirect=True)
cifar_only = pytest.mark.parametrize("script", NAMES[3:], indirect=True)


@pytest.fixture
def run(script, data, tmp_path):
    """Run the script's command line with tiny data and networks, by default into tmp_path/out."""

    def run(*flags, script=script):
        tiny = ["--device", "cpu", "--data-dir", data, "--output-dir", tmp_path / "out"]
        tiny += ["--batch-size", 60, "--epochs", 1, "--width", 4]
        script.main([str(flag) for flag in (*tiny, *flags)])

    return run


@pytest.fixture
def refused(run, capsys):
    """Run a command line that must end with one line (or argparse's usage and one); return it."""

    def refused(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        if isinstance(stop.value.code, str):  # what Python prints, for a status of 1
            line = stop.value.code
            assert "\n" not in line and len(line) < 600
            assert stop.value.__suppress_context__  # or IPython 8 shows an error of its own
        else:
            usage, *_, line = capsys.readouterr().err.splitlines()
            assert usage.startswith("usage: ") and stop.value.code == 2
        return line

    return refused


@pytest.fixture
def at_step(script, monkeypatch):
    """Let the n-th training step return `change(losses)`."""

    def at_step(n, change, script=script):
        step = script.GAN.step
        calls = []

        def changed(*args):
            calls.append(args)
            losses = step(*args)
            return change(losses) if len(calls) == n else losses

        monkeypatch.setattr(script.GAN, "step", changed)

    return at_step


def edited(name, *edits):
    """Return a script with some of its text replaced, each piece of which has to be there once."""
    code = (HERE / f"{name}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    script = types.ModuleType(name)
    script.__file__ = f"{name}.py"
    exec(compile(code, script.__file__, "exec"), script.__dict__)
    return script


def load(path):
    return torch.load(path, weights_only=True)


def tiny_gan(script, **options):
    return script.GAN(script.Generator(width=4), script.Discriminator(width=4), **options)


def random_batch(script, n):
    """Return random images and, for the conditional scripts, labels, as GAN.step takes them."""
    shape = (3, 32, 32) if script.SCRIPT == "cgan_cifar10" else (1, 28, 28)
    images = torch.rand(n, *shape) * 2 - 1
    return (images, torch.arange(n) % 10) if hasattr(script, "CLASSES") else (images,)


# ---- networks and steps


@pytest.mark.parametrize("script", NAMES[:2], indirect=True)
def test_the_largest_of_the_first_ten_numbers_chooses_the_kind(script):
    generator = script.Generator(width=4).eval()
    noise = torch.zeros(10, 100).index_put((torch.arange(10), torch.arange(10)), torch.tensor(1e-6))
    images = script.sample(generator, noise)  # nearly the same noise, but ten kinds
    assert len({image.sum().item() for image in images}) == 10


def test_losses_are_the_papers(script):
    real = torch.tensor([2.0, -1.0])
    fake = torch.tensor([0.5, 3.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.isclose(script.discriminator_loss(real, fake), expected)
    assert torch.isclose(script.generator_loss(fake), -fake.sigmoid().log().mean())
    assert script.generator_loss(torch.tensor([-200.0])) == 200  # Sigmoid + BCELoss stops at 100


def test_a_step_moves_every_weight_and_the_average_follows(script):
    generator = script.Generator(latent_dim=7, width=4).eval()  # as load_generator's are
    gan = script.GAN(generator, script.Discriminator(width=4), lr=0.01)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    before = [weight.clone() for weight in weights]
    buffers = [value.clone() for value in generator.buffers()]
    gan.steps = 29
    losses = gan.step(*random_batch(script, 10))
    assert losses.shape == (2,) and losses.isfinite().all() and not losses.requires_grad
    assert gan.steps == 30 and not any(map(torch.equal, before, weights))
    assert not any(map(torch.equal, buffers, generator.buffers()))
    share = 20 / (30 + 20) if script.SCRIPT == "dcgan_mnist" else 10 / (30 + 10)
    for average, then, now in zip(gan.average.parameters(), before, weights, strict=False):
        assert torch.allclose(average, torch.lerp(then, now, share), atol=1e-6)
    gan.update_bn(10, batches=2)
    assert not any(map(torch.equal, buffers, gan.average.buffers()))
    assert not gan.average.training


@conditional_only
def test_a_step_asks_for_the_right_labels(script, monkeypatch):
    n, own, other = 800, torch.tensor(3.0), torch.tensor(-2.0)

    def logits(discriminator, images):  # of one that takes all images for class 4's
        gradient = 0 * (images.sum() + sum(map(torch.sum, discriminator.parameters())))
        return torch.where(torch.arange(10) == 4, own, other).repeat(len(images), 1) + gradient

    monkeypatch.setattr(script.Discriminator, "forward", logits)
    gan = tiny_gan(script)
    real = random_batch(script, n)[0]
    zero, one = script.generator_loss, lambda logits: script.generator_loss(-logits)
    loss_d, _ = gan.step(real, torch.full((n,), 4))
    share = {"cgan_cifar10": 2 * n, "cgan_fashion_mnist": n - 1}[script.SCRIPT]  # at the first step
    assert torch.isclose(loss_d, zero(own) + (n * one(own) + share * one(other)) / (n + share))
    gan.steps = 10**6
    loss_d, loss_g = gan.step(real, torch.full((n,), 5))
    low, high = zero(other) + one(other), zero(other) + one(own)  # some wrong labels are 4
    assert low < loss_d < high and torch.isclose(loss_g, zero(other))
    for n, share in ((800, 100), (7, 1)):  # no wrong label is 4
        share = 2 * n if script.SCRIPT == "cgan_cifar10" else share
        loss_d, loss_g = gan.step(real[:n], torch.full((n,), 4))
        fakes = (n * one(own) + share * one(other)) / (n + share)
        assert torch.isclose(loss_d, zero(own) + fakes) and torch.isclose(loss_g, zero(own))


@cifar_only
def test_the_discriminator_sees_shifted_images(script, monkeypatch):
    images = random_batch(script, 4)[0]
    images[:, :, 16, 16] = 9
    shifts = []
    for _ in range(400):
        seen = script.augment(images)
        place = divmod(seen[0, 0].argmax().item(), 32)
        shifts.append([pixel - 16 for pixel in place])  # down, and to the right
        assert torch.equal(seen, images.roll(shifts[-1], dims=(2, 3)))
    shifts = torch.tensor(shifts).double()
    assert shifts.std(dim=0).min() > 0.8 and shifts.std(dim=0).max() < 1.3
    assert (shifts.abs() < 2).double().mean() > 0.8  # most are small

    monkeypatch.setattr(script, "augment", lambda images: 0 * images)
    discriminator = script.Discriminator(width=4)
    losses = []
    for _ in range(2):
        gan = script.GAN(script.Generator(width=4), copy.deepcopy(discriminator))
        batch = random_batch(script, 4)
        torch.manual_seed(0)  # the same wrong labels
        losses.append(gan.step(*batch))
        torch.manual_seed(1)  # another generator and other images
    assert torch.equal(*losses)  # nothing is seen but what augment returns


# ---- a run and what it leaves


def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys, monkeypatch):
    # every third epoch's weights for every tenth's: fewer epochs to train
    script = edited(script.SCRIPT, ("epoch % 10 == 0", "epoch % 3 == 0"))
    batches = []
    step = script.GAN.step
    monkeypatch.setattr(script.GAN, "step", lambda *args: batches.append(args[1:]) or step(*args))
    flags = "--batch-size 22 --log-every 3 --epochs 3 --no-bf16"
    run(*flags.split(), script=script)
    printed = capsys.readouterr()
    assert f"cpu, fp32, to {tmp_path / 'out'}\n" in printed.out
    lines = re.findall(r"Step (\d+): Generator loss: \S+, discriminator loss: \d", printed.out)
    assert lines[:4] == ["3", "5", "8", "10"]
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal
    real, *labels = map(torch.cat, zip(*batches[:5], strict=True))
    assert real.min() == -1 and real.max() == 1 and len(real.unique(dim=0)) == 5 * 22
    tops = ((real[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert tops.max() == 9 and (not labels or torch.equal(tops, labels[0].long()))
    assert not torch.equal(batches[0][0], batches[5][0])  # another order

    out = tmp_path / "out"
    run("--generate", 2)
    run("--generate", 2, "--weights", out / "weights/epoch_0003.pt")
    pictures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    cell = 2 * real.shape[-1] + 2
    rows, names = (10, 100) if labels else (1, 0)
    assert Image.open(pictures[0]).size == (names + 2 * cell + 2, rows * cell + 2)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {
        *("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt", "checkpoint.pt"),
        *(f"samples/epoch_{epoch:04}.png" for epoch in range(4)),
        *("weights/epoch_0003.pt", "generator_seed_0.png", "epoch_0003_seed_0.png"),
    }
    assert Image.open(out / "samples.gif").n_frames == 4
    table = list(csv.reader((out / "losses.csv").read_text().splitlines()))
    assert table[0] == ["epoch", "step", "discriminator_loss", "generator_loss"]
    assert [row[:2] for row in table[1:4]] == [["0.6", "3"], ["1.0", "5"], ["1.6", "8"]]
    assert b"\r" not in (out / "losses.csv").read_bytes()
    run("--generate", 10 if labels else 64)  # the last grid's noise, through the average
    assert pictures[0].read_bytes() == (out / "samples/epoch_0003.png").read_bytes()
    red, *_ = Image.open(out / "real.png").convert("RGB").getpixel((names + 3, 3))
    assert red == 0  # the first image's label is 0, and so is its top row


def test_generate_makes_what_the_shipped_weights_hold(script, run, tmp_path, capsys):
    path = WEIGHTS / f"{script.SCRIPT}.pt"
    generator = script.load_generator(path)
    assert not generator.training
    flags, labels = [], []
    if hasattr(script, "CLASSES"):
        flags, labels = ["--label", 1], [torch.ones(4, dtype=torch.long)]
    for seed in (5, 6):
        run("--generate", 4, *flags, "--seed", seed, "--weights", path)
        picture = Path(capsys.readouterr().out.strip())
        torch.manual_seed(seed)
        noise = torch.randn(4, generator.latent_dim)
        images = script.sample(generator, noise, *labels)
        script.save_grid(images, tmp_path / "expected.png")
        assert picture.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1  # all of the scale
    assert images.std(dim=0).mean() > 0.05
    if labels:  # a row is of its class, a column of one noise
        run("--generate", 4, "--seed", seed, "--weights", path)
        cell = 2 * images.shape[-1] + 2
        place = (100, cell, 100 + 4 * cell + 2, 2 * cell + 2)
        row = Image.open(capsys.readouterr().out.strip()).crop(place)
        script.save_grid(images, tmp_path / "row.png", columns=4)
        difference = pil_to_tensor(row).int() - pil_to_tensor(Image.open(tmp_path / "row.png"))
        assert difference.abs().max() <= 1
    half = script.sample(generator.half(), noise.half(), *labels)
    assert half.dtype == torch.float16 and (half - images).abs().mean() < 0.01


def test_bf16_trains_and_samples_are_of_fp32(script, run, tmp_path):
    run("--bf16")
    run("--no-bf16", "--output-dir", tmp_path / "fp32")
    ours, theirs = (load(tmp_path / name / "generator.pt") for name in ("out", "fp32"))
    weights, others = ours["generator"]["network.0.weight"], theirs["generator"]["network.0.weight"]
    assert weights.dtype == torch.float32
    assert 0 < (weights - others).abs().max() < 0.05
    means = [value for name, value in ours["generator"].items() if name.endswith("running_mean")]
    assert all(map(torch.any, means))  # BatchNorm's, of what the average generates
    half = {name: value.half() for name, value in ours["generator"].items()}
    torch.save({**ours, "generator": half}, tmp_path / "half.pt")
    assert script.load_generator(tmp_path / "half.pt").network[0].weight.dtype == torch.float32


# ---- resume: exact, and nothing is lost


def outcome(folder):
    """Return what a run leaves: its checkpoint but for the flags, and its other files' bytes."""
    checkpoint = load(folder / "checkpoint.pt")
    del checkpoint["flags"]
    files = sorted(path for path in folder.rglob("*.*") if path.suffix != ".pt")
    return checkpoint, {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_run_resumes_exactly(run, script, data, tmp_path, at_step):
    scheduled = edited(script.SCRIPT, ("lr=args.lr, betas", "lr=args.lr / epoch, betas"))
    place = ["--data-dir", str(data), "--device", "cpu", "--output-dir"]
    flags = ["--epochs", "2", "--seed", "3", "--width", "4", "--batch-size", "60"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    scheduled.main([*place, str(whole), *flags])
    at_step(4, Mock(side_effect=KeyboardInterrupt), scheduled)  # the last step of epoch 2
    with pytest.raises(KeyboardInterrupt):
        scheduled.main([*place, str(out), *flags])
    assert load(out / "checkpoint.pt")["epoch"] == 1
    scheduled.main([*place, str(out), "--resume"])  # the run's own epochs, seed, width, batch size
    torch.testing.assert_close(outcome(out)[0], outcome(whole)[0], rtol=0, atol=0)
    assert outcome(out)[1] == outcome(whole)[1]
    rates = [load(out / "checkpoint.pt")[f"optimizer_{x}"]["param_groups"][0]["lr"] for x in "gd"]
    assert rates == [script.make_parser().get_default("lr") / 2] * 2


def test_resume_takes_new_flags(run, tmp_path, refused):
    run("--seed", 7)
    assert "--resume" in refused("--seed", 7)
    assert "--width" in refused("--resume", "--width", 9)
    flags = "--resume --epochs 2 --lr 0.000123 --beta1 0.9 --log-every 1 --batch-size 40"
    run(*flags.split())
    checkpoint = load(tmp_path / "out/checkpoint.pt")
    assert checkpoint["epoch"] == 2 and checkpoint["flags"]["seed"] == 7
    assert [row[1] for row in checkpoint["history"]] == [2, 3, 4, 5]
    for name in ("optimizer_g", "optimizer_d"):
        (group,) = checkpoint[name]["param_groups"]
        assert (group["lr"], tuple(group["betas"])) == (0.000123, (0.9, 0.999))


def test_a_save_cut_short_leaves_the_old_file(script, tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    (tmp_path / "generator.pt").write_bytes(b"old")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(script.UsageError, match="generator.pt.*No space"):
        script.save({}, tmp_path / "generator.pt")
    assert (tmp_path / "generator.pt").read_bytes() == b"old"


def test_nan_stops_the_run_and_keeps_the_checkpoint(run, refused, at_step, tmp_path):
    run()
    at_step(1, lambda losses: losses * float("nan"))
    line = refused("--resume", "--epochs", 2)
    assert "step 4" in line and "--lr" in line  # noticed at the epoch's end
    assert load(tmp_path / "out/checkpoint.pt")["epoch"] == 1


# ---- the machine


WORKER = """
import torch
from torchvision.datasets import cifar
import cgan_cifar10 as script

def step(gan, real, labels, step=script.GAN.step):
    seen.append((gan, real, torch.get_rng_state()))
    return step(gan, real, labels)

seen = []
script.GAN.step = step
cifar.check_integrity = lambda path, md5: True
script.main()
(gan, *_), real, random = zip(*seen)
weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
torch.save((weights, torch.cat(real), random[0]), f"rank{script.os.environ['RANK']}.pt")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun is untried on Windows")
@cifar_only
def test_two_processes_train_one_gan(run, data, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    torchrun = "torch.distributed.run --standalone --nproc-per-node=2 worker.py --device cpu"
    flags = "--batch-size 30 --log-every 1 --width 4 --epochs 1 --output-dir out --data-dir"
    command = [sys.executable, "-m", *torchrun.split(), *flags.split(), str(data)]
    printed = subprocess.check_output(command, text=True, timeout=300)
    assert printed.count("Step 1: ") == printed.count("Finished") == 1
    weights, real, random = zip(load("rank0.pt"), load("rank1.pt"), strict=True)
    assert all(map(torch.equal, *weights))
    assert not torch.equal(*random)
    assert len(torch.cat(real).unique(dim=0)) == N  # half of them each
    run("--resume", "--epochs", 2)  # a checkpoint of two processes goes on in one
    assert load(tmp_path / "out/checkpoint.pt")["epoch"] == 2


@cifar_only
def test_a_launchers_variables_alone_start_no_process_group(run, tmp_path, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "x")):
        monkeypatch.setenv(name, value)
    run()
    assert (tmp_path / "out/generator.pt").exists()


def python(code, **variables):
    """Run code in a Python of its own, with further environment variables; return its result."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("installed", [False, True])
def test_a_notebooks_backend(installed, tmp_path):
    """Where it's missing, its `!python` still runs; where it isn't, the user's plots appear."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    package = tmp_path / "matplotlib_inline"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "backend_inline.py").write_text("from matplotlib.backends.backend_agg import *")
    information = tmp_path / "matplotlib_inline-0.1.7.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: matplotlib-inline\nVersion: 0.1.7\n")
    entry = "[matplotlib.backend]\ninline = matplotlib_inline.backend_inline\n"
    (information / "entry_points.txt").write_text(entry)
    found, hidden = f"sys.path.append({str(tmp_path)!r})", "sys.modules['matplotlib_inline'] = None"
    code = f"import sys\n{found if installed else hidden}\nimport {NAMES[0]} as script\n"
    code += f"script.save_losses([(1.0, 5, 1.4, 0.7)], script.Path({str(tmp_path)!r}))\n"
    code += "from matplotlib import pyplot\npyplot.figure()\nprint(pyplot.get_backend())"
    inline = "module://matplotlib_inline.backend_inline"
    done = python(code, MPLBACKEND=inline, MATPLOTLIBRC=str(tmp_path))
    assert ("inline" in done.stdout) == installed and not done.returncode, done.stderr
    assert (tmp_path / "losses.png").exists()


def test_a_broken_matplotlib_is_noticed_before_the_first_step(run, at_step, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    at_step(1, pytest.fail)
    with pytest.raises(ImportError):
        run()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has another status")
@pytest.mark.parametrize("script", NAMES[:1], indirect=True)
def test_ctrl_c_gets_one_line_and_ends_a_shells_loop(script, data, tmp_path):
    flags = f"--data-dir {data} --output-dir {tmp_path}/out --width 4 --batch-size 60 --epochs 9999"
    command = [sys.executable, HERE / f"{script.SCRIPT}.py", *flags.split()]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background, too
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        while "Step 6:" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "--resume" in errors and errors.count("\n") == 1
    assert load(tmp_path / "out/checkpoint.pt")["epoch"] >= 2


@pytest.mark.parametrize("script", NAMES[:1], indirect=True)
def test_a_closed_pipe_gets_no_traceback(script, data, tmp_path):
    flags = f"--data-dir {data} --output-dir {tmp_path}/out --width 4 --batch-size 60".split()
    code = "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
    code += f"import {script.SCRIPT} as script\nscript.main({flags})"
    errors = python(code).stderr
    assert "error: [Errno" in errors and "Traceback" not in errors


# ---- what is refused


class Payload:
    def __reduce__(self):
        return sys.exit, ("the code in the file was run",)


def test_damaged_foreign_and_hostile_files_are_refused(script, run, tmp_path, refused):
    run()
    for name in NAMES:
        if name != script.SCRIPT:
            line = refused("--generate", 1, "--weights", WEIGHTS / f"{name}.pt")
            assert f"no generator of {script.SCRIPT}.py" in line
    cases = [("generator", "--generate", 1), ("checkpoint", "--resume", "--epochs", 2)]
    for name, *flags in cases:
        path = tmp_path / f"out/{name}.pt"
        saved = load(path)
        os.truncate(path, os.path.getsize(path) // 2)
        assert str(path) in refused(*flags)
        for content in ({**saved, "generator": Payload()}, [1]):
            torch.save(content, path)
            assert str(path) in refused(*flags)
        os.remove(path)
        assert str(path) in refused(*flags)
    saved = load(WEIGHTS / f"{script.SCRIPT}.pt")
    torch.save({**saved, "latent_dim": 10**12}, path)
    assert "size mismatch" in refused("--generate", 1, "--weights", path)  # not "can't allocate"
    if "classes" in saved:
        torch.save({**saved, "classes": saved["classes"][::-1]}, path)
        assert "other classes" in refused("--generate", 1, "--weights", path)


def test_data_that_cannot_be_read_or_downloaded(data, tmp_path, refused):
    broken = shutil.copytree(data, tmp_path / "truncated")
    for path in [*broken.glob("*/raw/train-*"), *broken.glob("*/data_batch_*")]:
        os.truncate(path, 100)
    (tmp_path / "file").touch()
    for folder in (broken, tmp_path / "missing", tmp_path / "file"):
        line = refused("--data-dir", folder)
        assert str(folder) in line and ".gz" in line
    assert str(tmp_path / "file") in refused("--output-dir", tmp_path / "file/below")


WRONG = """--epochs 0|--epochs x|--batch-size 0|--batch-size 121|--lr nan|--lr x|--beta1 1
--latent-dim 0|--width 0|--seed -1|--seed 400000|--log-every 0|--generate 0|--device abacus
--device cuda:99|--device xla|--weights x.pt|--no-such-flag|--label x|--label 1
--generate 1 --resume"""


def test_wrong_flags_are_refused(script, tmp_path, refused, monkeypatch):
    for flags in re.split(r"[|\n]", WRONG):
        assert flags.split()[0] in refused(*flags.split()), flags
    if script.SCRIPT == "mlp_gan_mnist":  # BatchNorm of single values needs two images
        assert "--batch-size" in refused("--batch-size", 1)
    if script.SCRIPT != "cgan_cifar10":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        assert "cgan_cifar10.py" in refused()
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    out = tmp_path / "out"
    assert not out.exists()
    out.mkdir()
    (out / "generator.pt").touch()  # without its checkpoint
    assert "--output-dir" in refused("--resume") and "--resume" not in refused()
    (out / "checkpoint.pt").touch()
    assert "--output-dir" in refused("--resume") and "--resume" in refused()


@conditional_only
def test_a_label_is_a_name_a_number_or_a_beginning(script, refused, monkeypatch):
    for text in ("", "10", "unicorn"):
        line = refused("--generate", 1, "--label", text)
        assert all(name in line for name in script.CLASSES)
    monkeypatch.setattr(script, "CLASSES", ["2", "bear", "Bear_polar", "cat"])
    for text, label in zip(("2", "1", "bear", "BEAR_P", "3", "c"), (0, 1, 1, 2, 3, 3), strict=True):
        assert script.find_label(text) == label


@conditional_only
def test_one_class_has_no_wrong_labels(script, monkeypatch):
    monkeypatch.setattr(script, "CLASSES", ["only"])
    loss = Mock(wraps=script.discriminator_loss)
    monkeypatch.setattr(script, "discriminator_loss", loss)
    tiny_gan(script).step(random_batch(script, 6)[0], torch.zeros(6, dtype=torch.long))
    real_logits, fake_logits = loss.call_args.args
    assert real_logits.shape == fake_logits.shape == (6,)


def test_a_mistake_in_ones_own_code_keeps_its_traceback(script, run, monkeypatch):
    monkeypatch.setattr(script.Generator, "forward", lambda *given: undefined_name)  # noqa: F821
    with pytest.raises(NameError):
        run()


# ---- the collection

# These may differ between the four files; anything else has the same text wherever it stands.
OWN = """Generator Discriminator GAN __init__ forward step update_bn train_epoch train load_images
sample load_generator generate save_generator make_parser parse_args"""


def test_shared_parts_are_the_same_text():
    texts, ends = {}, set()
    requirements = (HERE / "requirements.txt").read_text().split()
    for name in NAMES:
        code = (HERE / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(rf"^(from|import) ({'|'.join(NAMES)})\b", code, re.MULTILINE)
        dependencies = re.search(r"^# dependencies = (\[.*?\])", code, re.DOTALL | re.MULTILINE)[1]
        assert ast.literal_eval(dependencies.replace("#", "")) == requirements[:-1]
        ends.add(code.rpartition("\n\n\n")[2])
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN.split():
                text = ast.get_source_segment(code, node)
                assert texts.setdefault(node.name, text) == text, (name, node.name)
    assert len(ends) == 1


def test_readmes_commands_flags_defaults_and_links_are_real():
    parsers = {name: importlib.import_module(name).make_parser() for name in NAMES}
    docs = "".join(importlib.import_module(name).__doc__ for name in NAMES)
    # after a command, two spaces and what it does
    command = r"^    (?:python|uv run|torchrun [^.]*?) (\w+)\.py(.*?)(?:  |$)"
    commands = re.findall(command, README + docs, re.MULTILINE)
    defaults = re.findall(r"^\| \[\w+\]\((\w+)\.py\) \| (\d+) \| ", README, re.MULTILINE)
    assert len(commands) >= 17 and len(defaults) == 4
    parsers["my_gan"] = parsers["cgan_cifar10"]
    for name, flags in commands:
        parsers[name].parse_args(flags.split())
    for name, epochs in defaults:
        assert parsers[name].get_default("epochs") == int(epochs)
    helps = "".join(parser.format_help() for parser in parsers.values())
    known = helps + "--index-url --standalone --nproc-per-node --with-requirements"
    flag = r"--[a-z][a-z0-9-]*"
    assert set(re.findall(flag, README)) <= set(re.findall(flag, known))
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (HERE / link).exists(), link


@cifar_only
def test_readmes_command_draws_its_horses(script, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    flags = re.search(r"cgan_cifar10.py (--generate .*)", README)[1].split()
    script.main([*flags, "--device", "cpu", "--output-dir", str(tmp_path)])
    paths = [*tmp_path.iterdir(), HERE / ".github/pictures/horses.png"]
    drawn, shown = (pil_to_tensor(Image.open(path)).float() for path in paths)
    assert (drawn - shown).abs().mean() < 1  # grey levels: sums may be rounded in other ways


def test_readmes_examples_run(data, tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / ".github/weights")
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    picture, loop = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    assert "range(1000)" in loop
    for example, name, count in ((picture, "images", 8), (loop.replace("1000", "3"), "digits", 16)):
        names = {}
        exec(example, names)
        assert names[name].shape == (count, 1, 28, 28) and names[name].std() > 0


def own_script(classes, *edits, size="32"):
    """Return cgan_cifar10.py with the README's block for pictures of one's own."""
    block = re.search(r"```python\nCLASSES = .*?(\n\n\ndef .*?)\n```", README, re.DOTALL)[1]
    code = (HERE / "cgan_cifar10.py").read_text(encoding="utf-8")
    line = re.search(r"^CLASSES = .*$", code, re.MULTILINE)[0]
    function = re.search(r"\n\n\ndef load_images.*?(?=\n\n\n)", code, re.DOTALL)[0]
    edits = [(line, f"CLASSES = {classes}"), (function, re.sub(r"\b32\b", size, block)), *edits]
    return edited("cgan_cifar10", *edits)


@pytest.fixture
def pictures(tmp_path):
    """Make pictures of two classes, as people have them: red above or on the left, blue below."""
    folder = tmp_path / "pictures"
    for name in ("bear", "bear_polar"):
        (folder / name).mkdir(parents=True)
    upright = Image.new("RGB", (600, 700), "blue")
    upright.paste("red", (0, 0, 600, 350))
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF's orientation: what is shown on the left is above
    upright.save(folder / "bear/1.png")
    upright.rotate(90, expand=True).save(folder / "bear/2.jpg", exif=turned)
    upright.convert("P").save(folder / "bear/3.png")
    upright.convert("CMYK").save(folder / "bear/4.jpg")
    Image.new("RGBA", (50, 40), (9, 9, 9, 0)).save(folder / "bear_polar/snow.png")
    (folder / "bear_polar/notes.txt").touch()
    return folder


def test_readmes_block_reads_what_folders_hold(pictures, capsys, tmp_path):
    script = own_script(["bear", "bear_polar"])
    images, labels = script.load_images(pictures)
    assert capsys.readouterr().out == "images: {'bear': 4, 'bear_polar': 1}\n"
    assert len(images) == len(labels) > 31_000 and labels[:5].tolist() == [0, 0, 0, 0, 1]
    for image in images[:4].float():
        red, blue = image[:, 3, 16], image[:, 28, 16]
        assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]
    assert images[4].min() == 255
    for name, mode in (("grey.png", "I;16"), ("scan.tif", "F"), ("half.jpg", "RGB")):
        path = pictures / "bear" / name
        Image.new(mode, (400, 400)).save(path)
        if mode == "RGB":
            os.truncate(path, os.path.getsize(path) // 2)
        with pytest.raises(script.UsageError, match=name):
            script.load_images(pictures)
        path.unlink()
    (pictures / "empty").mkdir()
    for folder, message in ((pictures, "empty"), (tmp_path / "none", "none")):
        with pytest.raises(script.UsageError, match=message):
            script.load_images(folder)


@pytest.mark.parametrize(("size", "classes"), [("32", ["bear"]), ("64", ["bear", "bear_polar"])])
def test_readmes_block_trains(size, classes, pictures, tmp_path, monkeypatch):
    table = re.findall(r"^\| `(nn.*)` \| `(nn.*)` \|$", README, re.MULTILINE)
    assert len(table) == 2
    script = own_script(classes, *(table if size == "64" else ()), size=size)
    for folder in pictures.iterdir():
        if folder.name not in classes:
            shutil.rmtree(folder)
    loaded = [part[:22] for part in script.load_images(pictures)]
    monkeypatch.setattr(script, "load_images", lambda folder: loaded)
    out = tmp_path / "out"
    flags = f"--device cpu --epochs 1 --width 4 --batch-size 22 --output-dir {out}"
    script.main(flags.split())
    generator = script.load_generator(out / "generator.pt")
    images = script.sample(generator, torch.randn(2, 100), torch.tensor([0, 0]))
    assert images.shape == (2, 3, int(size), int(size))
    cell = 2 * int(size) + 2  # in real.png, a row for each name
    expected = (100 + 10 * cell + 2, len(classes) * cell + 2)
    assert Image.open(out / "real.png").size == expected
