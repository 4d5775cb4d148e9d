# SPDX-License-Identifier: MIT
"""Measure a trained generator against real images: the README's figures.

    python .github/figures/judge.py dcgan_mnist.py .github/weights/dcgan_mnist.pt

10,000 images are generated, of a conditional script's classes equally many, and compared with the
10,000 real test images, in the features of a small classifier that was trained on that data set. It
puts 99.9, 97 and 94 % of 5,000 training images into their class, of 5,000 test images 99.7, 94 and
88 % (MNIST, Fashion-MNIST, CIFAR-10). In brackets stand the same figures of real images: 10,000
training images, for `class` test images.

    Fréchet distance  between both sets of features (arXiv:1706.08500 has the formula): lower is
                      better. It compares within a data set only and is no Inception FID.
    coverage          the share of real test images that have a generated one nearer than their own
                      fifth nearest real neighbour (arXiv:2002.09797): it falls if a kind is missing
    grain             the largest ratio, over all frequencies, of generated images' mean energy to
                      real ones', and the frequency, in cycles a pixel (0.50 down, 0.50 right: a
                      checkerboard)
    class             the share of images that the classifier puts into their class, of generated
                      ones the class asked for
    teaches           with --teach, some minutes: the accuracy, on real test images, of a new
                      classifier trained on 20,000 generated images, and of one trained on 20,000
                      real ones (arXiv:1807.09499)
    told              with --teach: how often a new classifier tells generated from real test images
                      after training on 5,000 of each (arXiv:1610.06545); 0.5 is chance
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets

N = 10_000
N_TEACH = 20_000
DATASETS = {
    "mlp_gan_mnist": datasets.MNIST,
    "dcgan_mnist": datasets.MNIST,
    "cgan_fashion_mnist": datasets.FashionMNIST,
    "cgan_cifar10": datasets.CIFAR10,
}


def convolution(channels_in, channels_out):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.network = nn.Sequential(
            convolution(channels, channels), convolution(channels, channels)
        )

    def forward(self, images):
        return images + self.network(images)


class Classifier(nn.Module):
    """Turns images (n, C, H, W) in [0, 1] into logits (n, 10)."""

    def __init__(self, channels, width):
        super().__init__()
        self.features = nn.Sequential(
            convolution(channels, width),
            convolution(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            convolution(4 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images):
        return self.head(self.features(2 * images - 1))

    @torch.no_grad()
    def read(self, images):
        """Return the features (n, 4 * width) and the classes (n,) of images."""
        features = torch.cat([self.features(2 * part - 1) for part in images.split(500)])
        return features, self.head(features).argmax(dim=1)


def load_classifier(dataset):
    """Return the classifier of a torchvision data set's name, in eval mode."""
    path = Path(__file__).with_name(f"{dataset}.pt")
    state = torch.load(path, weights_only=True)
    width, channels = state["features.0.0.weight"].shape[:2]
    classifier = Classifier(channels, width)
    classifier.load_state_dict(state)  # from half to single precision
    return classifier.eval()


