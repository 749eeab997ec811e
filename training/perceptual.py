"""A distance of images in the features of a frozen network, after LPIPS (Zhang et al. 2018) but
without its learned weights."""

import torch
from transformers import AutoModel

from tokcom.training.checkpoints import first_line

# of ImageNet, which backbones expect
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class FeatureLoss:
    """Squared distance of unit-length feature vectors, averaged over places and layers of a
    network.

    Args:
        name (`str`): directory or Hub id of a vision model that `AutoModel` loads and that takes
            pictures of the codec's size, such as `microsoft/resnet-18`.
        weight (`float`): of the distance in the loss.
    """

    def __init__(self, name: str, weight: float, device: torch.device | str = "cpu"):
        try:
            network = AutoModel.from_pretrained(name, trust_remote_code=False)
            # frozen, but not under no_grad: the gradient passes through it to the picture
            self.network = network.to(device).eval().requires_grad_(False)
        except (OSError, ValueError, ImportError) as error:
            reason = first_line(error)
            raise ValueError(
                f"`perceptual_model` ({name!r}) cannot be loaded ({reason}); give another one, or "
                "null for squared error and image gradients alone."
            ) from error
        self.weight = weight
        self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (MEAN, STD))

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Weighted distance of images `(B, 3, H, W)` in [-1, 1]; its gradient reaches `output`."""
        # [-1, 1] -> [0, 1]; one pass of the network for both
        both = torch.cat((output, target)) / 2 + 0.5
        total = 0.0
        layers = self.network(
            (both - self.mean) / self.std, output_hidden_states=True
        ).hidden_states
        for features in layers:
            # (2 B, places, channels)
            features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
            # of unit length, so that layers with large activations do not outweigh the others
            ours, theirs = torch.nn.functional.normalize(features.float(), dim=-1).chunk(2)
            total = total + (ours - theirs.detach()).square().sum(-1).mean() / len(layers)
        return self.weight * total
