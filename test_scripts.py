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

NAMES = ["mlp_gan_mnist", "dcgan_mnist", "cgan_fashion_mnist", "cgan_cifar10"]
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
N = 120  # tiny training images
Call = namedtuple("Call", "args result")


def make_data(folder):
    """Lay tiny data sets out as torchvision's downloads do; an image's top row shows its label."""
    torch.manual_seed(0)
    labels = torch.arange(N, dtype=torch.uint8) % 10
    for dataset, offset in (("MNIST", 100), ("FashionMNIST", 0)):
        pixels = torch.randint(0, 256, (N, 28 * 28), dtype=torch.uint8)
        pixels[:, :28] = labels.unsqueeze(1) + offset
        raw = folder / dataset / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            header = struct.pack(">4I", 2051, N, 28, 28)
            (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
            header = struct.pack(">2I", 2049, N)
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = torch.randint(0, 256, (N // 5, 3 * 32 * 32), dtype=torch.uint8)
        pixels[:, :32] = labels[: N // 5].unsqueeze(1)  # in the red channel
        batch = {"data": pixels.numpy(), "labels": labels[: N // 5].tolist()}
        (cifar / name).write_bytes(pickle.dumps(batch))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded_and_offline(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no network")))
    # CIFAR-10's tiny files don't have the published MD5
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, _: os.path.exists(path)
    )


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
def refused(run, capsys):
    """Run a command line that must exit with one line, or argparse's usage and line; return it."""

    def refused(*flags, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == status, lines
        assert len(lines) == 1 or lines[0].startswith("usage: "), lines
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
            calls.append(Call(args, function(*args, **options)))
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


def is_conditional(script):
    return hasattr(script, "CLASSES")


def tiny_gan(script):
    return script.GAN(script.Generator(width=8), script.Discriminator(width=8), lr=0.01)


def random_batch(script, n):
    """Return random images and, for the conditional scripts, labels, as GAN.step takes them."""
    shape = (3, 32, 32) if script.SCRIPT == "cgan_cifar10" else (1, 28, 28)
    images = torch.rand(n, *shape) * 2 - 1
    return (images, torch.arange(n) % 10) if is_conditional(script) else (images,)


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
def test_the_largest_of_the_first_ten_numbers_chooses_the_kind(script):
    generator = script.Generator(width=8)
    inputs = []
    generator.network.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    noise = torch.randn(10, generator.latent_dim)
    noise[:, :10] += 20 * torch.eye(10)
    generator(noise)
    assert torch.equal(inputs[0], torch.cat((noise, 10 * torch.eye(10)), dim=1))


def test_losses_are_the_papers(script):
    real = torch.tensor([2.0, -1.0])
    fake = torch.tensor([0.5, 3.0])
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    assert torch.isclose(script.discriminator_loss(real, fake), expected)
    assert torch.isclose(script.generator_loss(fake), -fake.sigmoid().log().mean())
    assert script.generator_loss(torch.tensor([-200.0])) == 200  # Sigmoid + BCELoss stops at 100


def test_a_step_takes_the_right_answers_for_its_losses(script, spy):
    answers = spy(script.Discriminator, "forward")
    augmented = spy(script, "augment") if script.SCRIPT == "cgan_cifar10" else []
    losses_d = spy(script, "discriminator_loss")
    losses_g = spy(script, "generator_loss")
    picks = spy(script, "pick") if is_conditional(script) else []
    real, *labels = random_batch(script, 100)
    tiny_gan(script).step(real, *labels)
    shown = [answer.args[1] for answer in answers]
    if augmented:
        assert all(call.result is images for call, images in zip(augmented, shown, strict=True))
        shown = [call.args[0] for call in augmented]
    assert shown[0] is real and torch.equal(shown[1], shown[2])  # the same fakes twice
    assert shown[2].requires_grad and not shown[1].requires_grad
    real_logits, fake_logits, logits_for_generator = (answer.result for answer in answers)
    positives, negatives = losses_d[0].args
    if not labels:
        assert positives is real_logits and negatives is fake_logits
        assert losses_g[0].args[0] is logits_for_generator
        return
    image = torch.arange(100)
    (own,) = labels
    (wrong,) = (asked for (logits, asked), _ in picks if logits is real_logits and asked is not own)
    assert not (wrong == own).any() and len(((wrong - own) % 10).unique()) > 5
    weight = 2 if script.SCRIPT == "cgan_cifar10" else 1
    mislabelled = real_logits[image, wrong].repeat(weight)
    assert torch.equal(positives, real_logits[image, own])
    assert torch.equal(negatives, torch.cat((fake_logits[image, own], mislabelled)))
    assert torch.equal(losses_g[0].args[0], logits_for_generator[image, own])


def test_a_step_moves_every_weight_and_the_average_follows(script):
    gan = tiny_gan(script)
    weights_d = list(gan.discriminator.parameters())
    weights_g = list(gan.generator.parameters())
    before_d = [weight.clone() for weight in weights_d]
    before_g = [weight.clone() for weight in weights_g]
    gradients = []
    gan.optimizer_d.register_step_post_hook(
        lambda *_: gradients.extend(weight.grad.clone() for weight in weights_d)
    )
    losses = gan.step(*random_batch(script, 10))
    assert losses.shape == (2,) and losses.isfinite().all() and not losses.requires_grad
    assert not any(map(torch.equal, before_d, weights_d))
    assert not any(map(torch.equal, before_g, weights_g))
    # the generator's half adds nothing to the discriminator's gradients
    assert all(map(torch.equal, gradients, [weight.grad for weight in weights_d]))

    gan.update_average(0.25)
    for average, then, now in zip(gan.average.parameters(), before_g, weights_g, strict=True):
        assert torch.allclose(average, 0.75 * then + 0.25 * now, atol=1e-6)
    statistics = [value.clone() for value in gan.average.buffers()]
    gan.update_statistics(10, batches=2)
    assert not any(map(torch.equal, statistics, gan.average.buffers()))
    assert not gan.average.training


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
    steps = spy(script.GAN, "step")
    run()
    assert len(augmented) == 3 * len(steps)  # real, fake for the discriminator, for the generator
    assert all(step.args[1] is call.result for step, call in zip(steps, mirrored, strict=True))


# ---- a run and what it leaves


def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys, spy):
    moves = spy(os, "replace")
    grids = spy(script, "save_grid")
    steps = spy(script.GAN, "step")
    averages = spy(script.GAN, "update_average")
    flags = ["--batch-size", 24, "--log-every", 3, "--epochs", 2, "--save-every", 2]
    run(*flags)
    printed = capsys.readouterr()
    assert re.search(r"cpu, (fp32|bf16), 120 images", printed.out)
    assert re.search(r"Step 8: Generator loss: \S+, discriminator loss: \d", printed.out)
    line = r"Epoch 1/2: generator loss \S+, discriminator loss \S+, .* s, .* images/s, \S+ left"
    assert re.search(line, printed.out)
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal

    run("--generate", 2)
    picture = Path(capsys.readouterr().out.strip())
    out = tmp_path / "out"
    assert {path.relative_to(out).as_posix() for path in tree(out)} == {
        *("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt", "checkpoint.pt"),
        *(f"samples/epoch_000{epoch}.png" for epoch in range(3)),
        *("weights/epoch_0002.pt", picture.name),
    }
    assert tree(out).keys() == {target for (_, target), _ in moves}  # each file was whole at once
    assert all(str(os.getpid()) in temporary.name for (temporary, _), _ in moves)

    animation = Image.open(out / "samples.gif")
    assert animation.size == Image.open(out / "real.png").size and animation.n_frames > 1
    animation.seek(animation.n_frames - 1)
    assert animation.info["duration"] == 2000

    for (_, real, *labels), _ in steps:
        assert real.min() == -1 and real.max() == 1
        assert not labels or torch.allclose(real[:, 0, 0, 0], labels[0] / 127.5 - 1)
    assert len(averages) == len(steps) == 10
    assert grids[0].args[0].name == "real.png"
    first = grids[0].args[1][0]
    assert first[0, 0].eq(0 if is_conditional(script) else 100 / 255).all()

    saved = load(out / "generator.pt")["generator"]
    counts = [value for name, value in saved.items() if name.endswith("num_batches_tracked")]
    assert min(counts) >= 50  # statistics of enough images, however few there are to train on

    losses = [step.result for step in steps]
    rows = list(csv.DictReader((out / "losses.csv").open()))
    for row, part in zip(rows, (losses[:3], losses[3:5], losses[5:8], losses[8:]), strict=True):
        means = torch.stack(part).mean(dim=0).tolist()
        assert [float(row["discriminator_loss"]), float(row["generator_loss"])] == means
    assert [row["epoch"] + row["step"] for row in rows] == ["13", "15", "28", "210"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)

    run(*flags, "--seed", 1, "--output-dir", tmp_path / "other")
    epoch_1, epoch_2, other = (steps[number].args[1] for number in (0, 5, 10))
    assert not torch.equal(epoch_1, epoch_2) and not torch.equal(epoch_1, other)


def test_generate_makes_what_the_shipped_weights_hold(script, run, tmp_path, capsys):
    path = HERE / f".github/weights/{script.SCRIPT}.pt"
    generator = script.load_generator(path)
    label, what = (("--label", 1), [1] * 4) if is_conditional(script) else ((), 4)
    for seed in (5, 6):
        run("--generate", 4, *label, "--seed", seed, "--weights", path)
        picture = Path(capsys.readouterr().out.strip())
        torch.manual_seed(seed)
        images = script.sample(generator, what)
        script.save_grid(tmp_path / "expected.png", images, 2)
        assert picture.read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert images.shape == random_batch(script, 4)[0].shape
    assert images.min() >= 0 and images.max() <= 1 and images.std(dim=0).mean() > 0.05
    assert images.dtype == torch.float32 and not images.requires_grad


def test_bf16_trains_and_samples_are_of_fp32(script, run, tmp_path, spy):
    images = spy(script.Generator, "forward")
    samples = spy(script, "sample")
    run("--precision", "bf16")
    assert torch.bfloat16 in {call.result.dtype for call in images}
    weights = load(tmp_path / "out/generator.pt")["generator"]
    assert weights["network.0.weight"].dtype == torch.float32
    assert {call.result.dtype for call in samples} == {torch.float32}


def test_auto_takes_bf16_where_it_is_fast(script, monkeypatch):
    intel = {"cpu_name": "Intel Xeon", "avx512_bf16": True}
    amd = {"cpu_name": "AMD Ryzen 9", "avx512_bf16": True}
    old = {"cpu_name": "AMD Ryzen 5"}
    for cpu, fast in (
        (intel, False),
        ({**intel, "amx_bf16": True}, True),
        (amd, True),
        (old, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert script.bf16_is_fast(torch.device("cpu")) == fast
        assert not script.bf16_is_fast(torch.device("mps"))
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    capabilities = {first: (7, 5), second: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert script.bf16_is_fast(second) and not script.bf16_is_fast(first)


@conditional_only
def test_a_column_is_of_one_noise_and_each_row_of_its_label(script):
    generator = script.Generator(width=8).eval()
    noise = []
    generator.register_forward_pre_hook(lambda module, inputs: noise.append(inputs[0]))
    images = script.sample_rows(generator, range(10), 3, seed=4)
    assert all(torch.equal(noise[0], row) for row in noise)
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


def test_an_interrupted_run_resumes_to_the_same_bits(script, run, data, tmp_path, refused, spy):
    flags = ("--epochs", 4, "--log-every", 3, "--save-every", 2, "--seed", 3)
    run(*flags, "--output-dir", tmp_path / "whole")
    spy(script.GAN, "step", ctrl_c_at(6))  # the last step of epoch 3 of 4
    line = refused(*flags, status=130)
    way_on = "a run goes on after its last finished epoch with --resume and the same flags"
    assert line == f"stopped; {way_on}"
    folders = ["--data-dir", str(data), "--output-dir", str(tmp_path / "out")]
    script.main([*folders, "--device", "cpu", "--resume"])
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "out"))


def test_resume_may_change_epochs_and_lr_but_not_the_run(script, run, tmp_path, refused, spy):
    run("--seed", 7)
    before = tree(tmp_path / "out")
    line = refused("--seed", 7)
    assert "--resume" in line and "--output-dir" in line
    own = ("--resume", "--seed", 7)
    for flags in (("--seed", 8), ("--latent-dim", 5), ("--beta1", 0.9), ("--width", 9)):
        assert flags[0] in refused(*own, *flags)
    assert tree(tmp_path / "out") == before
    run(*own, "--epochs", 2, "--lr", 0.000123)
    run(*own, "--epochs", 1)  # it has two already
    checkpoint = load(tmp_path / "out/checkpoint.pt")
    assert checkpoint["rows"][-1]["epoch"] == checkpoint["settings"]["epochs"] == 2
    for optimizer in ("optimizer_g", "optimizer_d"):
        assert checkpoint["gan"][optimizer]["param_groups"][0]["lr"] == 0.000123
    spy(script.GAN, "step", ctrl_c_at(1))
    refused(*own, "--epochs", 80, status=130)  # stopped at once, it is as long as before
    assert load(tmp_path / "out/checkpoint.pt")["settings"]["epochs"] == 2


def test_a_finished_run_resumed_makes_missing_and_damaged_files_again(run, tmp_path, capsys):
    run("--epochs", 2)
    out = tmp_path / "out"
    before = outcome(out)
    for name in (
        "generator.pt",
        "losses.csv",
        "losses.png",
        "samples.gif",
        "samples/epoch_0002.png",
    ):
        (out / name).unlink()
    run("--resume")
    assert "Finished" in capsys.readouterr().out
    assert_same(outcome(out), before)
    whole = (out / "samples/epoch_0001.png").read_bytes()
    for content in (b"", whole[:200], whole[:11] + b"\5IHDR12345"):  # Pillow raises three errors
        (out / "samples/epoch_0001.png").write_bytes(content)
        run("--resume")
        assert Image.open(out / "samples.gif").n_frames == 2


def test_an_output_that_cannot_be_written_costs_no_epoch(script, run, tmp_path, refused, spy):
    blocked = tmp_path / "out/losses.csv"
    blocked.mkdir(parents=True)
    assert str(blocked) in refused()
    blocked.rmdir()
    steps = spy(script.GAN, "step")
    run("--resume")
    assert not steps and blocked.exists()


def test_a_full_disk_leaves_the_old_file_whole(script, tmp_path, monkeypatch):
    def full(descriptor):
        assert os.fstat(descriptor).st_size == 3  # all of it was written
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    with script.atomic_open(path) as file:
        file.write(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(script.UsageError, match="No space"), script.atomic_open(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nan_stops_the_run_and_keeps_the_checkpoint(script, run, tmp_path, refused, spy):
    run()
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    spy(script.GAN, "step", lambda step, losses: losses * float("nan") if step == 1 else losses)
    line = refused("--resume", "--epochs", 2)
    assert "step 4" in line and "--lr" in line  # noticed at the epoch's end
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before

    gan = tiny_gan(script)
    row = script.make_row(1, 1, [torch.ones(2)], start=0)
    script.check_finite(gan, row)
    next(gan.generator.parameters()).data[0] = float("inf")
    with pytest.raises(script.UsageError):
        script.check_finite(gan, row)


# ---- more than one device

WORKER = """
import os
import torch
from torchvision.datasets import cifar
import cgan_cifar10 as script

def step(gan, real, labels, step=script.GAN.step):
    seen.append((labels, torch.get_rng_state()))
    losses = step(gan, real, labels)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    state = {
        "labels": torch.cat([labels for labels, _ in seen]),
        "random": seen[0][1],
        "weights": [weight.detach() for weight in weights],
    }
    torch.save(state, f"rank{os.environ['RANK']}.pt")
    return losses

seen = []
script.GAN.step = step
cifar.check_integrity = lambda path, md5: True
script.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun is untried on Windows")
@cifar_only
def test_two_processes_train_one_gan(script, run, data, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = "torch.distributed.run --standalone --nproc-per-node=2 worker.py --device cpu"
    flags = "--batch-size 60 --log-every 1 --width 8 --epochs 1 --output-dir out --data-dir"
    done = subprocess.run(
        [sys.executable, "-m", *torchrun.split(), *flags.split(), str(data)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Step 1: ") == done.stdout.count("Finished") == 1
    one, other = (load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, one["weights"], other["weights"]))
    assert not torch.equal(one["random"], other["random"])
    # half of each batch for each, and all of the data once
    assert len(one["labels"]) == len(other["labels"]) == N // 2
    both = torch.cat((one["labels"], other["labels"]))
    assert torch.equal(both.bincount(), script.load_images(data)[1].bincount())
    run("--resume", "--epochs", 2)  # a checkpoint of two processes goes on in one
    assert load(tmp_path / "out/checkpoint.pt")["rows"][-1]["epoch"] == 2


@cifar_only
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), (None, "nccl"), ("cuda:0", "nccl")])
def test_each_process_has_a_card_of_its_own(script, monkeypatch, device, backend):
    started, waited = Mock(), Mock()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", Mock())
    monkeypatch.setattr(script.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(script.distributed, "barrier", waited)
    monkeypatch.setattr(script.distributed, "init_process_group", started)
    args = script.make_parser().parse_args(["--device", device] if device else [])
    assert args.device == (device or "cuda:1")
    script.init_distributed(args)
    assert args.device == (device if device == "cpu" else "cuda:1")
    assert started.call_args.args == (backend,)
    assert waited.call_args.kwargs["device_ids"] == (None if device == "cpu" else [1])


# ---- files from strangers


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def bad_files(folder, whole):
    """Yield files that hold neither a generator nor a run, and one that isn't there."""
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"generator": Payload(folder / "trace")}, folder / "payload.pt")
    torch.save({"latent_dim": 2, "width": 2}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    return [folder / f"{name}.pt" for name in ("truncated", "payload", "other", "list", "missing")]


def test_files_that_hold_no_generator_are_refused(run, tmp_path, refused):
    run()
    whole = (tmp_path / "out/generator.pt").read_bytes()
    for path in bad_files(tmp_path, whole):
        assert str(path) in refused("--generate", 1, "--weights", path)
    assert not (tmp_path / "trace").exists()
    weights = load(tmp_path / "out/generator.pt")
    for wrong in ({"width": 9}, {"latent_dim": 10**12}):  # the latter: not "can't allocate"
        torch.save({**weights, **wrong}, tmp_path / "wrong.pt")
        line = refused("--generate", 1, "--weights", tmp_path / "wrong.pt")
        assert "size mismatch for network.0.weight" in line


def test_generators_of_other_scripts_or_classes_are_refused(script, refused, monkeypatch):
    for name in NAMES:
        path = HERE / f".github/weights/{name}.pt"
        if name != script.SCRIPT:
            assert "holds no generator" in refused("--generate", 1, "--weights", path)
        elif is_conditional(script):
            monkeypatch.setattr(script, "CLASSES", script.CLASSES[::-1])
            assert "other classes" in refused("--generate", 1, "--weights", path)


def test_files_that_hold_no_run_are_refused(run, tmp_path, refused):
    run()
    checkpoint = tmp_path / "out/checkpoint.pt"
    saved = load(checkpoint)
    bad = bad_files(tmp_path, checkpoint.read_bytes())
    nonsense = [
        {"rows": []},
        {"rows": [{**saved["rows"][0], "epoch": "x"}]},
        {"images": None},
        {"images": 60_000},
        {"settings": {"seed": 0}},
        {"settings": {**saved["settings"], "log_every": "x"}},
        {"settings": {**saved["settings"], "log_every": 0}},
        {"settings": {**saved["settings"], "precision": "fp8"}},
        {"gan": {**saved["gan"], "optimizer_d": {}}},
    ]
    for number, change in enumerate(nonsense):
        bad.append(tmp_path / f"nonsense_{number}.pt")
        torch.save({**saved, **change}, bad[-1])
    for path in bad:
        checkpoint.unlink()
        if path.exists():
            checkpoint.write_bytes(path.read_bytes())
        before = tree(tmp_path / "out")
        line = refused("--resume", "--epochs", 2)
        assert any(part in line for part in (str(checkpoint), "--log-every", "--precision"))
        assert tree(tmp_path / "out") == before
        checkpoint.touch()
    assert not (tmp_path / "trace").exists()


# ---- data


def test_unusable_data_gets_one_line(tmp_path, refused):
    broken = tmp_path / "truncated"
    broken.mkdir()
    make_data(broken)
    for path in [*broken.glob("*/raw/train-*"), *broken.glob("*/data_batch_*")]:
        path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "file").write_text("")
    for folder in (broken, tmp_path / "file", tmp_path / "missing"):
        line = refused("--data-dir", folder)
        assert str(folder) in line and "http" in line and ".gz" in line
    assert not (tmp_path / "out").exists()


def test_images_are_loaded_the_right_way_round(script, data):
    loaded = script.load_images(data)
    images, labels = loaded if is_conditional(script) else (loaded, 100 + torch.arange(N) % 10)
    assert images.shape == random_batch(script, N)[0].shape and images.dtype == torch.uint8
    assert (images[:, 0, 0] == labels.unsqueeze(1)).all()  # a top row, not a left column


# ---- the command line

WRONG = """--epochs 0|--epochs x|--epochs 1e3|--epochs 100000000|--batch-size 1|--batch-size nan
--batch-size 121|--lr 0|--lr nan|--lr inf|--lr x|--beta1 1|--beta1 -0.1|--latent-dim 0|--width 0
--latent-dim 10000000000|--seed -1|--seed 0.5|--seed 400001|--log-every 0|--save-every 0
--generate 0|--device abacus|--device meta|--device cuda:99|--precision fp8|--weights x.pt
--no-such-flag|--label x|--generate 1 --resume"""


def test_wrong_flags_are_refused(tmp_path, refused):
    for flags in re.split(r"[|\n]", WRONG):
        assert flags.split()[0] in refused(*flags.split()), flags
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert str(tmp_path / "file") in refused("--output-dir", place)
    assert (tmp_path / "file").read_text() == "mine"


@conditional_only
def test_a_label_is_a_number_a_name_or_its_beginning(script, monkeypatch, refused):
    name = script.CLASSES[1]
    for text in ("1", name, name.upper(), name[:3].lower()):
        assert script.find_label(text) == 1
    for text in ("", "10", "unicorn"):
        line = refused("--generate", 1, "--label", text)
        assert all(name in line for name in script.CLASSES)
    assert "--label" in refused("--label", "1")
    assert "--label" in refused("--generate", 101)
    monkeypatch.setattr(script, "CLASSES", ["caterpillar", "Cat"])
    assert [script.find_label(text) for text in ("cat", "Cate", "1")] == [1, 0, 1]


def test_a_mistake_in_ones_own_code_keeps_its_traceback(script, run, monkeypatch):
    monkeypatch.setattr(script.Generator, "forward", lambda *given: undefined_name)  # noqa: F821
    with pytest.raises(NameError):
        run()


# ---- the collection

# What makes them different GANs, by the number of texts that a part has; of any other it is one.
TEXTS = {
    10: "__init__",
    4: "Generator Discriminator GAN forward make_parser",
    3: "step train_epoch train load_images sample",
    2: "update_statistics mean_losses start_outputs save_grid save_samples save_weights generate "
    "load_generator parse_args",
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
    assert abs(judge.frechet_distance(one, one)) < 1e-6
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
    commands = re.findall(r"^    python (\w+)\.py(.*)$", README, re.MULTILINE)
    defaults = re.findall(r"^\| \[\w+\]\((\w+)\.py\) \| (\d+) \| ", README, re.MULTILINE)
    assert len(commands) >= 5 and len(defaults) == 4
    for name, flags in commands:
        parsers[name].parse_args(flags.split())
    for name, epochs in defaults:
        assert parsers[name].get_default("epochs") == int(epochs)
    helps = "".join(parser.format_help() for parser in parsers.values())
    known = helps + "--index-url --teach --standalone --nproc-per-node"
    assert set(re.findall(r"--[a-z][a-z-]*", README)) <= set(re.findall(r"--[a-z][a-z-]*", known))
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (HERE / link).exists(), link


def test_readmes_examples_run(data, tmp_path, monkeypatch):
    shutil.copytree(HERE / ".github/weights", tmp_path / ".github/weights")
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


def test_readmes_recipe_for_own_images_trains(tmp_path, monkeypatch):
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
