"""Tests of the four scripts on tiny data sets made here: no network, no GPU, a minute or so."""
import argparse
import ast
import csv
import difflib
import gzip
import importlib
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torchvision import datasets

NAMES = ["mlp_gan_mnist", "dcgan_mnist", "cgan_fashion_mnist", "cgan_cifar10"]
SHAPES = {name: (3, 32, 32) if name == "cgan_cifar10" else (1, 28, 28) for name in NAMES}
HERE = Path(__file__).parent
N = 120  # tiny training images: 12 of each class


def conditional(script):
    return hasattr(script, "CLASSES")


def extra(script, labels):
    """The further arguments of a conditional script's networks."""
    return (labels,) if conditional(script) else ()


def asked(script, n):
    """What sample() takes to draw n images."""
    return torch.arange(n) % 10 if conditional(script) else n


def write_idx(path, dims, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = 2048 + len(dims)
    path.write_bytes(struct.pack(f">{1 + len(dims)}I", magic, *dims) + bytes(values))


def make_data(folder):
    """Lay tiny data sets out as torchvision's downloads do."""
    torch.manual_seed(0)
    labels = [i % 10 for i in range(N)]
    for dataset in ("MNIST", "FashionMNIST"):
        for split in ("train", "t10k"):
            pixels = torch.randint(0, 256, (N * 784,), dtype=torch.uint8).tolist()
            write_idx(folder / dataset / "raw" / f"{split}-images-idx3-ubyte", (N, 28, 28), pixels)
            write_idx(folder / dataset / "raw" / f"{split}-labels-idx1-ubyte", (N,), labels)
    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
                 "test_batch"]:
        part = torch.randint(0, 256, (N // 5, 3072), dtype=torch.uint8).numpy()
        (cifar / name).write_bytes(pickle.dumps({"data": part, "labels": labels[:N // 5]}))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No download gets out; CIFAR-10's tiny files needn't have the published MD5."""
    def refuse(*args, **kwargs):
        raise URLError("no network in the tests")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("train_list", "test_list"):
        files = [[file, None] for file, _ in getattr(datasets.CIFAR10, name)]
        monkeypatch.setattr(datasets.CIFAR10, name, files)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})


@pytest.fixture(params=NAMES)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def run(script, data, tmp_path, monkeypatch):
    """Run the script's command line with tiny data and networks, by default into tmp_path/out."""
    for network in (script.Generator, script.Discriminator):
        narrow = (*network.__init__.__defaults__[:-1], 8)
        monkeypatch.setattr(network.__init__, "__defaults__", narrow)

    def run(*flags):
        script.main(["--data-dir", str(data), "--output-dir", str(tmp_path / "out"),
                     "--batch-size", "60", "--epochs", "1", *map(str, flags)])
    return run


@pytest.fixture
def refused(capsys):
    """Call with a function: it must end with one line on stderr and the status; return the line."""
    def refused(call, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        line = capsys.readouterr().err
        assert stop.value.code == status, line
        assert line.count("\n") == 1 and line.endswith("\n"), line
        return line.strip()
    return refused


def saved(path, script):
    return torch.load(path, weights_only=True)[script.SCRIPT]


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- networks

def test_networks_have_the_promised_shapes_and_ranges(script):
    shape, labels = SHAPES[script.__name__], torch.tensor([0, 3, 9, 9])
    for latent_dim, width in ((7, 8), (100, 16)):
        generator = script.Generator(latent_dim=latent_dim, width=width)
        discriminator = script.Discriminator(width=width)
        assert generator.latent_dim == latent_dim
        images = generator(10 * torch.randn(4, latent_dim), *extra(script, labels))
        assert images.shape == (4, *shape)
        assert images.min() >= -1 and images.max() <= 1 and images.std() > 0
        assert discriminator(images, *extra(script, labels)).shape == (4,)
        with pytest.raises(RuntimeError):  # 16x16 images, as a smaller generator would draw
            discriminator(torch.zeros(4, shape[0], 16, 16), *extra(script, labels))


def test_every_parameter_gets_a_gradient(script):
    generator, discriminator = script.Generator(), script.Discriminator()
    labels = torch.arange(10)
    fake = generator(torch.randn(10, generator.latent_dim), *extra(script, labels))
    script.generator_loss(discriminator(fake, *extra(script, labels))).backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad.abs().sum() > 0


def test_losses_are_the_papers(script):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.isclose(script.discriminator_loss(real, fake), expected)
    assert torch.isclose(script.generator_loss(fake), -d_fake.log().mean())
    assert script.generator_loss(torch.tensor([-200.0])) == 200  # Sigmoid + BCELoss stops at 100


def test_labels_reach_both_networks(script):
    if not conditional(script):
        pytest.skip("no labels")
    generator, discriminator = script.Generator().eval(), script.Discriminator().eval()
    noise = torch.randn(1, generator.latent_dim)
    images = [generator(noise, torch.tensor([label])) for label in range(10)]
    logits = [discriminator(images[0], torch.tensor([label])).item() for label in range(10)]
    assert len({image.sum().item() for image in images}) == len(set(logits)) == 10
    pairs = discriminator(images[0], torch.tensor([[3], [7]]))
    assert pairs.shape == (2, 1) and pairs[:, 0].tolist() == pytest.approx([logits[3], logits[7]])
    torch.manual_seed(0)
    one = script.sample(generator, [0])
    torch.manual_seed(0)
    assert not torch.equal(one, script.sample(generator, [9]))


def test_noise_on_images_is_for_the_training_discriminator_alone():
    discriminator = importlib.import_module("cgan_cifar10").Discriminator()
    inputs = torch.zeros(4, 3, 32, 32), torch.arange(4)
    assert not torch.equal(discriminator(*inputs), discriminator(*inputs))
    assert inputs[0].abs().max() == 0
    discriminator.eval()
    assert torch.equal(discriminator(*inputs), discriminator(*inputs))


# ---- a run and what it leaves

def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys):
    run("--epochs", 2, "--log-every", 1, "--save-every", 2)
    printed = capsys.readouterr()
    assert "Step 3: Generator loss: " in printed.out and ", discriminator loss: " in printed.out
    assert "Epoch 2/2: " in printed.out and " images/s" in printed.out
    assert f"{N} images, to {tmp_path / 'out'}" in printed.out
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt",
                     "checkpoint.pt", "weights/epoch_0002.pt", "samples/epoch_0000.png",
                     "samples/epoch_0001.png", "samples/epoch_0002.png"}
    for path in (*out.glob("*.png"), *out.glob("samples/*.png")):
        Image.open(path).load()
    size = Image.open(out / "real.png").size
    assert size == Image.open(out / "samples/epoch_0002.png").size
    animation = Image.open(out / "samples.gif")
    assert animation.size == size and animation.n_frames > 1  # like frames become one
    rows = list(csv.DictReader((out / "losses.csv").open()))
    assert list(rows[0]) == ["epoch", "step", "discriminator_loss", "generator_loss", "seconds"]
    assert [(row["epoch"], row["step"]) for row in rows] == [
        ("1", "1"), ("1", "2"), ("2", "3"), ("2", "4")]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_run_trains_both_networks(script, run, tmp_path):
    run()
    state = saved(tmp_path / "out/checkpoint.pt", script)["parts"]
    torch.manual_seed(0)  # as a run begins: its networks before training
    networks = {"generator": script.Generator(), "discriminator": script.Discriminator()}
    for name, network in networks.items():
        if hasattr(script, "initialize_weights"):
            network.apply(script.initialize_weights)
        for key, before in network.named_parameters():
            assert not torch.equal(state[name][key], before), f"{name}.{key} didn't move"
    average, live = state["average"], state["generator"]
    for key, before in networks["generator"].named_parameters():  # the average: moved, and behind
        assert not torch.equal(average[key], before) and not torch.equal(average[key], live[key])
    for key in [key for key in average if "running" in key]:  # of what the average draws
        assert not torch.equal(average[key], live[key]) and average[key].std() > 0


def test_loss_rows_are_means_since_the_row_before(script, run, tmp_path, monkeypatch):
    losses, original = [], script.generator_loss

    def recorded(logits):
        losses.append(original(logits))
        return losses[-1]
    monkeypatch.setattr(script, "generator_loss", recorded)
    run("--batch-size", 24, "--log-every", 3)  # 5 steps: rows at 3 and 5
    rows = list(csv.DictReader((tmp_path / "out/losses.csv").open()))
    expected = [torch.stack(part).mean().item() for part in (losses[:3], losses[3:])]
    assert [float(row["generator_loss"]) for row in rows] == pytest.approx(expected, rel=1e-5)


def test_real_images_count_as_fake_under_another_label(script, run, monkeypatch):
    if not conditional(script):
        pytest.skip("no labels")
    calls, losses = [], []

    class Recorded(script.Discriminator):
        def forward(self, images, labels):
            calls.append((labels, super().forward(images, labels)))
            return calls[-1][1]
    original = script.discriminator_loss
    monkeypatch.setattr(script, "Discriminator", Recorded)
    monkeypatch.setattr(script, "discriminator_loss",
                        lambda *logits: losses.append(logits) or original(*logits))
    run("--batch-size", 120)
    (pairs, of_real), (labels, of_fake) = calls[:2]
    assert torch.equal(pairs[0], labels) and len(labels.unique()) == 10
    distance = (pairs[1] - labels) % 10
    assert set(distance.tolist()) == set(range(1, 10))
    assert torch.equal(losses[0][0], of_real[0])
    assert torch.equal(losses[0][1], torch.cat((of_fake, of_real[1])))


def test_seed_and_epoch_govern_what_is_drawn(script, run, tmp_path, monkeypatch):
    drawn, original = [], torch.randn

    def recorded(*size, **options):
        drawn.append(original(*size, **options))
        return drawn[-1]
    monkeypatch.setattr(torch, "randn", recorded)
    flags = ("--epochs", 2, "--batch-size", 120, "--output-dir")
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(*flags, tmp_path / folder, "--seed", seed)
    noise = [values for values in drawn if len(values) == 120]  # of the steps, not of the grids
    assert len(noise) == 6 and not torch.equal(noise[0], noise[1])  # an epoch of one step each
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[1], noise[3])
    assert not torch.equal(noise[0], noise[4])
    pictures = [(tmp_path / name / "samples/epoch_0002.png").read_bytes()
                for name in ("one", "again", "other")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_real_images_are_shown_as_they_are(script, run, data, tmp_path):
    run()
    picture = Image.open(tmp_path / "out/real.png").convert("RGB")
    images = script.load_images(data)
    first = images[0][0] if conditional(script) else images[0]  # label 0 is the first image's
    left = picture.width - (10 if conditional(script) else 8) * (2 * SHAPES[script.__name__][1] + 2)
    for y, x in ((0, 0), (5, 9), (27, 27)):
        pixel = picture.getpixel((left + 2 * x, 2 + 2 * y))
        assert all(abs(a - b) <= 1 for a, b in zip(pixel, first[:, y, x].expand(3).tolist()))


def test_generate_draws_what_the_weights_hold(script, run, tmp_path, capsys):
    run()
    weights = torch.load(tmp_path / "out/generator.pt", weights_only=True)
    for values in weights[script.SCRIPT]["generator"].values():
        if values.dim() > 1:
            values.normal_()  # so that images differ from one another
    torch.save(weights, tmp_path / "out/generator.pt")
    capsys.readouterr()
    run("--generate", 2, "--seed", 6)
    other = Path(capsys.readouterr().out.strip())
    run("--generate", 2, "--seed", 5)
    path = Path(capsys.readouterr().out.strip())
    assert path != other and path.read_bytes() != other.read_bytes()
    assert path.parent == tmp_path / "out" and "seed_5" in path.name
    generator = script.load_generator(tmp_path / "out/generator.pt")
    assert not generator.training
    torch.manual_seed(5)
    labels = torch.arange(10).repeat_interleave(2)
    images = script.sample(generator, labels if conditional(script) else 2)
    size = 2 * images.shape[-1]
    picture = Image.open(path).convert("RGB")
    left = picture.width - 2 * (size + 2)
    for column, image in enumerate(images[:2]):
        for y, x in ((3, 4), (14, 14), (25, 20)):
            pixel = picture.getpixel((left + column * (size + 2) + 2 * x, 2 + 2 * y))
            drawn = image[:, y, x].mul(255).expand(3).tolist()
            assert all(abs(a - b) <= 1.5 for a, b in zip(pixel, drawn))


def test_sample_follows_torchs_seed_and_range(script):
    generator = script.Generator().eval()
    torch.manual_seed(1)
    one = script.sample(generator, asked(script, 501))  # more than it draws at once
    torch.manual_seed(1)
    assert torch.equal(one, script.sample(generator, asked(script, 501)))
    assert not torch.equal(one, script.sample(generator, asked(script, 501)))
    assert one.shape == (501, *SHAPES[script.__name__]) and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1 and not one.requires_grad


def test_bf16_trains_too(script, run, tmp_path, capsys):
    run("--precision", "bf16")
    assert "bf16" in capsys.readouterr().out
    assert saved(tmp_path / "out/generator.pt", script)["generator"]["network.0.weight"].dtype == (
        torch.float32)


def test_a_label_draws_its_class_only(script, run, tmp_path, capsys):
    if not conditional(script):
        pytest.skip("no labels")
    run()
    capsys.readouterr()
    drawn = []
    for text in ("1", script.CLASSES[1], script.CLASSES[1].upper(), script.CLASSES[1][:3].lower()):
        assert script.find_label(text) == 1
        run("--generate", 3, "--label", text)
        drawn.append(Path(capsys.readouterr().out.strip()).read_bytes())
    generator = script.load_generator(tmp_path / "out/generator.pt")
    torch.manual_seed(0)
    script.save_grid(tmp_path / "expected.png", script.sample(generator, [1, 1, 1]))
    assert drawn == [(tmp_path / "expected.png").read_bytes()] * 4


def test_a_label_that_begins_another_is_found_by_its_whole_name(script, monkeypatch):
    if not conditional(script):
        pytest.skip("no labels")
    monkeypatch.setattr(script, "CLASSES", ["caterpillar", "Cat"])
    assert [script.find_label(text) for text in ("cat", "Cate", "1")] == [1, 0, 1]
    with pytest.raises(argparse.ArgumentTypeError):
        script.find_label("ca")


# ---- resume: exact, and nothing is lost

SLOW_COLUMNS = 4  # of losses.csv: without the seconds


def outcome(folder, script):
    checkpoint = saved(folder / "checkpoint.pt", script)
    files = {path.relative_to(folder): content for path, content in tree(folder).items()
             if path.suffix in (".png", ".gif")}
    rows = [row[:SLOW_COLUMNS] for row in csv.reader((folder / "losses.csv").open())]
    return checkpoint["parts"], saved(folder / "generator.pt", script), files, rows


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def interrupt_at(script, monkeypatch, step, action):
    """Have the generator's loss call `action` at that step of the runs that follow."""
    calls, original = [], script.generator_loss

    def loss(logits):
        calls.append(1)
        return action(original(logits)) if len(calls) == step else original(logits)
    monkeypatch.setattr(script, "generator_loss", loss)


def ctrl_c(loss):
    raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_bits(script, run, data, tmp_path, monkeypatch,
                                                     refused):
    flags = ("--epochs", 4, "--log-every", 3, "--save-every", 2, "--seed", 3)
    run(*flags, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(script, patch, 6, ctrl_c)  # the last step of epoch 3 of 4
        line = refused(lambda: run(*flags), status=130)
    assert line == "stopped; --resume goes on after the last finished epoch, if any"
    script.main(["--data-dir", str(data), "--output-dir", str(tmp_path / "out"), "--resume"])
    assert same(outcome(tmp_path / "whole", script), outcome(tmp_path / "out", script))


def test_resume_may_change_epochs_and_lr_but_not_the_run(script, run, tmp_path, refused):
    run("--seed", 7)
    before = tree(tmp_path / "out")
    for flags in (["--seed", 8], ["--latent-dim", 5], ["--beta1", 0.9], ["--batch-size", 9]):
        line = refused(lambda: run("--resume", *flags))
        assert flags[0] in line
    assert tree(tmp_path / "out") == before
    run("--resume", "--epochs", 2, "--lr", 0.000123)
    checkpoint = saved(tmp_path / "out/checkpoint.pt", script)
    assert checkpoint["epoch"] == 2 and checkpoint["settings"]["seed"] == 7
    for optimizer in ("optimizer_g", "optimizer_d"):
        assert checkpoint["parts"][optimizer]["param_groups"][0]["lr"] == 0.000123
    run("--resume", "--epochs", 1)  # it has two already
    assert saved(tmp_path / "out/checkpoint.pt", script)["settings"]["epochs"] == 2


def test_a_finished_run_resumed_makes_missing_files_again(script, run, tmp_path, capsys):
    run()
    before = {path: content for path, content in tree(tmp_path / "out").items()
              if path.suffix in (".png", ".gif", ".csv")}
    for name in ("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt",
                 "samples/epoch_0001.png"):
        (tmp_path / "out" / name).unlink()
    run("--resume")
    assert "Finished" in capsys.readouterr().out
    after = tree(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    script.load_generator(tmp_path / "out/generator.pt")


def test_a_folder_with_a_run_is_kept_unless_overwritten(script, run, tmp_path, refused):
    run("--epochs", 2, "--save-every", 1)
    before = tree(tmp_path / "out")
    line = refused(run)
    assert "--resume" in line and "--overwrite" in line
    assert tree(tmp_path / "out") == before
    strangers = [tmp_path / "out" / name for name in ("notes.txt", "samples/epoch_best.png")]
    for path in strangers:
        path.write_text("mine")
    refused(lambda: run("--overwrite", "--data-dir", tmp_path / "nowhere"))  # no data, no removal
    assert all(path.exists() for path in before)
    run("--overwrite")
    left = set(tree(tmp_path / "out"))
    assert set(strangers) <= left and tmp_path / "out/samples/epoch_0002.png" not in left
    assert tmp_path / "out/weights/epoch_0001.pt" not in left


def test_a_full_disk_leaves_the_old_file_whole(script, tmp_path, monkeypatch):
    path = tmp_path / "file"
    script.write_file(path, lambda file: file.write(b"old"))
    original = Path.write_bytes

    def half(self, content):
        assert self != path  # only os.replace touches it
        original(self, bytes(content)[:1])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(script.UsageError, match="can't write .*file.*No space left"):
        script.write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

    def aside(self, content):
        assert self != path
        original(self, content)
    monkeypatch.setattr(Path, "write_bytes", aside)
    script.write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_nan_stops_the_run_and_keeps_the_checkpoint(script, run, tmp_path, monkeypatch, refused):
    run()
    before = outcome(tmp_path / "out", script)
    interrupt_at(script, monkeypatch, 1, lambda loss: loss * float("nan"))
    line = refused(lambda: run("--resume", "--epochs", 2))
    assert "step 4" in line and "--lr" in line  # noticed at the epoch's end
    assert same(outcome(tmp_path / "out", script), before)
    assert saved(tmp_path / "out/checkpoint.pt", script)["epoch"] == 1


# ---- more than one device

WORKER = """
import sys
import torch
from torch import nn
from torchvision import datasets
import cgan_cifar10
for name in ("train_list", "test_list"):
    setattr(datasets.CIFAR10, name, [[file, None] for file, _ in getattr(datasets.CIFAR10, name)])
datasets.CIFAR10.meta = {**datasets.CIFAR10.meta, "md5": None}
for network in (cgan_cifar10.Generator, cgan_cifar10.Discriminator):
    network.__init__.__defaults__ = (*network.__init__.__defaults__[:-1], 8)
nn.BatchNorm2d = lambda channels: nn.Identity()  # its statistics are each process's own
torch.randn_like = torch.zeros_like  # so is the noise on the discriminator's images,
torch.randint_like = lambda labels, *ends: torch.ones_like(labels)  # and so are the wrong labels
cgan_cifar10.initialize_weights = lambda layer: None  # without BatchNorm too small for gradients
cgan_cifar10.main()
"""


@pytest.fixture
def torchrun(tmp_path):
    """Run cgan_cifar10.py's command line in two processes, without BatchNorm."""
    def torchrun(*flags):
        (tmp_path / "worker.py").write_text(WORKER)
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             tmp_path / "worker.py", *map(str, flags)], cwd=tmp_path, capture_output=True,
            text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(HERE)})
    return torchrun


@pytest.mark.parametrize("script", [importlib.import_module("cgan_cifar10")])
def test_two_processes_compute_what_one_does(script, run, torchrun, data, tmp_path, monkeypatch):
    out, flags = tmp_path / "two", ("--device", "cpu", "--batch-size", 50, "--log-every", 1)
    done = torchrun("--data-dir", data, "--output-dir", out, "--epochs", 1, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Step 1: ") == done.stdout.count("Finished") == 1
    assert "Warning" not in done.stderr
    monkeypatch.setattr(torch.nn, "BatchNorm2d", lambda channels: torch.nn.Identity())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "randint_like", lambda labels, *ends: torch.ones_like(labels))
    monkeypatch.setattr(script, "initialize_weights", lambda layer: None)
    run("--epochs", 1, *flags)
    rows = [list(csv.DictReader((folder / "losses.csv").open()))
            for folder in (tmp_path / "out", out)]
    for column in ("discriminator_loss", "generator_loss"):
        assert [float(row[column]) for row in rows[0]] == pytest.approx(
            [float(row[column]) for row in rows[1]], rel=1e-4)
    for part in ("generator", "discriminator", "average"):
        one, two = (saved(folder / "checkpoint.pt", script)["parts"][part]
                    for folder in (tmp_path / "out", out))
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), (part, name)
    for folder in (tmp_path / "out", out):  # a checkpoint of two goes on in one
        script.main(["--data-dir", str(data), "--output-dir", str(folder), "--resume",
                     "--epochs", "2", "--device", "cpu"])
    one, two = (saved(folder / "generator.pt", script)["generator"]
                for folder in (tmp_path / "out", out))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-4), name
    assert set(map(Path.name.fget, tree(out))) == set(map(Path.name.fget, tree(tmp_path / "out")))


