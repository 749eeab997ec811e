"""What a linear map can do: pictures as principal components, and those as few bits as a codec's
codes.

Shape legend: M pictures, H x W pixels.
"""

import torch

LLOYD_STEPS = 30  # of the quantiser of each component
MOST_BITS = 8  # of one component


class PCA:
    """The best linear codec of images `(M, 3, H, W)`."""

    def __init__(self, images: torch.Tensor):
        flat = images.flatten(1).double()  # (M, 3 H W)
        self.mean = flat.mean(0)
        self.shape = images.shape[1:]
        self.components = torch.linalg.svd(
            flat - self.mean, full_matrices=False
        ).Vh.T  # largest first

    def reconstruct(self, images: torch.Tensor, count: int) -> torch.Tensor:
        basis = self.components[:, :count]
        rebuilt = (images.flatten(1).double() - self.mean) @ basis @ basis.T + self.mean
        return rebuilt.float().view(-1, *self.shape).clamp(-1, 1)

    def coefficients(self, images: torch.Tensor, count: int) -> torch.Tensor:
        """The first `count` components of `images (M, 3, H, W)`: `(M, count)`."""
        return (images.flatten(1).double() - self.mean) @ self.components[:, :count]

    def synthesise(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Images `(M, 3, H, W)` of their first components `(M, count)`."""
        basis = self.components[:, : coefficients.shape[1]]  # (3 H W, count)
        rebuilt = coefficients @ basis.T + self.mean
        return rebuilt.float().view(-1, *self.shape).clamp(-1, 1)


class QuantisedPCA:
    """Principal components of `images (M, 3, H, W)` in `bits` bits a picture.

    Each bit goes to the component whose error is largest, which is the best division for Gaussian
    components (reverse water-filling); each has the best quantiser of its bits on `images` (Lloyd).
    """

    def __init__(self, images: torch.Tensor, bits: int):
        self.bits = bits
        self.pca = PCA(images)
        # a component without a bit is not stored, so more than `bits` of them never matter
        found = self.pca.coefficients(images, min(bits, self.pca.components.shape[1]))  # (M, count)
        shares = self.divide(found.var(0), bits)
        count = int((shares > 0).sum())
        self.levels = [lloyd(found[:, i], 2 ** int(shares[i])) for i in range(count)]

    @staticmethod
    def divide(variances: torch.Tensor, bits: int) -> torch.Tensor:
        """How many of all bits each component gets; a bit quarters its error."""
        errors = variances.clone()
        shares = torch.zeros(len(variances), dtype=torch.long)
        for _ in range(bits):
            worst = int(torch.where(shares < MOST_BITS, errors, -1).argmax())
            shares[worst] += 1
            # a bit halves the steps of a quantiser and therefore quarters its squared error
            errors[worst] /= 4
        return shares

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        found = self.pca.coefficients(images, len(self.levels))  # (M, components with a bit)
        rounded = [
            levels[torch.bucketize(found[:, i].contiguous(), middles(levels))]
            for i, levels in enumerate(self.levels)
        ]
        return self.pca.synthesise(torch.stack(rounded, dim=1))


def middles(levels: torch.Tensor) -> torch.Tensor:
    """Where the nearest of sorted levels changes."""
    return (levels[1:] + levels[:-1]) / 2


def lloyd(values: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` sorted levels that serve `values (M,)` best."""
    # start from quantiles, so that every level has values of its own
    shares = (torch.arange(count, dtype=values.dtype) + 0.5) / count
    levels = values.quantile(shares)
    for _ in range(LLOYD_STEPS):
        places = torch.bucketize(values.contiguous(), middles(levels))  # (M,), the nearest level
        sums = torch.zeros_like(levels).index_add_(0, places, values)
        counts = places.bincount(minlength=count)
        # a level that nothing is nearest to stays where it is
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels).sort().values
    return levels


__all__ = ["PCA", "QuantisedPCA", "lloyd"]
