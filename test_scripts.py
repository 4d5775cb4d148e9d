"""Tests of the four scripts on tiny data sets made here: no network, no GPU, under a minute."""

import ast
import csv
import importlib
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import defaultdict, namedtuple
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar

NAMES = ["mlp_gan_mnist", "dcgan_mnist", "cgan_fashion_mnist", "cgan_cifar10"]
HERE = Path(__file__).parent
WEIGHTS = HERE / ".github/weights"
README = (HERE / "README.md").read_text(encoding="utf-8")
N = 120  # tiny training images
Call = namedtuple("Call", "args options result")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Lay tiny data sets out as torchvision's downloads do; an image's top row shows its label."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data")
    labels = torch.arange(N, dtype=torch.uint8) % 10
    for dataset, offset in (("MNIST", 100), ("FashionMNIST", 0)):
        pixels = torch.randint(0, 256, (N, 28 * 28), dtype=torch.uint8)
        pixels[:, :28] = labels.unsqueeze(1) + offset
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
cifar_only = pytest.mark.parametrize("script", ["cgan_cifar10"], indirect=True)


@pytest.fixture
def run(script, data, tmp_path):
    """Run the script's command line with tiny data and networks, by default into tmp_path/out."""

    def run(*flags):
        tiny = ["--device", "cpu", "--data-dir", data, "--output-dir", tmp_path / "out"]
        tiny += ["--batch-size", 60, "--epochs", 1, "--width", 8]
        script.main([str(flag) for flag in (*tiny, *flags)])

    return run


@pytest.fixture
def refused(run, tmp_path, capsys):
    """Run a command line that must exit with one line, or argparse's usage and line; return it."""

    def refused(*flags, status=2):
        before = tree(tmp_path / "out")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == status, lines
        assert len(lines) == 1 or lines[0].startswith("usage: "), lines
        assert status != 2 or tree(tmp_path / "out") == before  # not a file has changed
        return lines[-1]

    return refused


@pytest.fixture
def spy(monkeypatch):
    """Return the growing list of a function's calls.

    Each result goes through `change`, with the number of the call, 1 for the first from now on.
    """

    def spy(owner, name, change=lambda number, result: result):
        function = getattr(owner, name)
        calls = []

        def recorded(*args, **options):
            calls.append(Call(args, options, function(*args, **options)))
            return change(len(calls), calls[-1].result)

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return spy