# ---- files from strangers

class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def bad_files(folder, script, whole):
    folder.mkdir()
    (folder / "directory.pt").mkdir()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("weights")
    (folder / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({script.SCRIPT: {"generator": Payload(folder / "trace")}}, folder / "payload.pt")
    torch.save({"another_script": {"latent_dim": 2, "width": 2}}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({script.SCRIPT: {"latent_dim": 3, "width": 8, "epoch": 1, "rows": [], "parts": {},
                                "generator": script.Generator().state_dict()}}, folder / "size.pt")
    return sorted(folder.glob("*.pt")) + [folder / "missing.pt"]


def test_files_that_hold_no_generator_are_refused(script, run, tmp_path, refused):
    run()
    for path in bad_files(tmp_path / "bad", script, (tmp_path / "out/generator.pt").read_bytes()):
        line = refused(lambda: run("--generate", 1, "--weights", path))
        assert f"{path} holds no generator of {script.SCRIPT}" in line
        with pytest.raises(script.UsageError):
            script.load_generator(path)
    assert not (tmp_path / "bad/trace").exists()


def test_files_that_hold_no_run_are_refused(script, run, tmp_path, refused):
    run()
    checkpoint = tmp_path / "out/checkpoint.pt"
    whole = checkpoint.read_bytes()
    for path in bad_files(tmp_path / "bad", script, whole):
        checkpoint.unlink(missing_ok=True)
        if path.is_file():
            checkpoint.write_bytes(path.read_bytes())
        before = tree(tmp_path / "out")
        line = refused(lambda: run("--resume"))
        assert f"{checkpoint} holds no run of {script.SCRIPT}" in line
        assert tree(tmp_path / "out") == before
    assert not (tmp_path / "bad/trace").exists()


# ---- data

FOLDERS = {"mlp_gan_mnist": "MNIST/raw", "dcgan_mnist": "MNIST/raw",
           "cgan_fashion_mnist": "FashionMNIST/raw", "cgan_cifar10": "cifar-10-batches-py"}


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "not a folder"])
def test_unusable_data_gets_one_line(script, run, data, tmp_path, refused, damage):
    broken = tmp_path / "data"
    if damage == "not a folder":
        broken.write_text("")
    elif damage != "missing":
        broken.mkdir()
        make_data(broken)
        files = "*_batch*" if script.SCRIPT == "cgan_cifar10" else "train-*"
        for path in (broken / FOLDERS[script.SCRIPT]).glob(files):
            path.write_bytes(path.read_bytes()[:1000 if damage == "truncated" else 0])
    line = refused(lambda: run("--data-dir", broken))
    assert str(broken) in line and "http" in line and (".gz" in line)
    assert not (tmp_path / "out").exists()


