"""Quantize a model of your own: a keyword spotter with a convolution, an LSTM and an output layer, in plain torch.

    python examples/own_lstm.py

Trains on synthetic patterns, quantizes the LSTM to 2 bits and the rest to 4, and trains on. Prints error rates (float,
quantized without training, with training) and the size of every weight; writes the packed model to --output.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import gq_triton as gq

KEYWORDS, BANDS, FRAMES = 12, 20, 40


class KeywordSpotter(nn.Module):
    """Maps features (batch, frames, bands) to logits (batch, keywords)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(BANDS, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 48, num_layers=2, batch_first=True)
        self.output = nn.Linear(48, KEYWORDS)

    def forward(self, features: Tensor) -> Tensor:
        x = torch.relu(self.conv(features.mT)).mT
        return self.output(self.lstm(x)[0].mean(1))


def spoken(count: int) -> tuple[Tensor, Tensor]:
    """Features and keywords: a keyword is a band in which sound begins and one in which it ends."""
    keywords = torch.randint(KEYWORDS, (count,))
    begin, end = keywords % 4 * 5.0 + 2, keywords // 4 * 6.0 + 3
    centre = begin[:, None] + (end - begin)[:, None] * torch.linspace(0, 1, FRAMES)
    sound = torch.exp(-((torch.arange(BANDS) - centre[..., None]) ** 2) / 8)
    return sound + 0.8 * torch.randn(count, FRAMES, BANDS), keywords


def train(model: nn.Module, steps: int, annealer: gq.Annealer | None = None) -> None:
    optimizer = torch.optim.AdamW(gq.param_groups(model.train(), lr=3e-3, weight_decay=1e-2))
    for _ in range(steps):
        features, keywords = spoken(32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(features), keywords).backward()
        optimizer.step()
        if annealer is not None:
            annealer.step()


@torch.no_grad()
def error_rate(model: nn.Module) -> str:
    torch.manual_seed(1)
    features, keywords = spoken(1000)
    return f"{(model.eval()(features).argmax(1) != keywords).float().mean():.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of training, before quantization and again after")
    parser.add_argument("--output", default="keywords.safetensors")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = KeywordSpotter()
    train(model, args.steps)
    print("errors, float:", error_rate(model))
    gq.quantize_(model, {"lstm.*": gq.GQConfig(bits=2), "*": gq.GQConfig(bits=4)}, step="prepare")
    print("errors, quantized without training:", error_rate(gq.quantize_(copy.deepcopy(model), step="convert")))
    train(model, args.steps, gq.Annealer(model, total_steps=args.steps))
    gq.quantize_(model, step="convert")
    gq.save_packed(model, args.output)
    print("errors, quantized and trained:", error_rate(gq.load_packed(KeywordSpotter(), args.output)))
    print(gq.report(model))


if __name__ == "__main__":
    main()
