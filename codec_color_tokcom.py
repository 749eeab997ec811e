"""Color codec: a token is a pixel. Exact and without parameters (PixelDLM).

Notable choices:
- The digits of a token are three of base 256 (red, green and blue of its pixel), or its bits.
- With `prediction_type="tokens"` the token head predicts digits, or the tokens that they spell
  (`config.symbols`), and Bayes' rule decodes them.
- With `prediction_type="latents"` the same codec gives the published regression of colors.
- Decoding goes to the nearest *valid* id.

Shape legend: B batch, T tokens, K tokens per patch, N patches, G digits per token,
C = K * G latent channels, V vocabulary.
"""

from functools import cached_property

import torch
import torch.nn.functional as F

from .codec_chunk_tokcom import TokComCodecOutput, TokComDecoderOutput, TokComTextCodec
from .configuration_codec_tokcom import TokComColorCodecConfig

NEAREST_ROWS = 512  # rows of distances to all ids that exist at once


DIGIT_SIGMA = 0.25  # width, in digits, of the Gaussian that turns a channel into digit logits


def spell(ids: torch.Tensor, base: int, count: int) -> torch.Tensor:
    """Ids `(...)` -> `count` digits of `base`, `(..., count)`, least significant first."""
    return ids[..., None] // base ** torch.arange(count, device=ids.device) % base


