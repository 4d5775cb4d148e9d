# SPDX-License-Identifier: MIT
"""Measure how much faster a script trains than a plain loop: the README's ratios.

    python .github/figures/pace.py dcgan_mnist.py

trains on the first 12,800 images, in turn, by the script's GAN.step and update_bn and by the usual
loop around the same networks: fp32, a DataLoader, Adam as it comes, the losses read after each
step. What else the script does, as averaging its weights, counts against it. For each round it
prints images/s of both and their ratio, and then the ratios' median. Nothing else should run
meanwhile. The README's minutes are the images of a run divided by the script's images/s (CIFAR-10's
are an older version's, times the ratio of the seconds that a step takes in both).
"""

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch
from judge import DATASETS
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

N = 12_800


class PlainLoop:
    def __init__(self, script, dataset, batch_size):
        self.loader = DataLoader(Subset(dataset, range(N)), batch_size, shuffle=True)
        self.script = script
        self.generator = script.Generator()
        self.discriminator = script.Discriminator()
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), **adam)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), **adam)

    def judge(self, images, labels):
        logits = self.discriminator(images)
        return self.script.pick(logits, labels) if logits.dim() > 1 else logits

    def step(self, real, labels):
        noise = torch.randn(len(real), self.generator.latent_dim)
        inputs = (noise, labels) if hasattr(self.script, "CLASSES") else (noise,)
        fake = self.generator(*inputs)
        real_logits = self.judge(real, labels)
        fake_logits = self.judge(fake.detach(), labels)
        real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones(len(real)))
        fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros(len(real)))
        loss_d = real_loss + fake_loss
        self.optimizer_d.zero_grad()
        loss_d.backward()
        self.optimizer_d.step()

        fake_logits = self.judge(fake, labels)
        loss_g = F.binary_cross_entropy_with_logits(fake_logits, torch.ones(len(real)))
        self.optimizer_g.zero_grad()
        loss_g.backward()
        self.optimizer_g.step()
        return loss_d.item(), loss_g.item()

    def train_epoch(self):
        for real, labels in self.loader:
            self.step(real, labels)


def train_epoch(gan, data, batch_size):
    """Train as the script does, without its loss lines."""
    for indices in torch.randperm(N).split(batch_size)[: N // batch_size]:
        real, *labels = (part[indices] for part in data)
        gan.step(real / 127.5 - 1, *labels)
    gan.update_bn(batch_size)


def pace(train_epoch, *args):
    """Return the images/s of one epoch."""
    start = time.perf_counter()
    train_epoch(*args)
    return N / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--data-dir", default="data")
    bf16 = "compute in bf16 (default: where the script does)"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=bf16)
    args = parser.parse_args()

    sys.path.insert(0, str(args.script.parent))
    script = importlib.import_module(args.script.stem)
    loaded = script.load_images(args.data_dir)
    loaded = loaded if isinstance(loaded, tuple) else (loaded,)
    data = [part[:N] for part in loaded]
    bf16 = script.bf16_is_fast("cpu") if args.bf16 is None else args.bf16
    gan = script.GAN(script.Generator(), script.Discriminator(), bf16=bf16)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    dataset = DATASETS[args.script.stem](args.data_dir, transform=to_tensor)
    plain = PlainLoop(script, dataset, args.batch_size)
    ratios = []
    for epoch in range(args.rounds + 1):
        ours = pace(train_epoch, gan, data, args.batch_size)
        theirs = pace(plain.train_epoch)
        if epoch == 0:
            continue  # both were warming up
        ratios.append(ours / theirs)
        print(f"{ours:,.0f} {theirs:,.0f} images/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