def train_classifier(images, labels, epochs=10, batch_size=128):
    """Return a small new classifier trained on images (n, C, H, W) and labels (n,)."""
    torch.manual_seed(0)
    classifier = Classifier(images.shape[1], 16)
    optimizer = torch.optim.Adam(classifier.parameters())
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            loss = F.cross_entropy(classifier(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def frechet_distance(one, other):
    """Return the Fréchet distance of normal distributions fitted to features (n, d), (m, d)."""
    one, other = one.double(), other.double()
    means = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    covariance, other_covariance = one.T.cov(), other.T.cov()
    # the trace of the product's square root is the sum of its eigenvalues' roots
    roots = torch.linalg.eigvals(covariance @ other_covariance).real.clamp(min=0).sqrt()
    return (means + covariance.trace() + other_covariance.trace() - 2 * roots.sum()).item()


def coverage(real, generated, neighbours=5):
    """Return the share of real features (n, d) with a generated one among their neighbours."""
    covered = 0
    for part in real.split(1000):
        # one more, as the nearest is the image itself
        radius = torch.cdist(part, real).kthvalue(neighbours + 1).values
        covered += (torch.cdist(part, generated).amin(dim=1) <= radius).sum().item()
    return covered / len(real)


def spectrum(images):
    """Return the mean spectral energy of images (n, C, H, W) by frequency: (H, W).

    Each is the mean of a frequency and its eight neighbours, so that chance matters less.
    """
    energy = torch.fft.fft2(images).abs().square().mean(dim=(0, 1))
    neighbours = [energy.roll((i, j), dims=(0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return torch.stack(neighbours).mean(dim=0)


def grain(generated, real):
    """Return the largest ratio of two sets' spectral energies, and its frequency (down, right)."""
    ratios = spectrum(generated) / spectrum(real)
    row, column = divmod(ratios.argmax().item(), ratios.shape[1])
    height, width = ratios.shape
    frequency = (min(row, height - row) / height, min(column, width - column) / width)
    return ratios.max().item(), frequency


def told(one, other):
    """Return how often a new classifier tells images (n, C, H, W) of two sets apart: 0.5 to 1."""
    half = len(one) // 2
    labels = torch.arange(2).repeat_interleave(half)
    classifier = train_classifier(torch.cat((one[:half], other[:half])), labels)
    _, classes = classifier.read(torch.cat((one[half : 2 * half], other[half : 2 * half])))
    return (classes == labels).double().mean().item()


def test_images(dataset, folder):
    """Return the real test images of a torchvision data set, in [0, 1], and their labels."""
    test = dataset(folder, train=False, download=True)
    images = torch.as_tensor(test.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images / 255, torch.as_tensor(test.targets)


def generate(script, generator, n):
    """Return n generated images, rounded to 256 levels, and the labels asked for, or None."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, generator.latent_dim)]
    labels = None
    if hasattr(script, "CLASSES"):
        labels = torch.arange(n) % len(script.CLASSES)
        inputs.append(labels)
    parts = zip(*(part.split(500) for part in inputs), strict=True)
    images = torch.cat([script.sample(generator, *part) for part in parts])
    return (255 * images).round() / 255, labels


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--teach", action="store_true")
    args = parser.parse_args()

    sys.path.insert(0, str(args.script.parent))
    script = importlib.import_module(args.script.stem)
    dataset = DATASETS[args.script.stem]
    classifier = load_classifier(dataset.__name__)
    images, labels = generate(script, script.load_generator(args.weights), N)
    test, test_labels = test_images(dataset, args.data_dir)
    loaded = script.load_images(args.data_dir)
    train, train_labels = loaded if labels is not None else (loaded, None)

    real, real_classes = classifier.read(test)
    best, _ = classifier.read(train[:N] / 255)
    generated, classes = classifier.read(images)
    for name, measure in (("Fréchet distance", frechet_distance), ("coverage", coverage)):
        print(f"{name:16} {measure(real, generated):.3f} ({measure(real, best):.3f})")
    ratio, (down, right) = grain(images, test)
    best_ratio, _ = grain(train[:N] / 255, test)
    print(f"grain            {ratio:.2f} ({best_ratio:.2f}), at {down:.2f} down, {right:.2f} right")
    if labels is not None:
        asked = (classes == labels).double().mean()
        real_asked = (real_classes == test_labels).double().mean()
        print(f"class            {asked:.3f} ({real_asked:.3f})", flush=True)
    if args.teach and labels is not None:
        lessons = generate(script, script.load_generator(args.weights), N_TEACH)
        real_lessons = (train[:N_TEACH] / 255, train_labels)
        for name, lesson in (("generated", lessons), ("real", real_lessons)):
            _, classes = train_classifier(*lesson).read(test)
            accuracy = (classes == test_labels).double().mean()
            print(f"teaches          {accuracy:.3f} ({name} images)", flush=True)
    if args.teach:
        generated, real = told(images, test), told(train[:N] / 255, test)
        print(f"told             {generated:.3f} ({real:.3f})")


if __name__ == "__main__":
    main()