class TokComColorCodec(TokComTextCodec):
    """Patches of `patch_size` x `patch_size` pixels, one token each.

    In the `contiguous` layout a patch holds consecutive tokens. In the published `raster` layout
    tokens fill the rows of an image that is `image_size` pixels wide. A patch then holds runs of
    `patch_size` tokens that are `image_size` apart.
    """

    config: TokComColorCodecConfig
    main_input_name = "input_ids"

    def __init__(self, config: TokComColorCodecConfig):
        super().__init__(config)
        self.set_loss()
        self.post_init()

    def get_input_embeddings(self):
        return None

    # ---- ids <-> digits ----

    def digits(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(...)` -> digits `(..., G)`, the least significant first: red, green, blue."""
        return spell(ids, self.config.base, self.config.digits_per_token)

    def ids(self, digits: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """Digits `(..., G)` -> ids `(...)`.

        Digits that spell no token give the valid id with the nearest color. The distance is to the
        standardised `values (..., G)`, by default those of the digits.
        """
        # place values of the digits: 1, base, base^2, ...
        base = self.config.base ** torch.arange(self.config.digits_per_token, device=digits.device)
        ids = (digits * base).sum(-1)  # (...)
        # there are more colors than tokens
        wrong = ids >= self.config.num_valid_ids
        if bool(wrong.any()):
            wanted = self._standardize(digits[wrong]) if values is None else values[wrong]
            ids[wrong] = self._nearest(wanted)
        return ids

    @cached_property
    def _scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation `(G,)` of every digit over all valid ids, or the constants of
        the published colors."""
        count = self.config.digits_per_token
        if not self.config.standardize:
            # published: digits from 0 to base - 1 become values from -1 to 1
            middle = torch.full((count,), (self.config.base - 1) / 2, device="cpu")
            return middle, middle
        # over the vocabulary, not over a text: the codec has nothing to be trained on
        digits = self.digits(torch.arange(self.config.num_valid_ids, device="cpu")).double()
        std = digits.std(0, correction=0)
        # a digit that is the same in all ids must not be divided by 0
        return digits.mean(0).float(), torch.where(std > 0, std, 1.0).float()

    def _standardize(self, digits: torch.Tensor) -> torch.Tensor:
        mean, std = (x.to(digits.device) for x in self._scale)
        return (digits.float() - mean) / std

    def _colors(self, device: torch.device) -> torch.Tensor:
        """Standardised digits of all valid ids, `(num_valid_ids, G)`."""
        ids = torch.arange(self.config.num_valid_ids, device=device)
        return self._standardize(self.digits(ids))

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Standardised digits `(M, G)` -> the nearest valid ids `(M,)`."""
        table = self._colors(values.device)
        # in parts: all distances at once would be a row of the vocabulary for every value
        return torch.cat(
            [torch.cdist(part, table).argmin(-1) for part in values.float().split(NEAREST_ROWS)]
        )

    # ---- tokens <-> patches ----

    def to_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, T, ...)` in reading order -> `(B, N, K, ...)`.

        Raises `ValueError` if T is no multiple of `config.length_multiple`.
        """
        config = self.config
        if tokens.shape[1] % config.length_multiple:
            length = tokens.shape[1]
            multiple = config.length_multiple
            raise ValueError(
                f"the sequence length ({length}) must be a multiple of {multiple} tokens (layout "
                f"{config.layout!r}); pad to {length + -length % multiple} and mark the padding in "
                "`attention_mask` (TokComPipeline does so)."
            )
        if config.layout == "contiguous":
            return tokens.unflatten(1, (-1, config.chunk_size))
        side = config.image_size // config.patch_size
        size = config.patch_size
        # (B, patch rows, row in patch, patch columns, column in patch, ...)
        grid = tokens.unflatten(1, (-1, size, side, size))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, N, K, ...)

    def from_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """`(B, N, K, ...)` -> `(B, N * K, ...)` in reading order."""
        config = self.config
        if config.layout == "contiguous":
            return patches.flatten(1, 2)
        side = config.image_size // config.patch_size
        size = config.patch_size
        # (B, patch rows, patch columns, row in patch, column in patch, ...)
        grid = patches.unflatten(2, (size, size)).unflatten(1, (-1, side))
        return grid.transpose(2, 3).flatten(1, 4)  # (B, T, ...)

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        """Index of patches `(...)` -> row and column in the image, `(..., 2)`, or with
        `config.position_axes` of 1 the index itself, `(..., 1)`."""
        if self.config.position_axes == 1:
            return index[..., None]
        side = self.config.image_size // self.config.patch_size
        return torch.stack((index // side, index % side), dim=-1)

    def to_chunks(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, T)` -> ids `(B, N, K)`, with `pad_token_id` at padding, and a mask of real
        tokens."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        ids = torch.where(real, input_ids, self.config.pad_token_id)
        return self.to_patches(ids), self.to_patches(real)

    def from_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Ids `(B, N, K)` -> ids `(B, N * K)` in reading order."""
        return self.from_patches(chunks)

    # ---- ids <-> images ----

    def to_image(self, ids: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """Ids `(T,)` -> an image `(height, width, 3)` of uint8, row by row.

        The image does not depend on the model's digits and layout. `width` is `config.image_size`
        by default. The rest of the last row is `pad_token_id`. Raises `ValueError` if the
        vocabulary has more ids than a pixel has colors.
        """
        width = self.config.image_size if width is None else width
        if width < 1:
            raise ValueError(f"`width` ({width}) must be at least 1 pixel.")
        if self.config.vocab_size > 256**3:
            raise ValueError(
                f"`vocab_size` ({self.config.vocab_size}) is more than the {256**3} colors of a "
                "pixel; use a tokenizer with a smaller vocabulary."
            )
        # a picture is a rectangle, so the last row is filled up
        ids = F.pad(ids, (0, -len(ids) % width), value=self.config.pad_token_id).view(-1, width)
        return spell(ids, 256, 3).to(torch.uint8)  # (height, width, 3)

    def from_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """An image `(height, width, 3)` of uint8 -> ids `(T,)` without the padding at its end.

        A color that belongs to no token gives the nearest valid id.
        """
        digits = pixels.reshape(-1, 3).long()  # (T, 3)
        ids = (digits * 256 ** torch.arange(3, device=digits.device)).sum(-1)
        # an edited picture may hold colors that belong to no token
        wrong = (ids >= self.config.num_valid_ids) & (ids != self.config.pad_token_id)
        if bool(wrong.any()):
            valid = torch.arange(self.config.num_valid_ids, device=ids.device)
            colors = spell(valid, 256, 3).float()
            found = [
                torch.cdist(part, colors).argmin(-1)
                for part in digits[wrong].float().split(NEAREST_ROWS)
            ]
            ids[wrong] = torch.cat(found)
        # inside a text the pad token may stand, so only the end is cut
        real = (ids != self.config.pad_token_id).nonzero()
        length = int(real[-1]) + 1 if len(real) else 0
        return ids[:length]

    # ---- the interface of a codec ----

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> TokComCodecOutput:
        """Token ids `(B, T)` -> standardised latents; `attention_mask (B, T)` is 0 on padding."""
        chunks, real = self.to_chunks(input_ids, attention_mask)
        latents = self._standardize(self.digits(chunks)).flatten(2)  # (B, N, K * G)
        return self.known(latents, real.any(-1))

    def symbols(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(B, T)` -> symbols, and a mask of those that belong to real tokens.

        Symbols are digits `(B, N, K * G)`, or with `config.symbols="tokens"` ids `(B, N, K)`.
        """
        chunks, real = self.to_chunks(input_ids, attention_mask)
        if self.config.symbols == "tokens":
            return chunks, real
        count = self.config.digits_per_token
        return self.digits(chunks).flatten(2), real.repeat_interleave(count, dim=-1)

    def from_symbols(self, symbols: torch.Tensor) -> torch.Tensor:
        """Symbols, as `symbols` returns them -> valid ids `(B, N * K)` in reading order."""
        if self.config.symbols == "tokens":
            # through digits, so that an id without a color of its own becomes a valid one
            return self.from_patches(self.ids(self.digits(symbols)))
        return self.from_patches(self.ids(symbols.unflatten(2, (-1, self.config.digits_per_token))))

    def symbol_table(self) -> torch.Tensor:
        """The token table: standardised channels of every symbol at every place of a patch.

        `(K * G, base, 1)` for digits, `(K, V, G)` for tokens; float32 on the CPU.
        """
        if self.config.symbols == "tokens":
            tokens = torch.arange(self.config.vocab_size, device="cpu")
            return self._standardize(self.digits(tokens)).expand(self.config.chunk_size, -1, -1)
        return self._digit_table(torch.device("cpu"))[..., None]

    def _digit_table(self, device: torch.device) -> torch.Tensor:
        """The standardised value of every digit at every place: `(K * G, base)`."""
        digits = torch.arange(self.config.base, device=device)[:, None]
        table = self._standardize(digits.expand(-1, self.config.digits_per_token))  # (base, G)
        return table.T.repeat(self.config.chunk_size, 1)  # (K * G, base)

    def _digit_logits(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, N, C)` -> logits of digits `(B, N, K * G, base)`.

        They are log-likelihoods of a Gaussian that is `DIGIT_SIGMA` digits wide.
        """
        table = self._digit_table(latents.device)
        return -0.5 * ((latents.float()[..., None] - table) / self._sigma(latents.device)).square()

    def _sigma(self, device: torch.device) -> torch.Tensor:
        """`DIGIT_SIGMA` in units of each channel: `(K * G, 1)`."""
        sigma = (DIGIT_SIGMA / self._scale[1]).to(device)  # (G,)
        return sigma.repeat(self.config.chunk_size)[:, None]

    def decode(self, latents: torch.Tensor) -> TokComDecoderOutput:
        """Latents `(B, N, C)` -> logits `(B, N * K, V)`: Gaussian log-likelihoods of the ids.

        Invalid ids get -inf.
        """
        values = latents.float().unflatten(2, (-1, self.config.digits_per_token))
        values = self.from_patches(values)  # (B, T, G)
        sigma = self._sigma(latents.device)[: self.config.digits_per_token, 0]  # (G,)
        table = self._colors(latents.device) / sigma  # (num_valid_ids, G)
        logits = -0.5 * torch.cdist(values / sigma, table.expand(len(values), -1, -1)).square()
        invalid = self.config.vocab_size - self.config.num_valid_ids  # they are the last ids
        return TokComDecoderOutput(logits=F.pad(logits, (0, invalid), value=float("-inf")))

    def to_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, N, C)` -> the nearest valid ids `(B, N * K)`."""
        values = latents.float().unflatten(2, (-1, self.config.digits_per_token))  # (B, N, K, G)
        mean, std = (x.to(latents.device) for x in self._scale)
        # rounding each digit is exact unless the digits spell no token; `ids` repairs that
        digits = (values * std + mean).round().clamp(0, self.config.base - 1).long()  # (B, N, K, G)
        return self.from_patches(self.ids(digits, values))

    def training_loss(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        raise ValueError(
            "the color codec has no parameters, so there is nothing to train in stage 'codec'; use "
            "stage=flow."
        )

    def nll(self, latents: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """Nats `(B, n, K)` of the ids `chunks (B, n, K)` given their latents `(B, n, C)`."""
        digits = self.digits(chunks)  # (B, n, K, G)
        nll = F.cross_entropy(
            self._digit_logits(latents).flatten(0, 2), digits.flatten(), reduction="none"
        )
        return nll.view(digits.shape).sum(-1)  # a token is as likely as all of its digits


__all__ = ["TokComColorCodec"]
