"""A learner that is none of ours on the simulated fleet's clock: a small vision transformer on 32 x 32 images.

``python experiments/foreign_vit.py``: counts one step of plain torch, and says how long it takes on each device.
"""

import torch
from torch import nn

import fedsim


class SmallViT(nn.Module):
    """Patches of 4 x 4 pixels, four layers of width 64, a class from their mean."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, kernel_size=4, stride=4)
        self.places = nn.Parameter(torch.zeros(64, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.layers(x).mean(dim=1))


def main(batch: int = 16) -> None:
    model, images, labels = SmallViT(), torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    clock = fedsim.Clock("fedspine-80", clients=8)
    work = clock.count(step)
    update_bytes = 4 * sum(one.numel() for one in model.parameters())
    flops, moved, launches = (float(one) for one in (work.flops, work.memory_bytes, work.launches))
    print(f"{flops / 1e9:.2f} GFLOP, {moved / 1e6:.0f} MB, {launches:.0f} launches a step")
    steps, upload = clock.step_time(work), clock.transfer_time(update_bytes, up=True)
    for client, device in enumerate(clock.devices):
        print(f"client {client} ({device}): {1e3 * steps[client]:.1f} ms a step, {upload[client]:.2f} s an upload")


if __name__ == "__main__":
    main()
