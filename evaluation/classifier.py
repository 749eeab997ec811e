"""A classifier of real pictures, used to score drawings and to compare reconstructions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

BATCH = 32  # pictures in a step


@torch.no_grad()
def by_parts(
    function: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    module: nn.Module,
    size: int = 256,
) -> torch.Tensor:
    """`function` of rows `(M, ...)`, `size` at a time on the device of `module`; the result is on
    the CPU, where everything is compared."""
    device = next(module.parameters()).device
    return torch.cat([function(part.to(device)).cpu() for part in rows.split(size)])


class Classifier(nn.Module):
    """A small convolutional network with a head for every column of labels."""

    def __init__(self, classes: list[int], width: int = 32):
        super().__init__()
        layers = []
        channels = 3
        for i in range(3):
            inner = width * 2**i
            layers += [
                nn.Conv2d(channels, inner, 3, padding=1),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = inner
        # 2 x 2 places keep roughly where something is
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(4 * channels, count) for count in classes)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.body(images)  # (B, 4 * channels)
        return [head(features) for head in self.heads]

    def layers(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What every convolution sees in images `(B, 3, H, W)`: `(B, channels, y, x)` each."""
        found = []
        for module in self.body:
            images = module(images)
            if isinstance(module, nn.ReLU):
                found.append(images)
        return found

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the heads read, averaged over places: `(M, channels)`."""
        return by_parts(lambda part: self.body(part).unflatten(1, (-1, 4)).mean(-1), images, self)

    def classify(self, images: torch.Tensor, column: int = 0) -> torch.Tensor:
        """The class of each image in a column of labels: `(M,)`."""
        return by_parts(lambda part: self(part)[column].argmax(-1), images, self)


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, device: str = "cpu"
) -> Classifier:
    """A classifier of images `(M, 3, H, W)` with labels `(M, columns)`, on `device`."""
    if len(images) < BATCH or epochs < 1:
        raise ValueError(
            f"{len(images)} pictures in {epochs} epochs do not train a classifier; give at least "
            f"{BATCH} pictures and an epoch."
        )
    torch.manual_seed(seed)
    model = Classifier([int(column.max()) + 1 for column in labels.T]).to(device)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="classifier", unit="step"):
        # with replacement, so an epoch is a number of steps and not a pass
        rows = torch.randint(len(images), (BATCH,))
        wanted = labels[rows].to(device)
        found = model(images[rows].to(device))
        # one body for all columns, with a head for each
        loss = sum(F.cross_entropy(logits, wanted[:, i]) for i, logits in enumerate(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def recognised(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Share of images whose label is found, for every column of `labels (M, columns)`."""
    shares = []
    for i in range(labels.shape[1]):
        shares.append((classifier.classify(images, i) == labels[:, i]).float().mean().item())
    return shares


def feature_distance(
    classifier: Classifier, images: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """Squared distance of unit-length features of `images` to those of `others`, both
    `(B, 3, H, W)`, averaged over places and layers of a classifier: `(B,)`.

    After LPIPS (Zhang et al. 2018), whose own networks would have to be downloaded. This one has
    seen only the training pictures, and nobody taught it what people find alike: distances are
    comparable within one table.
    """

    def distances(pair: torch.Tensor) -> torch.Tensor:
        layers = []
        for features in classifier.layers(pair.flatten(0, 1)):
            features = F.normalize(features, dim=1).unflatten(0, (-1, 2))  # (B, 2, channels, y, x)
            layers.append((features[:, 0] - features[:, 1]).square().sum(1).mean((1, 2)))
        return torch.stack(layers).mean(0)

    return by_parts(distances, torch.stack((images, others), dim=1), classifier)