def ctrl_c_at(number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    return lambda step, losses: signal.raise_signal(signal.SIGINT) if step == number else losses


def load(path):
    return torch.load(path, weights_only=True)


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tiny_gan(script):
    return script.GAN(script.Generator(width=8), script.Discriminator(width=8), lr=0.01)


def random_batch(script, n):
    """Return random images and, for the conditional scripts, labels, as GAN.step takes them."""
    shape = (3, 32, 32) if script.SCRIPT == "cgan_cifar10" else (1, 28, 28)
    images = torch.rand(n, *shape) * 2 - 1
    return (images, torch.arange(n) % 10) if hasattr(script, "CLASSES") else (images,)


# ---- networks and steps


def test_networks_have_the_promised_shapes(script):
    real, *labels = random_batch(script, 4)
    generator = script.Generator(latent_dim=7, width=8)
    discriminator = script.Discriminator(width=8)
    assert (generator.latent_dim, generator.width) == (7, 8)
    assert generator(torch.randn(4, 7), *labels).shape == real.shape
    assert discriminator(real).shape == ((4, 10) if labels else (4,))
    for size in (16, 40):  # as a smaller or larger generator would make
        with pytest.raises(RuntimeError):
            discriminator(torch.zeros(4, real.shape[1], size, size))


@pytest.mark.parametrize("script", NAMES[:2], indirect=True)
def test_the_largest_of_the_first_ten_numbers_chooses_the_kind(script, spy):
    generator = script.Generator(width=8)
    calls = spy(generator.network, "forward")
    noise = torch.randn(10, generator.latent_dim)
    noise[:, :10] += 20 * torch.eye(10)
    generator(noise)
    assert torch.equal(calls[0].args[0], torch.cat((noise, 10 * torch.eye(10)), dim=1))


def test_losses_are_the_papers(script):
    real = torch.tensor([2.0, -1.0])
    fake = torch.tensor([0.5, 3.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.isclose(script.discriminator_loss(real, fake), expected)
    assert torch.isclose(script.generator_loss(fake), -fake.sigmoid().log().mean())
    assert script.generator_loss(torch.tensor([-200.0])) == 200  # Sigmoid + BCELoss stops at 100


def test_a_step_takes_the_right_answers_for_its_losses(script, spy, monkeypatch):
    monkeypatch.setattr(script, "augment", lambda images: images, raising=False)  # CIFAR-10's
    answers = spy(script.Discriminator, "forward")
    losses_d = spy(script, "discriminator_loss")
    losses_g = spy(script, "generator_loss")
    real, *labels = random_batch(script, 200)
    tiny_gan(script).step(real, *labels)
    first, detached, fake = (answer.args[1] for answer in answers)
    assert first is real and torch.equal(detached, fake)  # the same fakes twice
    assert fake.requires_grad and not detached.requires_grad
    real_logits, fake_logits, logits_for_generator = (answer.result for answer in answers)
    positives, negatives = losses_d[0].args
    if not labels:
        assert positives is real_logits and negatives is fake_logits
        assert losses_g[0].args[0] is logits_for_generator
        return
    image = torch.arange(200)
    (own,) = labels
    every, weight = (1, 2) if script.SCRIPT == "cgan_cifar10" else (8, 1)
    some = image[::every]
    wrong = (real_logits[some] == negatives[200:][: len(some), None]).int().argmax(dim=1)
    assert not (wrong == own[some]).any() and len(((wrong - own[some]) % 10).unique()) > 5
    mislabelled = real_logits[some, wrong].repeat(weight)
    assert torch.equal(positives, real_logits[image, own])
    assert torch.equal(negatives, torch.cat((fake_logits[image, own], mislabelled)))
    assert torch.equal(losses_g[0].args[0], logits_for_generator[image, own])


def test_a_step_moves_every_weight_and_the_average_follows(script):
    gan = tiny_gan(script)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    before = [weight.clone() for weight in weights]
    losses = gan.step(*random_batch(script, 10))
    assert losses.shape == (2,) and losses.isfinite().all() and not losses.requires_grad
    assert not any(map(torch.equal, before, weights))
    # the generator's half adds nothing to the gradients, half of which are in Adam's first mean
    for weight, state in gan.optimizer_d.state.items():
        assert torch.equal(weight.grad, 2 * state["exp_avg"])

    gan.update_average(0.25)
    for average, then, now in zip(gan.average.parameters(), before, weights, strict=False):
        assert torch.allclose(average, 0.75 * then + 0.25 * now, atol=1e-6)
    statistics = [value.clone() for value in gan.average.buffers()]
    gan.update_statistics(10, batches=2)
    assert not any(map(torch.equal, statistics, gan.average.buffers()))
    assert not gan.average.training


def test_a_saved_state_trains_on_in_a_gan_of_ones_own(script, tmp_path):
    generator, discriminator = script.Generator(width=8), script.Discriminator(width=8)
    for network in (generator, discriminator):  # as a GAN of the command line has them
        network.to(memory_format=torch.channels_last)
    gan = script.GAN(generator, discriminator)
    batch = random_batch(script, 10)
    gan.step(*batch)
    torch.save(gan.state_dict(), tmp_path / "state.pt")
    other = script.GAN(script.Generator(width=8), script.Discriminator(width=8))
    other.load_state_dict(load(tmp_path / "state.pt"))
    for each in (gan, other):
        torch.manual_seed(1)
        each.step(*batch)
    torch.testing.assert_close(other.state_dict(), gan.state_dict(), rtol=0, atol=1e-6)


@cifar_only
def test_the_discriminator_trains_on_mirrored_shifted_and_noisy_images(script, run, spy):
    images = torch.zeros(200, 3, 32, 32)
    images[..., 0] = 1
    mirrored = script.mirror_half(images)[:, 0, 0, -1]
    assert set(mirrored.tolist()) == {0, 1} and 60 < mirrored.sum() < 140
    images = random_batch(script, 4)[0]
    images[:, :, 0, 0] = 9
    shifts = []
    for _ in range(200):
        seen = script.augment(images)
        shifts.append(divmod(seen[0, 0].argmax().item(), 32))
        assert 0.09 < (seen - images.roll(shifts[-1], dims=(2, 3))).std() < 0.11
    for shift in zip(*shifts, strict=True):  # down, and to the right
        assert set(shift) == {*range(5), *range(28, 32)}
    augmented = spy(script, "augment")
    mirrored = spy(script, "mirror_half")
    shown = spy(script.Discriminator, "forward")
    steps = spy(script.GAN, "step")
    run()
    for made, used in ((augmented, shown), (mirrored, steps)):
        assert all(one.result is other.args[1] for one, other in zip(made, used, strict=True))


@pytest.mark.parametrize("precision, bf16", [("auto", True), ("fp32", False), ("bf16", True)])
def test_build_gan_takes_its_flags(script, monkeypatch, precision, bf16):
    monkeypatch.setattr(script, "bf16_is_fast", lambda device: True)
    flags = f"--device cpu --latent-dim 12 --lr 0.1 --beta1 0.3 --precision {precision}"
    gan = script.build_gan(script.make_parser().parse_args(flags.split()))
    assert gan.bf16 == bf16 and gan.generator.latent_dim == 12
    for optimizer in (gan.optimizer_g, gan.optimizer_d):
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.1, (0.3, 0.999))
    for weight in (*gan.generator.parameters(), *gan.discriminator.parameters()):
        assert weight.dim() == 1 or 0.015 < weight.std() < 0.025  # normal(0, 0.02)


# ---- a run and what it leaves


def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys, spy):
    moves = spy(os, "replace")
    loaded = spy(script, "load_images")
    grids = spy(script, "save_grid")
    steps = spy(script.GAN, "step")
    averages = spy(script.GAN, "update_average")
    plots = spy(script.Figure, "savefig")
    flags = ["--batch-size", 22, "--log-every", 3, "--epochs", 2, "--save-every", 2]
    run(*flags)
    printed = capsys.readouterr()
    assert re.search(r"cpu, (fp32|bf16), 120 images", printed.out)
    assert re.search(r"Step 8: Generator loss: \S+, discriminator loss: \d", printed.out)
    line = r"Epoch 1/2: generator loss \S+, discriminator loss \S+, .* s, .* images/s, \S+ left"
    assert re.search(line, printed.out)
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal

    run("--generate", 2)
    picture = Path(capsys.readouterr().out.strip())
    cell = 2 * random_batch(script, 1)[0].shape[-1] + 2
    rows, names = (10, 100) if hasattr(script, "CLASSES") else (1, 0)
    assert Image.open(picture).size == (names + 2 * cell + 2, rows * cell + 2)
    out = tmp_path / "out"
    assert {path.relative_to(out).as_posix() for path in tree(out)} == {
        *("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt", "checkpoint.pt"),
        *(f"samples/epoch_000{epoch}.png" for epoch in range(3)),
        *("weights/epoch_0002.pt", picture.name),
    }
    assert tree(out).keys() == {target for (_, target), *_ in moves}  # each file was whole at once
    assert all(str(os.getpid()) in temporary.name for (temporary, _), *_ in moves)

    animation = Image.open(out / "samples.gif")
    assert animation.size == Image.open(out / "real.png").size and animation.n_frames > 1
    animation.seek(animation.n_frames - 1)
    assert animation.info["duration"] == 2000

    for (_, real, *labels), *_ in steps:
        assert real.min() == -1 and real.max() == 1
        assert (real[:, 0, 0] == real[:, 0, 0, :1]).all()  # a top row, not a left column
        assert not labels or torch.allclose(real[:, 0, 0, 0], labels[0] / 127.5 - 1)
    images = loaded[0].result[0] if hasattr(script, "CLASSES") else loaded[0].result
    assert images.shape == random_batch(script, N)[0].shape and images.dtype == torch.uint8
    assert len(steps) == 10
    assert len(torch.cat([step.args[1] for step in steps[:5]]).unique(dim=0)) == 5 * 22
    weights = [call.options["weight"] for call in averages]
    assert weights == [10 / (step + 10) for step in range(1, 11)]
    lines = plots[-1].args[0].axes[0].lines
    assert [line.get_xdata()[-1] for line in lines] == [2, 2]  # epochs
    assert grids[0].args[0].name == "real.png"
    first = grids[0].args[1][0]
    assert first[0, 0].eq(0 if hasattr(script, "CLASSES") else 100 / 255).all()

    generator = script.load_generator(out / "generator.pt")
    script.save_samples(generator, tmp_path / "again.png", seed=0)
    again = (tmp_path / "again.png").read_bytes()
    assert again == (out / "samples/epoch_0002.png").read_bytes()
    saved = load(out / "generator.pt")["generator"]
    counts = [value for name, value in saved.items() if name.endswith("num_batches_tracked")]
    assert min(counts) >= 50  # statistics of enough images, however few there are to train on

    losses = [step.result for step in steps]
    rows = list(csv.DictReader((out / "losses.csv").open()))
    for row, part in zip(rows, (losses[:3], losses[3:5], losses[5:8], losses[8:]), strict=True):
        means = torch.stack(part).mean(dim=0).tolist()
        assert [float(row["discriminator_loss"]), float(row["generator_loss"])] == means
    assert [row["epoch"] for row in rows] == ["1", "1", "2", "2"]
    assert [row["step"] for row in rows] == ["3", "5", "8", "10"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)

    run(*flags, "--seed", 1, "--output-dir", tmp_path / "other")
    epoch_1, epoch_2, other = (steps[number].args[1] for number in (0, 5, 10))
    assert not torch.equal(epoch_1, epoch_2) and not torch.equal(epoch_1, other)


def test_generate_makes_what_the_shipped_weights_hold(script, run, tmp_path, capsys):
    path = WEIGHTS / f"{script.SCRIPT}.pt"
    generator = script.load_generator(path)
    assert not generator.training
    label, what = (("--label", 1), [1] * 4) if hasattr(script, "CLASSES") else ((), 4)
    for seed in (5, 6):
        run("--generate", 4, *label, "--seed", seed, "--weights", path)
        picture = Path(capsys.readouterr().out.strip())
        torch.manual_seed(seed)
        images = script.sample(generator, what)
        script.save_grid(tmp_path / "expected.png", images, 2)
        assert picture.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert images.shape == random_batch(script, 4)[0].shape
    assert 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1  # all of the scale
    assert images.std(dim=0).mean() > 0.05
    assert images.dtype == torch.float32 and not images.requires_grad


def test_bf16_trains_and_samples_are_of_fp32(script, run, tmp_path, spy):
    images = spy(script.Generator, "forward")
    logits = spy(script.Discriminator, "forward")
    samples = spy(script, "sample")
    run("--precision", "bf16")
    assert torch.bfloat16 in {call.result.dtype for call in images}
    weights = load(tmp_path / "out/generator.pt")["generator"]
    assert weights["network.0.weight"].dtype == torch.float32
    assert {call.result.dtype for call in samples + logits} == {torch.float32}


def test_auto_takes_bf16_where_it_is_fast(script, monkeypatch):
    intel = {"cpu_name": "Intel Xeon", "avx512_bf16": True}
    amd = {"cpu_name": "AMD Ryzen 9", "avx512_bf16": True}
    fast = [amd, {**intel, "amx_bf16": True}]
    slow = [intel, {"cpu_name": "AMD Ryzen 5"}]
    for cpu in fast + slow:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert script.bf16_is_fast(torch.device("cpu")) == (cpu in fast)
        assert not script.bf16_is_fast(torch.device("mps"))
    cards = {torch.device("cuda:0"): (7, 5), torch.device("cuda:1"): (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.get)
    assert [script.bf16_is_fast(card) for card in cards] == [False, True]


@conditional_only
def test_a_column_is_of_one_noise_and_each_row_of_its_label(script, spy):
    calls = spy(script.Generator, "forward")
    images = script.sample_rows(script.Generator(width=8).eval(), range(10), 3, seed=4)
    assert all(torch.equal(call.args[1], calls[0].args[1]) for call in calls)
    assert [call.args[2].tolist() for call in calls] == [[label] * 3 for label in range(10)]
    assert len({image.sum().item() for image in images[::3]}) == 10


# ---- resume: exact, and nothing is lost


def outcome(folder):
    """What a run leaves, but for its seconds."""
    pictures = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    animation = (folder / "samples.gif").read_bytes()
    rows = [row[:-1] for row in csv.reader((folder / "losses.csv").open())]
    gan = load(folder / "checkpoint.pt")["gan"]
    return gan, load(folder / "generator.pt")["generator"], (pictures, animation, rows)


def assert_same(one, other):
    torch.testing.assert_close(one[:2], other[:2], rtol=0, atol=0)
    assert one[2] == other[2]


def test_a_run_resumes_exactly(script, run, data, tmp_path, refused, spy, capsys, monkeypatch):
    flags = ("--epochs", 3, "--save-every", 2, "--seed", 3)
    run(*flags, "--output-dir", tmp_path / "whole")
    whole = outcome(tmp_path / "whole")
    spy(script.GAN, "step", ctrl_c_at(4))  # the last step of epoch 2 of 3
    line = refused(*flags, status=130)
    way_on = "a run goes on after its last finished epoch with --resume and the same flags"
    assert line == f"stopped; {way_on}"
    out = tmp_path / "out"
    script.main(["--data-dir", str(data), "--output-dir", str(out), "--device", "cpu", "--resume"])
    assert_same(outcome(out), whole)

    for path in [*out.glob("[!c]*.*"), out / "samples/epoch_0003.png"]:  # not checkpoint.pt
        path.unlink()
    run("--resume")  # makes them again
    assert capsys.readouterr().out.count("Finished") == 2
    assert_same(outcome(out), whole)
    grid = (out / "samples/epoch_0001.png").read_bytes()
    for content in (b"", grid[:200], grid[:11] + b"\5IHDR12345"):  # Pillow raises three errors
        (out / "samples/epoch_0001.png").write_bytes(content)
        script.save_animation(out, last_epoch=3)
        assert Image.open(out / "samples.gif").n_frames == 3
    run("--resume")  # a damaged grid doesn't stop it
    assert Image.open(out / "samples.gif").n_frames == 3
    monkeypatch.setattr(script, "MAX_FRAMES", 2)
    script.save_animation(out, last_epoch=3)
    assert Image.open(out / "samples.gif").n_frames == 2


def test_resume_may_change_epochs_and_lr_but_not_the_run(script, run, tmp_path, refused, spy):
    run("--seed", 7)
    line = refused("--seed", 7)
    assert "--resume" in line and "--output-dir" in line
    own = ("--resume", "--seed", 7)
    for flags in (("--seed", 8), ("--latent-dim", 5), ("--beta1", 0.9), ("--width", 9)):
        assert flags[0] in refused(*own, *flags)
    assert "--batch-size" in refused(*own, "--batch-size", 30)
    run(*own, "--epochs", 2, "--lr", 0.000123)
    run(*own, "--epochs", 1)  # it has two already
    checkpoint = load(tmp_path / "out/checkpoint.pt")
    assert checkpoint["rows"][-1]["epoch"] == checkpoint["settings"]["epochs"] == 2
    for optimizer in ("optimizer_g", "optimizer_d"):
        assert checkpoint["gan"][optimizer]["param_groups"][0]["lr"] == 0.000123
    spy(script.GAN, "step", ctrl_c_at(1))
    refused(*own, "--epochs", 80, status=130)  # stopped at once, it is as long as before
    assert load(tmp_path / "out/checkpoint.pt")["settings"]["epochs"] == 2


def test_an_output_that_cannot_be_written_costs_no_epoch(script, run, tmp_path, capsys, spy):
    blocked = tmp_path / "out/losses.csv"
    blocked.mkdir(parents=True)
    with pytest.raises(SystemExit):
        run()
    assert str(blocked) in capsys.readouterr().err
    blocked.rmdir()
    steps = spy(script.GAN, "step")
    run("--resume")
    assert not steps and blocked.exists()


def test_a_full_disk_leaves_the_old_file_whole(script, tmp_path, monkeypatch):
    def full(descriptor):
        assert os.fstat(descriptor).st_size == 3  # all of it was written
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(script.UsageError, match="No space"), script.atomic_open(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nan_stops_the_run_and_keeps_the_checkpoint(script, run, refused, spy):
    run()
    spy(script.GAN, "step", lambda step, losses: losses * float("nan") if step == 1 else losses)
    line = refused("--resume", "--epochs", 2)
    assert "step 4" in line and "--lr" in line  # noticed at the epoch's end

    gan = tiny_gan(script)
    row = script.make_row(1, 1, [torch.ones(2)], start=0)
    next(gan.generator.parameters()).data[0] = float("inf")
    with pytest.raises(script.UsageError):
        script.check_finite(gan, row)


# ---- more than one device

WORKER = """
import torch
from torchvision.datasets import cifar
import cgan_cifar10 as script

def step(gan, real, labels, step=script.GAN.step):
    random = torch.get_rng_state()
    losses = step(gan, real, labels)
    seen.append((gan, labels, random, losses))
    return losses

seen = []
script.GAN.step = step
cifar.check_integrity = lambda path, md5: True
script.main()
(gan, *_), labels, random, losses = zip(*seen)
weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
torch.save((weights, torch.cat(labels), random[0], losses), f"rank{script.RANK}.pt")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun is untried on Windows")
@cifar_only
def test_two_processes_train_one_gan(script, run, data, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    torchrun = "torch.distributed.run --standalone --nproc-per-node=2 worker.py --device cpu"
    flags = "--batch-size 60 --log-every 1 --width 8 --epochs 1 --output-dir out --data-dir"
    command = [sys.executable, "-m", *torchrun.split(), *flags.split(), str(data)]
    printed = subprocess.check_output(command, text=True, timeout=300)
    for line in ("Step 1: ", "Epoch 1/1: ", "Finished"):
        assert printed.count(line) == 1
    weights, labels, random, losses = zip(load("rank0.pt"), load("rank1.pt"), strict=True)
    assert all(map(torch.equal, *weights))
    assert not torch.equal(*random)
    # half of each batch for each, and all of the data once
    assert len(labels[0]) == len(labels[1]) == N // 2
    assert torch.equal(torch.cat(labels).bincount(), script.load_images(data)[1].bincount())
    row = load(tmp_path / "out/checkpoint.pt")["rows"][0]
    mean = (losses[0][0] + losses[1][0]) / 2
    assert [row["discriminator_loss"], row["generator_loss"]] == mean.tolist()
    run("--resume", "--epochs", 2)  # a checkpoint of two processes goes on in one
    assert load(tmp_path / "out/checkpoint.pt")["rows"][-1]["epoch"] == 2


@cifar_only
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), (None, "nccl"), ("cuda:0", "nccl")])
def test_each_process_has_a_card_of_its_own(script, monkeypatch, device, backend):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "cuda", Mock())  # a card and NCCL are there
    monkeypatch.setattr(script, "distributed", Mock())
    args = script.make_parser().parse_args(["--device", device] if device else [])
    assert args.device == (device or "cuda:1")
    script.init_distributed(args)
    assert args.device == (device if device == "cpu" else "cuda:1")
    assert script.distributed.init_process_group.call_args.args == (backend,)
    cards = None if device == "cpu" else [1]
    assert script.distributed.barrier.call_args.kwargs == {"device_ids": cards}


def test_a_card_is_used_if_there_is_one(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.make_parser().get_default("device").startswith("cuda")


@cifar_only
def test_a_pytorch_without_torchrun_trains_too(script, monkeypatch):
    monkeypatch.setattr(script.distributed, "is_available", lambda: False)
    monkeypatch.setattr(script.distributed, "is_initialized", Mock(side_effect=AttributeError))
    tiny_gan(script).step(*random_batch(script, 4))


@cifar_only
def test_a_batch_is_shared_out_evenly(script, monkeypatch, refused):
    monkeypatch.setattr(script, "WORLD_SIZE", 7)
    monkeypatch.setattr(script, "init_distributed", Mock())
    assert "no multiple of 7" in refused("--batch-size", 60)


# ---- what is refused


class Payload:
    def __reduce__(self):
        return sys.exit, ("the code in the file was run",)


def test_files_that_hold_no_generator_or_no_run_are_refused(run, tmp_path, refused):
    run()
    generator = shutil.copy(tmp_path / "out/generator.pt", tmp_path)
    checkpoint = tmp_path / "out/checkpoint.pt"
    saved = load(checkpoint)
    bad = [
        {"generator": Payload()},
        {"latent_dim": 2, "width": 2},
        [1, 2],
        {**saved, "rows": []},
        {**saved, "rows": [{**saved["rows"][0], "epoch": "x"}]},
        {**saved, "images": None},
        {**saved, "images": 60_000},
        {**saved, "settings": {"seed": 0}},
        {**saved, "settings": {**saved["settings"], "log_every": "x"}},
        {**saved, "settings": {**saved["settings"], "log_every": 0}},
        {**saved, "settings": {**saved["settings"], "precision": "fp8"}},
        {**saved, "gan": {**saved["gan"], "optimizer_d": {}}},
    ]
    for path, *flags in (
        (generator, "--generate", 1, "--weights", generator),
        (checkpoint, "--resume", "--epochs", 2),
    ):
        os.truncate(path, os.path.getsize(path) // 2)
        assert str(path) in refused(*flags)
        for content in bad:
            torch.save(content, path)
            line = refused(*flags)
            assert any(part in line for part in (str(path), "--log-every", "--precision"))
        os.remove(path)
        assert str(path) in refused(*flags)


def test_generators_of_other_kinds_are_refused(script, tmp_path, refused, monkeypatch):
    shipped = {name: WEIGHTS / f"{name}.pt" for name in NAMES}
    own = shipped.pop(script.SCRIPT)
    for path in shipped.values():
        assert "holds no generator" in refused("--generate", 1, "--weights", path)
    for wrong in ({"width": 9}, {"latent_dim": 10**12}):  # the latter: not "can't allocate"
        torch.save({**load(own), **wrong}, tmp_path / "wrong.pt")
        line = refused("--generate", 1, "--weights", tmp_path / "wrong.pt")
        assert "size mismatch for network.0.weight" in line
    if hasattr(script, "CLASSES"):
        monkeypatch.setattr(script, "CLASSES", script.CLASSES[::-1])
        assert "other classes" in refused("--generate", 1, "--weights", own)


def test_folders_that_cannot_be_used_get_one_line(data, tmp_path, refused):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        assert str(file) in refused("--output-dir", place)
    broken = shutil.copytree(data, tmp_path / "truncated")
    for path in [*broken.glob("*/raw/train-*"), *broken.glob("*/data_batch_*")]:
        os.truncate(path, 100)
    for folder in (broken, file, tmp_path / "missing"):
        line = refused("--data-dir", folder)
        assert str(folder) in line and "http" in line and ".gz" in line
    assert "no network" in line  # a download was tried
    assert file.read_text() == "mine" and not (tmp_path / "out").exists()


WRONG = """--epochs 0|--epochs x|--epochs 1e3|--epochs 100000000|--batch-size 1|--batch-size nan
--batch-size 121|--lr 0|--lr nan|--lr inf|--lr x|--beta1 1|--beta1 -0.1|--latent-dim 0|--width 0
--latent-dim 10000000000|--seed -1|--seed 0.5|--seed 400001|--log-every 0|--save-every 0
--generate 0|--device abacus|--device meta|--device cuda:99|--precision fp8|--weights x.pt
--no-such-flag|--label x|--label 1|--generate 1 --resume"""


def test_wrong_flags_are_refused(tmp_path, refused):
    for flags in re.split(r"[|\n]", WRONG):
        assert flags.split()[0] in refused(*flags.split()), flags
    assert not (tmp_path / "out").exists()


@conditional_only
def test_a_label_is_a_number_a_name_or_its_beginning(script, monkeypatch, refused):
    name = script.CLASSES[1]
    for text in ("1", name, name.upper(), name[:3].lower()):
        assert script.find_label(text) == 1
    for text in ("", "10", "unicorn"):
        line = refused("--generate", 1, "--label", text)
        assert all(name in line for name in script.CLASSES)
    assert "--label" in refused("--generate", 101)
    monkeypatch.setattr(script, "CLASSES", ["caterpillar", "Cat"])
    assert [script.find_label(text) for text in ("cat", "Cate", "1")] == [1, 0, 1]


def test_a_mistake_in_ones_own_code_keeps_its_traceback(script, run, monkeypatch):
    monkeypatch.setattr(script.Generator, "forward", lambda *given: undefined_name)  # noqa: F821
    with pytest.raises(NameError):
        run()


# ---- the collection

# How many different texts these parts have in the four files; any other part has one.
TEXTS = {
    11: "__init__",
    4: "Generator Discriminator GAN forward make_parser",
    3: "step train_epoch train load_images sample load_generator",
    2: "update_statistics mean_losses start_outputs save_grid save_samples save_weights generate "
    "parse_args",
}


def test_shared_parts_are_the_same_text():
    texts = defaultdict(set)
    for name in NAMES:
        code = (HERE / f"{name}.py").read_text(encoding="utf-8")
        assert code.startswith("# SPDX-License-Identifier: MIT\n")
        assert not re.search(rf"^(from|import) ({'|'.join(NAMES)})\b", code, re.MULTILINE)
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                texts[node.name].add(ast.get_source_segment(code, node))
    different = {part: len(found) for part, found in texts.items() if len(found) > 1}
    assert different == {part: count for count, parts in TEXTS.items() for part in parts.split()}


def test_judge_measures_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(HERE / ".github/figures")
    judge = importlib.import_module("judge")
    one = torch.randn(400, 5, dtype=torch.float64)
    assert abs(judge.frechet_distance(one, one + 3) - 5 * 3**2) < 1e-6
    centred = one - one.mean(dim=0)
    assert abs(judge.frechet_distance(centred, 2 * centred) - one.T.cov().trace()) < 1e-6
    assert judge.coverage(one, one[:200]) > 0.9 and judge.coverage(one, one + 100) == 0
    smooth, checkerboard = torch.ones(1, 1, 8, 8), torch.eye(2).tile(1, 1, 4, 4)
    assert judge.high_energy(smooth) < 1e-9 < 1 < judge.high_energy(checkerboard)


def test_pace_compares_the_script_with_a_plain_loop(script, data, monkeypatch, capsys, spy):
    monkeypatch.syspath_prepend(HERE / ".github/figures")
    pace = importlib.import_module("pace")
    monkeypatch.setattr(pace, "N", N)
    ours = spy(script.GAN, "step")
    theirs = spy(pace.PlainLoop, "step")
    flags = f"{script.SCRIPT}.py --rounds 2 --batch-size 60 --width 8 --data-dir".split()
    monkeypatch.setattr(sys, "argv", ["pace.py", *flags, str(data)])
    pace.main()
    assert len(ours) == len(theirs) == 2 * 3  # the first round isn't counted
    ours, theirs = ours[0].args[1], theirs[0].args[1]
    assert ours.shape == theirs.shape and ours.aminmax() == theirs.aminmax() == (-1, 1)
    assert re.search(r"median ratio \d+\.\d\d\n", capsys.readouterr().out)


def test_readmes_commands_flags_defaults_and_links_are_real():
    parsers = {name: importlib.import_module(name).make_parser() for name in NAMES}
    docs = "".join(importlib.import_module(name).__doc__ for name in NAMES)
    command = r"^    (?:python|torchrun [^.]*?) (\w+)\.py(.*?)(?:  |$)"  # two spaces: what it does
    commands = re.findall(command, README + docs, re.MULTILINE)
    defaults = re.findall(r"^\| \[\w+\]\((\w+)\.py\) \| (\d+) \| ", README, re.MULTILINE)
    assert len(commands) >= 19 and len(defaults) == 4
    for name, flags in commands:
        parsers[name].parse_args(flags.split())
    for name, epochs in defaults:
        shown = " ".join(parsers[name].format_help().split())
        assert re.search(rf"passes over the training images[^(]* \(default: {epochs}\)", shown)
    helps = "".join(parser.format_help() for parser in parsers.values())
    known = helps + "--index-url --teach --standalone --nproc-per-node"
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= set(re.findall(r"--[a-z][a-z-]*", known))
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (HERE / link).exists(), link


def test_readmes_examples_run(data, tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / ".github/weights")
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    one, kinds, two, three = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "range(1, 1001)" in three
    three = three.replace("1001", "3")
    for example, name, count in ((one, "images", 8), (two, "row", 8), (three, "digits", 16)):
        names = {}
        exec(example, names)
        assert names[name].shape == (count, 1, 28, 28) and names[name].std() > 0
    exec(kinds, {})
    assert Image.open("kinds.png").size == (20 * 30 + 2, 10 * 30 + 2)


def test_readmes_recipe_for_own_images_trains(tmp_path, monkeypatch, capsys):
    code = (HERE / "cgan_cifar10.py").read_text(encoding="utf-8")
    recipe = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
    for change in recipe.split("\n\n"):
        lines = change.strip("\n").splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] != "+")
        assert code.count(old) == 1, old
        code = code.replace(old, "\n".join(line[1:] for line in lines if line[0] != "-"))
    (tmp_path / "cgan_pets.py").write_text(code)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            picture = Image.effect_noise((90, 70), 50).convert("RGB")
            picture.save(tmp_path / f"images/{name}/{number}.jpg")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("cgan_pets")
    flags = "--device cpu --width 8 --batch-size 10 --epochs 1 --data-dir images"
    script.main(flags.split())
    generator = script.load_generator("outputs/cgan_pets/generator.pt")
    assert script.sample(generator, [0, 1]).shape == (2, 3, 64, 64)

    Path("images/dog").rename("images/Dog")  # now before cat
    with pytest.raises(SystemExit):
        script.main([*flags.split(), "--output-dir", "other"])
    assert "its folders are ['Dog', 'cat']" in capsys.readouterr().err
