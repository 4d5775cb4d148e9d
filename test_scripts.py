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
    """Run a command line that must end with argparse's one line; return the line."""

    def refused(*flags):
        with pytest.raises(SystemExit, match="2"):
            run(*flags)
        return capsys.readouterr().err.splitlines()[-1]

    return refused


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


def random_batch(script, n):
    """Return random images and, for the conditional scripts, labels, as GAN.step takes them."""
    shape = (3, 32, 32) if script.__name__ == "cgan_cifar10" else (1, 28, 28)
    images = torch.rand(n, *shape) * 2 - 1
    return (images, torch.arange(n) % 10) if hasattr(script, "CLASSES") else (images,)


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


def test_a_step_moves_every_weight_but_frozen_ones_and_the_average_follows(script):
    generator = script.Generator(latent_dim=12, width=4).eval()  # as load_generator's are
    discriminator = script.Discriminator(width=4)
    frozen = [*generator.network[0].parameters(), *discriminator.network[-1].parameters()]
    for weight in frozen:
        weight.requires_grad_(False)
    gan = script.GAN(generator, discriminator, lr=0.01)
    weights = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    before = [weight.clone() for weight in weights]
    buffers = [value.clone() for value in generator.buffers()]
    gan.steps = 29
    batch = random_batch(script, 10)
    losses = gan.step(*batch)
    assert losses.shape == (2,) and losses.min() > 0 and not losses.requires_grad
    assert gan.steps == 30
    for then, now in zip(before, weights, strict=True):
        assert torch.equal(then, now) != now.requires_grad
    assert not any(map(torch.equal, buffers, generator.buffers()))
    decay = {"mlp_gan_mnist": 10, "cgan_fashion_mnist": 80}.get(script.__name__, 20)
    share = decay / (30 + decay)
    for average, then, now in zip(gan.average.parameters(), before, weights, strict=False):
        assert torch.allclose(average, torch.lerp(then, now, share), atol=1e-6)
    gan.update_bn(10, batches=2)
    assert not any(map(torch.equal, buffers, gan.average.buffers()))
    assert not gan.average.training


def test_both_networks_learn(script):
    networks = script.Generator(width=8), script.Discriminator(width=8)
    gan = script.GAN(*networks, lr=0.002, bf16=True)
    shape, conditional = random_batch(script, 20)[0].shape, hasattr(script, "CLASSES")
    labels = torch.arange(20) % (2 if conditional else 1)
    real = (1 - 2.0 * labels).view(-1, 1, 1, 1).expand(shape)  # class 0 is white, class 1 black
    inputs = [labels] if conditional else []
    for _ in range(30):
        gan.step(real, *inputs)
    images = gan.generator(torch.randn(20, gan.generator.latent_dim), *inputs)
    assert (images * real).mean() > 0.1
    logits, fake_logits = gan.discriminator(real), gan.discriminator(images)
    if conditional:
        assert logits[:, 2:].mean() < -3  # real images under wrong labels are fakes
        logits, fake_logits = (script.pick(part, labels) for part in (logits, fake_logits))
    assert logits.mean() > fake_logits.mean()


