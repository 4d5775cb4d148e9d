"""Tests of the four scripts on tiny data sets made here: no network, no GPU, under a minute."""

import ast
import csv
import importlib
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torchvision import datasets

NAMES = ["mlp_gan_mnist", "dcgan_mnist", "cgan_fashion_mnist", "cgan_cifar10"]
CONDITIONAL = NAMES[2:]
SHAPES = {name: (3, 32, 32) if name == "cgan_cifar10" else (1, 28, 28) for name in NAMES}
FOLDERS = {
    "mlp_gan_mnist": "MNIST/raw",
    "dcgan_mnist": "MNIST/raw",
    "cgan_fashion_mnist": "FashionMNIST/raw",
    "cgan_cifar10": "cifar-10-batches-py",
}
HERE = Path(__file__).parent
N = 120  # tiny training images: 12 of each class


def make_data(folder):
    """Lay tiny data sets out as torchvision's downloads do."""
    torch.manual_seed(0)
    labels = [i % 10 for i in range(N)]
    for dataset in ("MNIST", "FashionMNIST"):
        raw = folder / dataset / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            pixels = torch.randint(0, 256, (N * 784,), dtype=torch.uint8).tolist()
            images = struct.pack(">4I", 2051, N, 28, 28) + bytes(pixels)
            (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(
                struct.pack(">2I", 2049, N) + bytes(labels)
            )
    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        part = torch.randint(0, 256, (N // 5, 3072), dtype=torch.uint8).numpy()
        (cifar / name).write_bytes(pickle.dumps({"data": part, "labels": labels[: N // 5]}))
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


@pytest.fixture(params=CONDITIONAL)
def conditional(request):
    return importlib.import_module(request.param)


@pytest.fixture
def run(request, data, tmp_path):
    """Run the script's command line with tiny data and networks, by default into tmp_path/out."""
    name = "script" if "script" in request.fixturenames else "conditional"
    script = request.getfixturevalue(name)

    def run(*flags):
        tiny = ["--device", "cpu", "--data-dir", data, "--output-dir", tmp_path / "out"]
        tiny += ["--batch-size", 60, "--epochs", 1, "--width", 8]
        script.main([str(flag) for flag in (*tiny, *flags)])

    return run


@pytest.fixture
def refused(capsys):
    """Call a function that must exit with one line, or argparse's usage and line; return that."""

    def refused(call, *flags, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == status, lines
        assert len(lines) == 1 or lines[0].startswith("usage: "), lines
        return lines[-1]

    return refused


def load(path):
    return torch.load(path, weights_only=True)


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def some_labels(script, n):
    """The labels of n images as the networks and GAN.step take them: none or one argument."""
    return (torch.arange(n) % 10,) if hasattr(script, "CLASSES") else ()


def what_to_sample(script, n):
    return torch.arange(n) % 10 if hasattr(script, "CLASSES") else n


def close(pixel, values):
    return all(abs(a - b) <= 1.5 for a, b in zip(pixel, values, strict=True))


# ---- networks and steps


def test_networks_have_the_promised_shapes_and_ranges(script):
    shape, labels = SHAPES[script.__name__], some_labels(script, 4)
    for latent_dim, width in ((7, 8), (100, 16)):
        generator = script.Generator(latent_dim=latent_dim, width=width)
        discriminator = script.Discriminator(width=width)
        assert (generator.latent_dim, generator.width) == (latent_dim, width)
        images = generator(10 * torch.randn(4, latent_dim), *labels)
        assert images.shape == (4, *shape)
        assert images.min() >= -1 and images.max() <= 1 and images.std() > 0
        assert discriminator(images).shape == ((4, 10) if labels else (4,))
        for size in (16, 40):  # as a smaller or larger generator would make
            with pytest.raises(RuntimeError):
                discriminator(torch.zeros(4, shape[0], size, size))


def test_losses_are_the_papers(script):
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    assert torch.isclose(script.discriminator_loss(real, fake), expected)
    assert torch.isclose(script.generator_loss(fake), -d_fake.log().mean())
    assert script.generator_loss(torch.tensor([-200.0])) == 200  # Sigmoid + BCELoss stops at 100


def test_a_step_moves_every_weight_and_the_average_follows(script):
    gan = script.GAN(script.Generator(width=8), script.Discriminator(width=8), lr=0.01)
    networks = [gan.generator, gan.discriminator]
    before = [[value.clone() for value in part.parameters()] for part in networks]
    real = torch.rand(10, *SHAPES[script.__name__]) * 2 - 1
    losses = gan.step(real, *some_labels(script, 10))
    assert losses.shape == (2,) and losses.isfinite().all() and not losses.requires_grad
    for part, old in zip(networks, before, strict=True):
        for value, then in zip(part.parameters(), old, strict=True):
            assert not torch.equal(value, then)
    gan.update_average(0.25)
    live = gan.generator.parameters()
    for average, then, now in zip(gan.average.parameters(), before[0], live, strict=True):
        assert torch.allclose(average, 0.75 * then + 0.25 * now, atol=1e-6)
    statistics = dict(gan.average.named_buffers())
    before = {name: value.clone() for name, value in statistics.items()}
    gan.update_statistics(2, 10)
    assert not any(torch.equal(before[name], statistics[name]) for name in before)
    assert not gan.average.training


def test_the_generators_backward_leaves_the_discriminator_alone(script):
    gan = script.GAN(script.Generator(width=8), script.Discriminator(width=8))
    seen = []
    optimizer_step = gan.optimizer_d.step
    gan.optimizer_d.step = lambda: (
        optimizer_step(),
        seen.extend(value.grad.clone() for value in gan.discriminator.parameters()),
    )
    gan.step(torch.zeros(4, *SHAPES[script.__name__]), *some_labels(script, 4))
    for value, then in zip(gan.discriminator.parameters(), seen, strict=True):
        assert torch.equal(value.grad, then)


def test_labels_reach_both_networks(conditional):
    generator, discriminator = conditional.Generator().eval(), conditional.Discriminator().eval()
    noise = torch.randn(1, generator.latent_dim)
    images = [generator(noise, torch.tensor([label])) for label in range(10)]
    assert len({image.sum().item() for image in images}) == 10
    logits = discriminator(torch.cat(images))
    labels = torch.tensor([3, 7, 0, 0, 9, 1, 2, 4, 5, 6])
    assert conditional.pick(logits, labels).tolist() == [logits[i, k] for i, k in enumerate(labels)]


def test_real_images_count_as_fake_under_another_label(conditional, monkeypatch):
    picked, losses = [], []
    pick, loss = conditional.pick, conditional.discriminator_loss
    monkeypatch.setattr(
        conditional, "pick", lambda *given: picked.append((*given, pick(*given))) or picked[-1][2]
    )
    monkeypatch.setattr(
        conditional, "discriminator_loss", lambda *given: losses.append(given) or loss(*given)
    )
    gan = conditional.GAN(conditional.Generator(width=8), conditional.Discriminator(width=8))
    labels = torch.arange(100) % 10
    gan.step(torch.zeros(100, *SHAPES[conditional.__name__]), labels)
    fake, wrong, real = picked[:3]
    assert torch.equal(fake[1], labels) and torch.equal(real[1], labels)
    assert wrong[0] is real[0] and wrong[0] is not fake[0]
    assert set(((wrong[1] - labels) % 10).tolist()) == set(range(1, 10))
    assert torch.equal(losses[0][0], real[2])
    assert torch.equal(losses[0][1], torch.cat((fake[2], wrong[2])))


def test_the_discriminator_trains_on_noisy_and_mirrored_images(monkeypatch):
    script = importlib.import_module("cgan_cifar10")
    images = torch.zeros(200, 3, 32, 32)
    images[..., 0] = 1
    assert 0.09 < (script.add_noise(images) - images).std() < 0.11
    mirrored = script.mirror_half(images)[:, 0, 0, -1]
    assert set(mirrored.tolist()) == {0, 1} and 60 < mirrored.sum() < 140
    calls, add_noise = [], script.add_noise
    monkeypatch.setattr(
        script, "add_noise", lambda images: calls.append(len(images)) or add_noise(images)
    )
    gan = script.GAN(script.Generator(width=8), script.Discriminator(width=8))
    gan.step(images[:4], torch.arange(4))
    assert calls == [4, 4, 4]


# ---- a run and what it leaves


def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys):
    run("--epochs", 2, "--log-every", 1, "--save-every", 2)
    printed = capsys.readouterr()
    assert "Step 3: Generator loss: " in printed.out and ", discriminator loss: " in printed.out
    line = r"Epoch 1/2: generator loss \d\.\d{3}, discriminator loss \d\.\d{3}, .* s, .* images/s,"
    assert re.search(line + r" \d:\d\d:\d\d left", printed.out)
    assert f"cpu, fp32, {N} images" in printed.out or f"cpu, bf16, {N} images" in printed.out
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in tree(out)}
    assert names == {
        *("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt", "checkpoint.pt"),
        *(f"samples/epoch_000{epoch}.png" for epoch in range(3)),
        "weights/epoch_0002.pt",
    }
    size = Image.open(out / "real.png").size
    assert size == Image.open(out / "samples/epoch_0002.png").size
    animation = Image.open(out / "samples.gif")
    assert animation.size == size and animation.n_frames > 1
    animation.seek(animation.n_frames - 1)
    assert animation.info["duration"] == 2000
    rows = list(csv.DictReader((out / "losses.csv").open()))
    assert list(rows[0]) == ["epoch", "step", "discriminator_loss", "generator_loss", "seconds"]
    assert [row["epoch"] + row["step"] for row in rows] == ["11", "12", "23", "24"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_loss_rows_are_means_since_the_row_before(script, run, tmp_path, monkeypatch):
    losses, step = [], script.GAN.step
    monkeypatch.setattr(
        script.GAN, "step", lambda *given: losses.append(step(*given)) or losses[-1]
    )
    run("--batch-size", 24, "--log-every", 3, "--epochs", 2)  # rows at 3 and 5 of each epoch's 5
    rows = list(csv.DictReader((tmp_path / "out/losses.csv").open()))
    parts = (losses[:3], losses[3:5], losses[5:8], losses[8:])
    for row, part in zip(rows, parts, strict=True):
        means = torch.stack(part).mean(dim=0).tolist()
        assert [float(row["discriminator_loss"]), float(row["generator_loss"])] == means


def test_seed_and_epoch_govern_what_is_drawn(script, run, tmp_path, monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(randn(*a, **k)) or drawn[-1])
    flags = ("--epochs", 2, "--batch-size", 120, "--output-dir")
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(*flags, tmp_path / folder, "--seed", seed)
    noise = [values for values in drawn if len(values) == 120]  # a step and its statistics
    one, again, other = noise[:4], noise[4:8], noise[8:]
    assert not torch.equal(one[0], one[2])  # the two epochs' steps
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))
    pictures = [
        (tmp_path / name / "samples/epoch_0002.png").read_bytes()
        for name in ("one", "again", "other")
    ]
    assert pictures[0] == pictures[1] != pictures[2]


def test_real_images_are_shown_as_they_are(script, run, data, tmp_path):
    run()
    picture = Image.open(tmp_path / "out/real.png").convert("RGB")
    images = script.load_images(data)
    labelled = hasattr(script, "CLASSES")
    first = images[0][0] if labelled else images[0]  # label 0 is the first image's
    size, columns = 2 * first.shape[1] + 2, 10 if labelled else 8
    left = picture.width - columns * size
    for y, x in ((0, 0), (5, 9), (27, 27)):
        pixel = picture.getpixel((left + 2 * x, 2 + 2 * y))
        assert close(pixel, first[:, y, x].expand(3).tolist())


def test_generate_draws_what_the_weights_hold(script, run, tmp_path, capsys):
    run()
    weights = load(tmp_path / "out/generator.pt")
    assert weights["width"] == 8
    weights["generator"]["network.0.weight"].normal_()  # so that images differ from one another
    torch.save(weights, tmp_path / "weights.pt")
    generator = script.load_generator(tmp_path / "weights.pt")
    assert not generator.training
    label = ("--label", 1) if hasattr(script, "CLASSES") else ()
    pictures = []
    for seed in (6, 5):
        capsys.readouterr()
        run("--generate", 4, *label, "--seed", seed, "--weights", tmp_path / "weights.pt")
        pictures.append(Path(capsys.readouterr().out.strip()))
        torch.manual_seed(seed)
        images = script.sample(generator, [1] * 4 if label else 4)
        script.save_grid(tmp_path / "expected.png", images, 2)
        assert pictures[-1].read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_sample_follows_torchs_seed_and_range(script):
    generator = script.Generator(width=8).eval()
    samples = []
    for seed in (1, 1, None):
        if seed is not None:
            torch.manual_seed(seed)
        samples.append(script.sample(generator, what_to_sample(script, 501)))  # more than at once
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])
    assert samples[0].shape == (501, *SHAPES[script.__name__])
    assert samples[0].dtype == torch.float32 and not samples[0].requires_grad
    assert samples[0].min() >= 0 and samples[0].max() <= 1


def test_bf16_trains_too(script, run, tmp_path, capsys):
    run("--precision", "bf16")
    assert "bf16" in capsys.readouterr().out
    weights = load(tmp_path / "out/generator.pt")["generator"]
    assert weights["network.0.weight"].dtype == torch.float32


def test_bf16_is_asked_of_the_device_that_is_used(script, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert script.multiplies_bf16(torch.device("cuda:1")) and asked == [torch.device("cuda:1")]
    zen4 = {"avx512_bf16": True, "cpu_name": "AMD Ryzen 9"}
    for cpu in ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, zen4):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert script.multiplies_bf16(torch.device("cpu"))
        assert not script.multiplies_bf16(torch.device("mps"))
    for cpu in ({}, {**zen4, "cpu_name": "Intel Xeon"}, {**zen4, "avx512_bf16": False}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu)
        assert not script.multiplies_bf16(torch.device("cpu"))


def test_a_label_is_a_number_a_name_or_its_beginning(conditional):
    name = conditional.CLASSES[1]
    for text in ("1", name, name.upper(), name[:3].lower()):
        assert conditional.find_label(text) == 1


def test_a_column_is_of_one_noise(conditional, monkeypatch):
    generator, noise = conditional.Generator(width=8).eval(), []
    generator.register_forward_pre_hook(lambda module, inputs: noise.append(inputs[0]))
    images = conditional.sample_rows(generator, [2, 5], 3, seed=4)
    assert torch.equal(*noise) and not torch.equal(images[:3], images[3:])


def test_a_label_that_begins_another_is_found_by_its_whole_name(conditional, monkeypatch):
    monkeypatch.setattr(conditional, "CLASSES", ["caterpillar", "Cat"])
    assert [conditional.find_label(text) for text in ("cat", "Cate", "1")] == [1, 0, 1]
    with pytest.raises(Exception, match="caterpillar, Cat"):
        conditional.find_label("ca")


# ---- resume: exact, and nothing is lost


def outcome(folder):
    """What a run leaves, but for its seconds."""
    checkpoint = load(folder / "checkpoint.pt")
    files = {
        path.relative_to(folder): content
        for path, content in tree(folder).items()
        if path.suffix in (".png", ".gif")
    }
    rows = [row[:-1] for row in csv.reader((folder / "losses.csv").open())]
    return checkpoint["gan"], load(folder / "generator.pt"), files, rows


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def change_step(script, monkeypatch, number, change):
    """Have the losses of the given step from now on go through `change`."""
    calls, step = [], script.GAN.step

    def changed(*given):
        calls.append(1)
        losses = step(*given)
        return change(losses) if len(calls) == number else losses

    monkeypatch.setattr(script.GAN, "step", changed)


def ctrl_c(losses):
    raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_bits(script, run, data, tmp_path, refused):
    flags = ("--epochs", 4, "--log-every", 3, "--save-every", 2, "--seed", 3)
    run(*flags, "--output-dir", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        change_step(script, patch, 6, ctrl_c)  # the last step of epoch 3 of 4
        line = refused(run, *flags, status=130)
    assert line == "stopped; --resume goes on after the last finished epoch, if any"
    folders = ["--data-dir", str(data), "--output-dir", str(tmp_path / "out")]
    script.main([*folders, "--device", "cpu", "--resume"])
    assert same(outcome(tmp_path / "whole"), outcome(tmp_path / "out"))


def test_resume_may_change_epochs_and_lr_but_not_the_run(script, run, tmp_path, refused):
    run("--seed", 7)
    before = tree(tmp_path / "out")
    own = ("--resume", "--seed", 7)
    for flags in (("--seed", 8), ("--latent-dim", 5), ("--beta1", 0.9), ("--width", 9)):
        assert flags[0] in refused(run, *own, *flags)
    assert tree(tmp_path / "out") == before
    run(*own, "--epochs", 2, "--lr", 0.000123)
    checkpoint = load(tmp_path / "out/checkpoint.pt")
    assert checkpoint["rows"][-1]["epoch"] == 2 and checkpoint["settings"]["seed"] == 7
    for optimizer in ("optimizer_g", "optimizer_d"):
        assert checkpoint["gan"][optimizer]["param_groups"][0]["lr"] == 0.000123
    run(*own, "--epochs", 1)  # it has two already
    assert load(tmp_path / "out/checkpoint.pt")["settings"]["epochs"] == 2


def test_a_resumed_run_that_is_stopped_at_once_keeps_its_settings(script, run, tmp_path, refused):
    run()
    with pytest.MonkeyPatch.context() as patch:
        change_step(script, patch, 1, ctrl_c)
        refused(run, "--resume", "--epochs", 80, status=130)
    assert load(tmp_path / "out/checkpoint.pt")["settings"]["epochs"] == 1


def test_a_finished_run_resumed_makes_missing_files_again(script, run, tmp_path, capsys):
    run()
    files = tree(tmp_path / "out")
    before = {path: files[path] for path in files if path.suffix in (".png", ".gif", ".csv")}
    for path in files:
        if path.name not in ("checkpoint.pt", "epoch_0000.png"):
            path.unlink()
    run("--resume")
    assert "Finished" in capsys.readouterr().out
    after = tree(tmp_path / "out")
    assert {path: after[path] for path in before} == before
    script.load_generator(tmp_path / "out/generator.pt")


def test_an_unreadable_sample_is_left_out_of_the_animation(script, run, tmp_path):
    run("--epochs", 2)
    for content in (b"", (tmp_path / "out/samples/epoch_0000.png").read_bytes()[:200]):
        (tmp_path / "out/samples/epoch_0001.png").write_bytes(content)
        (tmp_path / "out/samples.gif").unlink()
        run("--resume")
        assert Image.open(tmp_path / "out/samples.gif").n_frames == 2


def test_a_folder_with_a_run_is_left_alone(run, script, tmp_path, refused):
    run()
    before = tree(tmp_path / "out")
    line = refused(run)
    assert "--resume" in line and "--output-dir" in line
    assert tree(tmp_path / "out") == before


def test_a_full_disk_leaves_the_old_file_whole(script, tmp_path, monkeypatch):
    path = tmp_path / "file"

    def write(content):
        with script.atomic_open(path) as file:
            file.write(content)

    def full(descriptor):
        assert os.fstat(descriptor).st_size == 3  # all of it was written
        raise OSError(28, "No space left on device")

    write(b"old")
    with monkeypatch.context() as patch, pytest.raises(script.UsageError, match="file .*No space"):
        patch.setattr(os, "fsync", full)
        write(b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    moves, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: moves.append(paths) or replace(*paths))
    write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert moves[0][1] == path and str(os.getpid()) in moves[0][0].name


def test_nan_stops_the_run_and_keeps_the_checkpoint(script, run, tmp_path, monkeypatch, refused):
    run()
    before = outcome(tmp_path / "out")
    change_step(script, monkeypatch, 1, lambda losses: losses * float("nan"))
    line = refused(run, "--resume", "--epochs", 2)
    assert "step 4" in line and "--lr" in line  # noticed at the epoch's end
    assert same(outcome(tmp_path / "out"), before)


def test_other_data_than_the_runs_is_refused(script, run, tmp_path, refused):
    run()
    checkpoint = load(tmp_path / "out/checkpoint.pt")
    torch.save({**checkpoint, "images": 60_000}, tmp_path / "out/checkpoint.pt")
    line = refused(run, "--resume", "--epochs", 2)
    assert "60000" in line and str(N) in line


# ---- more than one device

WORKER = """
import os
import torch
from torchvision import datasets
import cgan_cifar10 as script
for name in ("train_list", "test_list"):
    setattr(datasets.CIFAR10, name, [[file, None] for file, _ in getattr(datasets.CIFAR10, name)])
datasets.CIFAR10.meta = {**datasets.CIFAR10.meta, "md5": None}
seen, step, train_epoch = [], script.GAN.step, script.train_epoch
def observed_step(gan, real, labels):
    seen.append((real.clone(), labels.clone(), torch.get_rng_state()))
    return step(gan, real, labels)
def observed_epoch(gan, *rest):
    rows = train_epoch(gan, *rest)
    parameters = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    torch.save((seen, [value.detach() for value in parameters]), f"rank{os.environ['RANK']}.pt")
    return rows
script.GAN.step, script.train_epoch = observed_step, observed_epoch
script.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun is untried on Windows")
@pytest.mark.parametrize("script", [importlib.import_module("cgan_cifar10")])
def test_two_processes_train_one_gan(script, run, data, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--device", "cpu", "--batch-size", 60, "--log-every", 1, "--width", 8, "--epochs", 1]
    folders = ["--data-dir", data, "--output-dir", tmp_path / "out"]
    done = subprocess.run(
        [*torchrun, tmp_path / "worker.py", *map(str, flags + folders)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Step 1: ") == done.stdout.count("Finished") == 1
    (one, weights), (two, others) = (load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, weights, others))  # BatchNorm's buffers are each process's own
    assert [len(labels) for _, labels, _ in one + two] == [30] * 4
    assert not torch.equal(one[0][2], two[0][2])  # dice of their own
    both = torch.cat([labels for _, labels, _ in one + two])
    assert torch.equal(both.bincount(), script.load_images(data)[1].bincount())  # each image once
    run("--resume", "--epochs", 2)  # a checkpoint of two processes goes on in one
    assert load(tmp_path / "out/checkpoint.pt")["rows"][-1]["epoch"] == 2


@pytest.mark.parametrize("device, nccl, backend", [("cpu", 1, "gloo"), ("cuda", 1, "nccl")])
def test_the_backend_is_the_devices(data, monkeypatch, device, nccl, backend):
    script = importlib.import_module("cgan_cifar10")
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    distributed = script.distributed
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "init_process_group", lambda name, **_: calls.append(name))
    args = script.make_parser().parse_args(["--device", device, "--data-dir", str(data)])
    script.join_processes(args)
    assert calls[-1] == backend


# ---- files from strangers


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def bad_files(folder, whole):
    folder.mkdir()
    (folder / "directory.pt").mkdir()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("weights")
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"generator": Payload(folder / "trace")}, folder / "payload.pt")
    torch.save({"latent_dim": 2, "width": 2}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    return sorted(folder.glob("*.pt")) + [folder / "missing.pt"]


def test_files_that_hold_no_generator_are_refused(script, run, tmp_path, refused):
    run()
    whole = (tmp_path / "out/generator.pt").read_bytes()
    weights = load(tmp_path / "out/generator.pt")
    for path in bad_files(tmp_path / "bad", whole):
        assert str(path) in refused(run, "--generate", 1, "--weights", path)
        with pytest.raises(script.UsageError):
            script.load_generator(path)
    assert not (tmp_path / "bad/trace").exists()
    torch.save({**weights, "width": 9}, tmp_path / "width.pt")
    line = refused(run, "--generate", 1, "--weights", tmp_path / "width.pt")
    assert "size mismatch for network.0.weight" in line


def test_a_hostile_size_takes_no_memory(script, tmp_path):
    state = script.Generator(width=8).state_dict()
    torch.save({"latent_dim": 10**12, "width": 8, "generator": state}, tmp_path / "w.pt")
    with pytest.raises(script.UsageError, match="size mismatch"):  # not: can't allocate
        script.load_generator(tmp_path / "w.pt")


def test_files_that_hold_no_run_are_refused(script, run, tmp_path, refused):
    run()
    checkpoint = tmp_path / "out/checkpoint.pt"
    whole = checkpoint.read_bytes()
    saved = load(checkpoint)
    bad = bad_files(tmp_path / "bad", whole)
    nonsense = [
        {"rows": []},
        {"rows": [{**saved["rows"][0], "epoch": "x"}]},
        {"rows": 5},
        {"images": None},
        {"settings": {"seed": 0}},
        {"settings": {**saved["settings"], "log_every": "x"}},
        {"gan": {**saved["gan"], "optimizer_d": {}}},
    ]
    for number, change in enumerate(nonsense):
        bad.append(tmp_path / f"bad/nonsense_{number}.pt")
        torch.save({**saved, **change}, bad[-1])
    for path in bad:
        checkpoint.unlink(missing_ok=True)
        if path.is_file():
            checkpoint.write_bytes(path.read_bytes())
        before = tree(tmp_path / "out")
        line = refused(run, "--resume", "--epochs", 2)
        assert str(checkpoint) in line or "--log-every" in line
        assert "delete" not in line
        assert tree(tmp_path / "out") == before
    assert not (tmp_path / "bad/trace").exists()


# ---- data


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "not a folder"])
def test_unusable_data_gets_one_line(script, run, tmp_path, refused, damage):
    broken = tmp_path / "data"
    if damage == "not a folder":
        broken.write_text("")
    elif damage != "missing":
        broken.mkdir()
        make_data(broken)
        files = "*_batch*" if script.SCRIPT == "cgan_cifar10" else "train-*"
        for path in (broken / FOLDERS[script.SCRIPT]).glob(files):
            path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    line = refused(run, "--data-dir", broken)
    assert str(broken) in line and "http" in line and ".gz" in line
    assert not (tmp_path / "out").exists()


def test_images_are_loaded_the_right_way_round(script, data):
    images = script.load_images(data)
    images, labels = images if hasattr(script, "CLASSES") else (images, None)
    folder = data / FOLDERS[script.SCRIPT]
    if script.SCRIPT == "cgan_cifar10":
        raw = pickle.loads((folder / "data_batch_1").read_bytes())["data"][1].tobytes()
    else:
        raw = (folder / "train-images-idx3-ubyte").read_bytes()[16 + 784 : 16 + 2 * 784]
    assert images.shape == (N, *SHAPES[script.SCRIPT]) and images.dtype == torch.uint8
    assert bytes(images[1].flatten().tolist()) == raw
    assert labels is None or (labels[1] == 1 and labels.shape == (N,))


# ---- the command line

WRONG = """--epochs 0|--epochs -1|--epochs x|--epochs 1e3|--epochs 100000000|--batch-size 0
--batch-size 1|--batch-size nan|--batch-size 121|--lr 0|--lr -1|--lr nan|--lr inf|--lr x|--beta1 1
--beta1 -0.1|--beta1 nan|--latent-dim 0|--latent-dim 10000000000|--width 0|--seed -1|--seed 0.5
--seed 400001|--log-every 0|--save-every 0|--generate 0|--generate -4|--device abacus|--device meta
--device cuda:99|--precision fp8|--weights x.pt|--no-such-flag|--label x|--generate 1 --resume"""


def test_wrong_flags_are_refused(script, run, tmp_path, refused):
    for flags in re.split(r"[|\n]", WRONG):
        assert flags.split()[0] in refused(run, *flags.split()), flags
        assert not (tmp_path / "out").exists(), flags


def test_wrong_labels_are_refused(conditional, run, refused):
    for text in ("", "s" if "fashion" in conditional.SCRIPT else "a", "10", "unicorn"):
        line = refused(run, "--generate", 1, "--label", text)
        assert all(name in line for name in conditional.CLASSES)
    assert "--label" in refused(run, "--label", "1")
    assert "--label" in refused(run, "--generate", 101)


def test_an_output_folder_that_cannot_be_is_refused(script, run, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert str(tmp_path / "file") in refused(run, "--output-dir", place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mistake_in_ones_own_code_keeps_its_traceback(script, run, monkeypatch):
    monkeypatch.setattr(script.Generator, "forward", lambda *given: undefined_name)  # noqa: F821
    with pytest.raises(NameError):
        run()


# ---- the collection

# What makes them different GANs; all else that two scripts share by name is the same text.
OWN = {
    "mlp_gan_mnist": {"Generator.__init__", "Discriminator.__init__", "make_parser"},
    "cgan_fashion_mnist": {
        *("Generator.__init__", "Generator.forward", "Discriminator.__init__"),
        *("Discriminator.forward", "GAN.step", "GAN.update_statistics", "train_epoch", "train"),
        *("load_images", "sample", "generate", "start_outputs", "save_grid", "save_samples"),
        *("make_parser", "parse_args"),
    },
}
OWN["cgan_cifar10"] = {*OWN["cgan_fashion_mnist"], "GAN.__init__", "mean_losses"}
ALSO_SHARED = """pick sample_rows find_label Generator.forward Discriminator.forward start_outputs
    GAN.update_statistics generate save_grid save_samples parse_args"""  # of the conditional two


def definitions(name):
    """The text of each function and method by name; classes without methods by theirs."""
    text, found = (HERE / f"{name}.py").read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for part in methods if isinstance(node, ast.ClassDef) else []:
                found[f"{node.name}.{part.name}"] = ast.get_source_segment(text, part)
            if isinstance(node, ast.FunctionDef) or not methods:
                found[node.name] = ast.get_source_segment(text, node)
    return found


@pytest.mark.parametrize("path", sorted((HERE / ".github/weights").glob("*.pt")), ids=str)
def test_shipped_weights_generate(path):
    script = importlib.import_module(path.stem)
    images = script.sample(script.load_generator(path), what_to_sample(script, 10))
    assert images.shape == (10, *SHAPES[path.stem]) and images.std(dim=0).mean() > 0.05


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


def test_shared_parts_are_the_same_text():
    reference = definitions("dcgan_mnist")
    for name, own in OWN.items():
        for part, text in definitions(name).items():
            if part in reference and part not in own:
                assert text == reference[part], f"{part} of {name}.py has drifted"
    fashion, cifar = map(definitions, CONDITIONAL)
    for part in ALSO_SHARED.split():
        assert fashion[part] == cifar[part], f"{part} has drifted"


def test_scripts_stand_alone():
    for name in NAMES:
        text = (HERE / f"{name}.py").read_text()
        assert text.startswith("# SPDX-License-Identifier: MIT\n")
        assert not re.search(rf"^(from|import) ({'|'.join(NAMES)})\b", text, re.MULTILINE)


def test_readme_names_real_flags_scripts_and_defaults(capsys):
    text = (HERE / "README.md").read_text()
    helps = {}
    for name in NAMES:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        helps[name] = " ".join(capsys.readouterr().out.split())
    commands = re.findall(r"^    python (\w+)\.py(.*)$", text, re.MULTILINE)
    assert len(commands) >= 5
    for name, flags in commands:
        assert all(flag in helps[name] for flag in re.findall(r"--[a-z-]+", flags)), (name, flags)
    torchrun = "--standalone --nproc-per-node"
    known = "".join(helps.values()) + "--index-url --teach" + torchrun
    assert all(flag in known for flag in re.findall(r"--[a-z-]+[a-z]", text))
    defaults = re.findall(r"^\| \[\w+\]\((\w+)\.py\) \| .* \| (\d+) \| ", text, re.MULTILINE)
    assert len(defaults) == 4
    for name, epochs in defaults:
        assert f"passes over the training images (default: {epochs})" in helps[name], name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (HERE / link).exists(), link


def test_readmes_examples_run(data, tmp_path, monkeypatch):
    script = importlib.import_module("cgan_fashion_mnist")
    path = tmp_path / ".github/weights/cgan_fashion_mnist.pt"
    script.save_weights(script.Generator(width=8), path)
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    text = (HERE / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    results = [{}, {}, {}]
    for example, names in zip(examples, results, strict=True):
        exec(example.replace("1001", "3"), names)
    images, row, digits = results[0]["images"], results[1]["row"], results[2]["digits"]
    assert images.shape == row.shape == (8, 1, 28, 28) and digits.shape == (16, 1, 28, 28)
    assert images.min() >= 0 and row.std() > 0 and digits.std() > 0


def test_readmes_recipe_for_own_images_trains(tmp_path, monkeypatch):
    code = (HERE / "cgan_cifar10.py").read_text()
    for change in re.search(r"```diff\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[
        1
    ].split("\n\n"):
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
    script = importlib.import_module("cgan_pets")
    flags = ["--device", "cpu", "--width", 8, "--batch-size", 10, "--epochs", 1]
    folders = ["--data-dir", tmp_path / "images", "--output-dir", tmp_path / "out"]
    script.main([str(flag) for flag in flags + folders])
    generator = script.load_generator(tmp_path / "out/generator.pt")
    assert script.sample(generator, [0, 1]).shape == (2, 3, 64, 64)
