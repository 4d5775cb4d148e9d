# SPDX-License-Identifier: MIT
"""Measure how much faster a script trains than a plain loop: the README's ratios.

    python .github/figures/pace.py dcgan_mnist.py

trains on the first 12,800 images, in turn, by the script's own train_epoch and by the usual loop
around the same networks: fp32, a DataLoader, Adam as it comes, the losses read after each step.
What else the script does, as averaging its weights, counts against it. For each round it prints
images/s of both and their ratio, and then the ratios' median. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import importlib
import io
import os
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
    def __init__(self, script, args):
        to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
        dataset = DATASETS[script.SCRIPT](args.data_dir, transform=to_tensor)
        self.loader = DataLoader(Subset(dataset, range(N)), args.batch_size, shuffle=True)
        self.script = script
        self.generator = script.Generator(args.latent_dim, args.width)
        self.discriminator = script.Discriminator(args.width)
        adam = {"lr": args.lr, "betas": (args.beta1, 0.999)}
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


def pace(train_epoch, *args):
    """Return the images/s of one epoch."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # no loss lines
        train_epoch(*args)
    return N / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options, flags = parser.parse_known_args()  # other flags, as --batch-size, are the script's

    sys.path.insert(0, str(options.script.parent))
    script = importlib.import_module(options.script.stem)
    args = script.parse_args([*flags, "--device", "cpu", "--output-dir", os.devnull])
    loaded = script.load_images(args.data_dir)
    loaded = loaded if isinstance(loaded, tuple) else (loaded,)
    data = [part[:N] for part in loaded]
    networks = [script.Generator(args.latent_dim, args.width), script.Discriminator(args.width)]
    gan = script.GAN(*networks, args.lr, args.beta1, args.bf16)
    plain = PlainLoop(script, args)
    ratios = []
    for epoch in range(options.rounds + 1):
        ours = pace(script.train_epoch, gan, *data, epoch + 1, args)
        theirs = pace(plain.train_epoch)
        if epoch == 0:
            continue  # both were warming up
        ratios.append(ours / theirs)
        print(f"{ours:,.0f} {theirs:,.0f} images/s, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