@cifar_only
def test_shifts_are_random_and_mostly_zero(script):
    images = random_batch(script, 4)[0]
    rolled = [images.roll((i, j), dims=(2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    found = [[torch.equal(script.augment(images), other) for other in rolled] for _ in range(200)]
    found = torch.tensor(found).sum(dim=0)
    assert found.all() and found.argmax() == 4


def test_a_run_leaves_what_it_promises(script, run, tmp_path, capsys, monkeypatch):
    # every third epoch's weights for every tenth's: fewer epochs to train
    script = edited(script.__name__, ("epoch % 10 == 0", "epoch % 3 == 0"))
    batches = []
    step = script.GAN.step
    monkeypatch.setattr(script.GAN, "step", lambda *args: batches.append(args[1:]) or step(*args))
    flags = "--batch-size 22 --log-every 3 --epochs 3 --no-bf16"
    run(*flags.split(), script=script)
    printed = capsys.readouterr()
    assert f"on cpu in fp32, to {tmp_path / 'out'}\n" in printed.out
    lines = re.findall(r"Step (\d+): Generator loss: \S+, discriminator loss: \d", printed.out)
    assert lines[:4] == ["3", "5", "8", "10"]
    assert "\r" not in printed.out + printed.err  # no frames of a bar outside a terminal
    real, *labels = map(torch.cat, zip(*batches[:5], strict=True))
    assert real.min() == -1 and real.max() == 1 and len(real.unique(dim=0)) == 5 * 22
    tops = ((real[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert tops.max() == 9 and (not labels or torch.equal(tops, labels[0].long()))
    assert not torch.equal(batches[0][0], batches[5][0])  # another order

    out = tmp_path / "out"
    run("--generate", 10 if labels else 64)  # the last grid's noise, through the average
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {
        *("real.png", "samples.gif", "losses.csv", "losses.png", "generator.pt", "checkpoint.pt"),
        *(f"samples/epoch_{epoch:04}.png" for epoch in range(4)),
        *("weights/epoch_0003.pt", "generator_seed_0.png"),
    }
    drawn, last = out / "generator_seed_0.png", out / "samples/epoch_0003.png"
    assert drawn.read_bytes() == last.read_bytes()
    assert Image.open(out / "samples.gif").n_frames == 4
    table = list(csv.reader((out / "losses.csv").read_text().splitlines()))
    assert table[0] == ["epoch", "step", "discriminator_loss", "generator_loss"]
    assert [row[:2] for row in table[1:4]] == [["0.6", "3"], ["1.0", "5"], ["1.6", "8"]]
    picture = Image.open(out / "real.png").convert("RGB")
    for row in range(10 if labels else 1):  # an image's top row shows its label
        cell = 2 * real.shape[-1] + 2
        red, *_ = picture.getpixel((picture.width - cell, row * cell + 3))
        assert red == (row if labels else 7)


def test_generate_makes_what_the_shipped_weights_hold(script, run, tmp_path, capsys):
    path = WEIGHTS / f"{script.__name__}.pt"
    generator = script.load_generator(path)
    torch.manual_seed(5)
    noise = torch.randn(4, generator.latent_dim)
    cases, labels = [[]], []
    if hasattr(script, "CLASSES"):
        cases = [["--label", script.CLASSES[1].upper()], ["--label", 1]]
        labels = [torch.ones(4).long()]
    images = script.sample(generator, noise.double(), *labels)  # noise as NumPy's is
    assert 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1  # all of the scale
    assert images.std(dim=0).mean() > 0.05
    script.save_grid(images, tmp_path / "expected.png")
    for flags in cases:
        run("--generate", 4, *flags, "--seed", 5, "--weights", path)
        picture = Path(capsys.readouterr().out.strip())
        assert picture.read_bytes() == (tmp_path / "expected.png").read_bytes()
    if labels:  # the second row is that class's, of the same noise
        run("--generate", 4, "--seed", 5, "--weights", path)
        rows = Image.open(capsys.readouterr().out.strip())
        grid = Image.open(picture)  # two columns and two rows
        size = 2 * images.shape[-1] + 2
        for column in range(2):
            left, right = rows.width + (column - 4) * size, (column + 1) * size
            shown = rows.crop((left, size + 2, left + size - 2, 2 * size))
            assert shown == grid.crop((right - size + 2, 2, right, size))


def outcome(folder):
    """Return what a run leaves: its checkpoint's numbers, and its other files' bytes."""
    checkpoint = load(folder / "checkpoint.pt")
    checkpoint = {part: checkpoint[part] for part in ("epoch", "history", "gan")}
    files = sorted(path for path in folder.rglob("*.*") if path.suffix != ".pt")
    return checkpoint, {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_run_resumes_exactly_or_with_new_flags(script, run, tmp_path, refused, monkeypatch):
    own_flag = ('    add("--resume"', '    add("--loss", default="bce")\n    add("--resume"')
    end = "        save_losses(history, folder)\n"
    kill = (end, f"{end}        assert epoch != 2 or args.resume\n")
    killed, changed = edited(script.__name__, own_flag, kill), edited(script.__name__, own_flag)
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = ("--epochs", 2, "--seed", 3, "--loss", "hinge")
    run(*flags, "--output-dir", whole, script=changed)
    with pytest.raises(AssertionError):
        run(*flags, script=killed)
    assert load(out / "checkpoint.pt")["epoch"] == 1
    changed.main(["--resume", "--output-dir", str(out)])  # all else as the run began
    (resumed, files), (unbroken, whole_files) = outcome(out), outcome(whole)
    torch.testing.assert_close(resumed, unbroken, rtol=0, atol=0)
    assert files == whole_files
    assert load(out / "checkpoint.pt")["args"]["loss"] == "hinge"

    assert "--resume" in refused()
    with pytest.raises(RuntimeError, match="size mismatch"):
        run("--resume", "--width", 9)
    new = "--resume --epochs 3 --lr 0.000123 --beta1 0.9 --log-every 1 --batch-size 40"
    run(*new.split())
    checkpoint = load(out / "checkpoint.pt")
    assert checkpoint["epoch"] == 3 and checkpoint["args"]["seed"] == 3
    assert [row[1] for row in checkpoint["history"]] == [2, 4, 5, 6, 7]
    for name in ("optimizer_g", "optimizer_d"):
        (group,) = checkpoint["gan"][name]["param_groups"]
        assert (group["lr"], tuple(group["betas"])) == (0.000123, (0.9, 0.999))
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="--lr"):
        patch.setattr(script, "generator_loss", lambda logits: logits.mean() * float("nan"))
        run("--resume", "--epochs", 4)  # noticed at the epoch's end
    assert load(out / "checkpoint.pt")["epoch"] == 3
    if hasattr(script, "CLASSES"):
        monkeypatch.setattr(script, "CLASSES", script.CLASSES[::-1])
        assert "other classes" in refused("--resume")
        with pytest.raises(ValueError, match="other classes"):
            run("--generate", 1)


def test_a_save_cut_short_leaves_the_old_file(script, tmp_path, monkeypatch):
    def full(state, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    (tmp_path / "generator.pt").write_bytes(b"old")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="No space"):
        script.save({}, tmp_path / "generator.pt")
    assert (tmp_path / "generator.pt").read_bytes() == b"old"


WORKER = """
import torch
from torchvision.datasets import cifar
import cgan_cifar10 as script

def step(gan, real, labels, step=script.GAN.step):
    gan.discriminator.network[0].requires_grad_(False)  # a frozen layer
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
    run("--output-dir", tmp_path / "one")  # each process had images of five classes only
    assert Path("out/real.png").read_bytes() == Path("one/real.png").read_bytes()
    run("--resume", "--epochs", 2)  # a checkpoint of two processes goes on in one
    assert load("out/checkpoint.pt")["epoch"] == 2


WRONG = """--epochs 0|--epochs x|--batch-size 0|--lr x|--latent-dim 0|--seed x|--generate 0
--weights x.pt|--no-such-flag|--label x|--label 1|--resume|--generate 1"""


def test_wrong_flags_are_refused(script, run, tmp_path, refused, monkeypatch):
    for flags in re.split(r"[|\n]", WRONG):
        line = refused(*flags.split())
        assert flags.split()[0] in line or "there is no" in line
    with pytest.raises(ValueError, match="--batch-size 121"):
        run("--batch-size", 121)
    if script.__name__ != "cgan_cifar10":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        assert "cgan_cifar10.py" in refused()
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    if hasattr(script, "CLASSES"):
        monkeypatch.setattr(script, "CLASSES", [*script.CLASSES, "unicorn"])
        with pytest.raises(ValueError, match="unicorn"):
            run()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/generator.pt").touch()
    assert "--output-dir" in refused()


def test_importing_prints_nothing_and_leaves_plots_alone():
    code = f"import sys, {', '.join(NAMES)}; assert 'matplotlib.pyplot' not in sys.modules"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


# These may differ between the four files; anything else has the same text wherever it stands.
OWN = """Generator Discriminator GAN __init__ forward step update_bn train load_images sample
load_generator generate main"""


def test_shared_parts_are_the_same_text():
    texts = {}
    requirements = (HERE / "requirements.txt").read_text().split()
    for name in NAMES:
        code = (HERE / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(rf"^(from|import) ({'|'.join(NAMES)})\b", code, re.MULTILINE)
        metadata = re.sub("^# ?", "", code.partition("# ///\n")[0], flags=re.MULTILINE)
        dependencies = ast.literal_eval(metadata.partition("dependencies = ")[2])
        assert dependencies == [*requirements[:-1], "matplotlib-inline"]
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN.split():
                text = ast.get_source_segment(code, node)
                assert texts.setdefault(node.name, text) == text, (name, node.name)


def test_readmes_commands_flags_defaults_and_links_are_real(capsys):
    def helped(name, *flags):
        with pytest.raises(SystemExit, match="0"):  # argparse checks values, but not names
            importlib.import_module(name).main([*flags, "--help"])
        return capsys.readouterr().out

    helps = {name: helped(name) for name in NAMES}
    helps["my_gan"] = helps["cgan_cifar10"]
    # after a command, two spaces and what it does
    command = r"^    (?:python|uv run|torchrun [^.]*?) (\w+)\.py(.*?)(?:  |$)"
    commands = re.findall(command, README + "".join(helps.values()), re.MULTILINE)
    assert len(commands) >= 17
    flag = r"--[a-z][a-z0-9-]*"
    for name, flags in commands:
        helped(name.replace("my_gan", "cgan_cifar10"), *flags.split())
        assert set(re.findall(flag, flags)) <= set(re.findall(flag, helps[name]))
    defaults = re.findall(r"^\| \[\w+\]\((\w+)\.py\) \| (\d+) \| ", README, re.MULTILINE)
    assert len(defaults) == 4
    for name, epochs in defaults:
        assert re.search(rf"--epochs EPOCHS[^-]*\({epochs}\)", helps[name])
    known = "".join(helps.values())
    known += "--index-url --standalone --nproc-per-node --with-requirements --teach"
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
    files, loop = re.findall(r"```python\n(import .*?)```", README, re.DOTALL)
    assert "10_000" in files and "range(1000)" in loop
    exec(files.replace("10_000", "1_000"), {})
    paths = list(tmp_path.rglob("*.png"))
    assert len(paths) == 1_000 and Image.open(paths[0]).size == (28, 28)
    names = {}
    exec(loop.replace("1000", "3"), names)
    assert names["digits"].shape == (16, 1, 28, 28) and names["digits"].std() > 0


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
    """Make pictures of two classes, as people have them: red above, blue below, or see-through."""
    folder = tmp_path / "pictures"
    for name in ("bear", "bear_polar"):
        (folder / name).mkdir(parents=True)
    upright = Image.new("RGB", (600, 700), "blue")
    upright.paste("red", (0, 0, 600, 350))
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF's orientation: what is shown on the left is above
    upright.save(folder / "bear/1.png")
    upright.rotate(90, expand=True).save(folder / "bear/2.jpg", exif=turned)
    Image.new("RGBA", (50, 40), (9, 9, 9, 0)).save(folder / "bear_polar/snow.png")
    return folder


def test_readmes_block_reads_what_folders_hold(pictures, capsys):
    script = own_script(["bear", "bear_polar"])
    images, labels = script.load_images(pictures)
    assert "images: {'bear': 2, 'bear_polar': 1}\n" in capsys.readouterr().out
    assert images.dtype == torch.uint8 and len(images) == len(labels) > 31_000
    for image, label in zip(images[:6].float(), labels, strict=False):
        red, blue = image[:, 3, 16], image[:, 28, 16]
        assert red.min() == 255 if label else red[0] > 200 > 60 > red[2]
        assert blue.min() == 255 if label else blue[2] > 200 > 60 > blue[0]
    os.truncate(pictures / "bear/2.jpg", 1000)
    with pytest.raises(ValueError, match="2.jpg"):
        script.load_images(pictures)
    Image.new("I;16", (40, 40)).save(pictures / "bear/0.png")
    with pytest.raises(ValueError, match="0.png"):
        script.load_images(pictures)
    (pictures / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match="empty"):
        script.load_images(pictures)


@cifar_only
def test_readmes_block_trains_at_64_pixels(run, pictures, tmp_path, monkeypatch):
    edits = re.findall(r"^\| `(nn.*)` \| `(nn.*)` \|$", README, re.MULTILINE)
    assert len(edits) == 2
    script = own_script(["bear"], *edits, size="64")
    shutil.rmtree(pictures / "bear_polar")
    loaded = [part[:22] for part in script.load_images(pictures)]
    monkeypatch.setattr(script, "load_images", lambda folder: loaded)
    run("--batch-size", 22, script=script)
    generator = script.load_generator(tmp_path / "out/generator.pt")
    images = script.sample(generator, torch.randn(2, 100), torch.tensor([0, 0]))
    assert images.shape == (2, 3, 64, 64)