def test_images_are_loaded_the_right_way_round(script, data):
    images = script.load_images(data)
    images, labels = images if conditional(script) else (images, None)
    folder = data / FOLDERS[script.SCRIPT]
    if script.SCRIPT == "cgan_cifar10":
        raw = pickle.loads((folder / "data_batch_1").read_bytes())["data"][1].tobytes()
    else:
        raw = (folder / "train-images-idx3-ubyte").read_bytes()[16 + 784:16 + 2 * 784]
    assert images.shape == (N, *SHAPES[script.SCRIPT]) and images.dtype == torch.uint8
    assert bytes(images[1].flatten().tolist()) == raw
    assert labels is None or (labels[1] == 1 and labels.shape == (N,))


def test_files_fetched_by_hand_are_used(data, tmp_path, monkeypatch):
    script = importlib.import_module("dcgan_mnist")
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in (data / "MNIST/raw").iterdir():
        (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    files = [(name, None) for name, _ in datasets.MNIST.resources]  # None: of any MD5
    monkeypatch.setattr(datasets.MNIST, "resources", files)
    assert len(script.load_images(tmp_path)) == N


# ---- the command line

WRONG = [["--epochs", "0"], ["--epochs", "-1"], ["--epochs", "x"], ["--epochs", "1e3"],
         ["--epochs", "100000000"], ["--batch-size", "0"], ["--batch-size", "1"],
         ["--batch-size", "nan"], ["--lr", "0"], ["--lr", "-1"], ["--lr", "nan"], ["--lr", "inf"],
         ["--lr", "x"], ["--beta1", "1"], ["--beta1", "-0.1"], ["--beta1", "nan"],
         ["--latent-dim", "0"], ["--latent-dim", "10000000000"], ["--seed", "-1"],
         ["--seed", "0.5"], ["--log-every", "0"], ["--sample-every", "0"], ["--save-every", "0"],
         ["--generate", "0"], ["--generate", "-4"], ["--device", "abacus"], ["--device", "meta"],
         ["--device", "cuda:99"], ["--precision", "fp8"], ["--weights", "x.pt"], ["--no-such-flag"],
         ["--resume", "--overwrite"], ["--batch-size", "121"], ["--label", "x"]]


def test_wrong_flags_are_refused_in_one_line(script, run, tmp_path, refused):
    for flags in WRONG:
        line = refused(lambda: run(*flags))
        assert flags[0] in line, line
        assert not (tmp_path / "out").exists(), flags
    if conditional(script):
        for text in ("", "s" if "fashion" in script.SCRIPT else "a", "10", "unicorn"):
            line = refused(lambda: run("--generate", 1, "--label", text))
            assert all(name in line for name in script.CLASSES)
        assert "--label" in refused(lambda: run("--label", "1"))


def test_an_output_folder_that_cannot_be_is_refused(run, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert str(tmp_path / "file") in refused(lambda: run("--output-dir", place))
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and f"outputs/{script.SCRIPT}" in text
    epochs = {"mlp_gan_mnist": 25, "cgan_cifar10": 200}.get(script.SCRIPT, 50)
    assert f"(default: {epochs})" in text


# ---- the collection

# What makes them different GANs; all else that two files share by name is the same text.
OWN = {"mlp_gan_mnist": {"Generator", "Discriminator", "train"},
       "dcgan_mnist": {"train"},
       "cgan_fashion_mnist": {"Generator", "Discriminator", "load_images", "sample", "save_grid",
                              "save_epoch", "generate", "train", "parse_args"},
       "cgan_cifar10": {"Generator", "Discriminator", "load_images", "sample", "save_grid",
                        "save_epoch", "generate", "train", "parse_args"}}


def definitions(name):
    text = (HERE / f"{name}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_shared_parts_are_the_same_text():
    everything = {name: definitions(name) for name in NAMES}
    for name in NAMES[:1] + NAMES[2:]:
        for part, text in everything["dcgan_mnist"].items():
            if part in everything[name] and part not in OWN[name] and part != "parse_args":
                assert everything[name][part] == text, f"{part} of {name}.py has drifted"
    for part in ("save_grid", "save_epoch", "generate", "find_label", "main"):
        assert everything["cgan_fashion_mnist"][part] == everything["cgan_cifar10"][part]


def test_readme_names_real_flags_scripts_and_defaults(capsys):
    text = (HERE / "README.md").read_text()
    helps = {}
    for name in NAMES:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        helps[name] = capsys.readouterr().out
    commands = re.findall(r"^    python (\w+)\.py(.*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for name, flags in commands:
        assert all(flag in helps[name] for flag in re.findall(r"--[a-z-]+", flags)), (name, flags)
    torchrun = "--standalone --nproc-per-node --nnodes --node-rank --master-addr"
    known = "".join(helps.values()) + "--index-url" + torchrun
    assert all(flag in known for flag in re.findall(r"--[a-z-]+[a-z]", text))
    for name, epochs in re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", text, re.MULTILINE):
        parser = helps[name].split("--epochs EPOCHS")[1].split("--batch-size")[0]
        assert f"(default: {epochs})" in " ".join(parser.split()), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (HERE / link).exists(), link


# How many lines of train and parse_args differ from dcgan_mnist.py's: for labels and torchrun.
DIFFERENT = {"mlp_gan_mnist": (2, 2), "cgan_fashion_mnist": (18, 9), "cgan_cifar10": (52, 14)}


@pytest.mark.parametrize("name", DIFFERENT)
def test_loops_and_flags_differ_only_where_the_method_does(name):
    ours, theirs = definitions("dcgan_mnist"), definitions(name)
    changed = [sum(line[0] in "+-" for line in difflib.ndiff(ours[part].splitlines(),
                                                             theirs[part].splitlines()))
               for part in ("train", "parse_args")]
    assert tuple(changed) == DIFFERENT[name]


def test_files_are_short_and_stand_alone():
    for name in NAMES:
        text = (HERE / f"{name}.py").read_text()
        assert text.startswith("# SPDX-License-Identifier: MIT\n")
        assert len(text.splitlines()) <= 380
        assert max(map(len, text.splitlines())) <= 100
        imported = {node.module if isinstance(node, ast.ImportFrom) else alias.name
                    for node in ast.walk(ast.parse(text))
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not imported & set(NAMES)
