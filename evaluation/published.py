"""The equations of TokCom v5.2 as published, written out without any optimisation.

Tests check conversion against this file, and benchmarks compare speed with it. Attention inside the
B * N chunks of K positions is plain matrix products, rotary tables are computed in float32 at every
call, all logits exist at once, and there is no cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]  # weights by their published names


@dataclass
class PublishedTokCom:
    """The published model as functions of its two state dictionaries.

    Args:
        vae, denoiser (`dict[str, torch.Tensor]`): `vae_model_state_dict` and
            `denoised_model_state_dict`.
        num_layers, num_heads, num_groups (`int`): of encoder, decoder and denoiser alike; the heads
            of a group share keys and values.
        omni_token_id (`int`): the id whose embedding the decoder reads at places 1..K-1.
        chunk_size (`int`): K.
    """

    vae: State
    denoiser: State
    num_layers: int
    num_heads: int
    num_groups: int
    omni_token_id: int
    chunk_size: int = 4
    rope_theta: float = 1e6

    @classmethod
    def random(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_groups: int,
        vocab_size: int,
    ) -> "PublishedTokCom":
        """Random weights with the published names and shapes. The last of `vocab_size` ids is the
        omni token."""
        wide = 4 * hidden_size
        embeddings = torch.randn(vocab_size, hidden_size)  # tied
        vae = {"embed_tokens.weight": embeddings}
        vae["encoder.embed_tokens.weight"] = embeddings
        vae["decoder.lm_head.weight"] = embeddings
        denoiser = {"norm.weight": 1 + 0.1 * torch.randn(hidden_size)}
        linears = {"time_mlp.0": (wide, hidden_size), "time_mlp.2": (hidden_size, wide)}
        linears["output_proj"] = (hidden_size, hidden_size)
        key_size = hidden_size // num_heads * num_groups
        for i in range(num_layers):
            sizes = hidden_size, intermediate_size, key_size
            for side in ("encoder", "decoder"):
                vae |= _block(
                    f"{side}.layers.{i}.", ("input_layernorm", "post_attention_layernorm"), *sizes
                )
            denoiser |= _block(f"layers.{i}.", ("adaln_attn.norm", "adaln_mlp.norm"), *sizes)
            for part in ("attn", "mlp"):
                name = f"layers.{i}.adaln_{part}.scale_shift_mlp.1"
                linears[name] = (2 * hidden_size, hidden_size)
        for side in ("encoder", "decoder"):
            vae[f"{side}.norm.weight"] = 1 + 0.1 * torch.randn(hidden_size)
        for name, shape in linears.items():
            # outputs of unit variance, so that no layer saturates and errors show
            denoiser[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            denoiser[f"{name}.bias"] = torch.randn(shape[0])
        return cls(vae, denoiser, num_layers, num_heads, num_groups, vocab_size - 1)

    # ---- the two networks ----

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids `(B, T)` -> latents `(B, N, D)`: the last state of a transformer in each chunk."""
        chunks = ids.view(-1, self.chunk_size)
        states = self._stack(self.vae["embed_tokens.weight"][chunks], "encoder")  # (B * N, K, D)
        return states[:, -1].view(len(ids), -1, states.shape[-1])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, N, D)` -> logits `(B, N * K, V)`."""
        embeddings = self.vae["embed_tokens.weight"]
        flat = latents.reshape(-1, 1, latents.shape[-1])
        # the latent takes the first place of the chunk, and the mask token the others
        omni = embeddings[self.omni_token_id].expand(len(flat), self.chunk_size - 1, -1)
        states = self._stack(torch.cat((flat, omni), 1), "decoder")  # (B * N, K, D)
        return (states @ embeddings.T).view(len(latents), -1, len(embeddings))

    def denoise(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noisy latents `(B, N, D)` and one t per row `(B,)` -> estimate of the clean latents."""
        state = self.denoiser
        half = x.shape[-1] // 2
        exponents = -math.log(10000) * torch.arange(half, device=x.device) / half
        # t in [0, 1], not times 1000
        angles = t[:, None] * torch.exp(exponents)
        wave = torch.cat((angles.cos(), angles.sin()), -1)  # (B, D)
        hidden = F.silu(wave @ state["time_mlp.0.weight"].T + state["time_mlp.0.bias"])
        condition = F.silu(hidden @ state["time_mlp.2.weight"].T + state["time_mlp.2.bias"])

        def modulated(x: torch.Tensor, prefix: str) -> torch.Tensor:
            weight = state[f"{prefix}scale_shift_mlp.1.weight"]
            bias = state[f"{prefix}scale_shift_mlp.1.bias"]
            scale, shift = (condition @ weight.T + bias).chunk(2, -1)
            normed = _rms_norm(x, state[f"{prefix}norm.weight"])
            return normed * (1 + scale[:, None]) + shift[:, None]

        for i in range(self.num_layers):
            inputs = modulated(x, f"layers.{i}.adaln_attn.")
            x = x + self._attention(inputs, state, f"layers.{i}.self_attn.")
            x = x + _mlp(modulated(x, f"layers.{i}.adaln_mlp."), state, f"layers.{i}.mlp.")
        x = _rms_norm(x, state["norm.weight"])
        return x @ state["output_proj.weight"].T + state["output_proj.bias"]

    def _stack(self, x: torch.Tensor, side: str) -> torch.Tensor:
        for i in range(self.num_layers):
            prefix = f"{side}.layers.{i}."
            normed = _rms_norm(x, self.vae[f"{prefix}input_layernorm.weight"])
            x = x + self._attention(normed, self.vae, f"{prefix}self_attn.")
            normed = _rms_norm(x, self.vae[f"{prefix}post_attention_layernorm.weight"])
            x = x + _mlp(normed, self.vae, f"{prefix}mlp.")
        return _rms_norm(x, self.vae[f"{side}.norm.weight"])

    def _attention(self, x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
        size = x.shape[-1] // self.num_heads
        frequencies = self.rope_theta ** (-torch.arange(0, size, 2, device=x.device) / size)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        angles = torch.cat((angles, angles), -1)  # (S, head size), float32

        def rotate(u: torch.Tensor) -> torch.Tensor:
            half = torch.cat((-u[..., size // 2 :], u[..., : size // 2]), -1)
            return u * angles.cos() + half * angles.sin()

        query, key, value = (
            (x @ state[f"{prefix}{n}_proj.weight"].T + state[f"{prefix}{n}_proj.bias"])
            .unflatten(-1, (-1, size))
            .transpose(1, 2)
            for n in "qkv"
        )
        shared = self.num_heads // self.num_groups
        # grouped queries: each key and value head serves `shared` query heads
        key, value = (u.repeat_interleave(shared, dim=1) for u in (rotate(key), value))
        # (B, H, S, S)
        weights = (rotate(query) @ key.transpose(2, 3) / math.sqrt(size)).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2) @ state[f"{prefix}o_proj.weight"].T

    # ---- training and sampling ----

    def codec_loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Stage 1: cross-entropy of the reconstruction of ids `(B, T)`."""
        return F.cross_entropy(self.decode(self.encode(ids)).flatten(0, 1), ids.flatten())

    def flow_loss(
        self, ids: torch.Tensor, noise_std: float = 0.05, t: float | None = None
    ) -> torch.Tensor:
        """Stage 2: cross-entropy of ids `(B, T)` through the frozen decoder.

        There is one t per row, drawn unless it is given.
        """
        # the codec is finished and frozen
        with torch.no_grad():
            clean = self.encode(ids)
        if t is None:
            t = torch.rand(len(ids), device=ids.device)
        else:
            t = torch.full((len(ids),), t, device=ids.device)
        signal = t[:, None, None]
        noisy = (1 - signal) * torch.randn_like(clean) * noise_std + signal * clean
        return F.cross_entropy(self.decode(self.denoise(noisy, t)).flatten(0, 1), ids.flatten())

    def euler(
        self, x: torch.Tensor, steps: int, start: float = 0.0, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Integrate `x (B, N, D)` from t = `start` to 1 in `steps (1 - start)` steps, behind the
        clean latents `keep` if given."""
        for i in range(round(steps * (1 - start))):
            t = start + i / steps
            whole = x if keep is None else torch.cat((keep, x), 1)
            clean = self.denoise(whole, torch.full((len(x),), t, device=x.device))[:, -x.shape[1] :]
            # dx/dt = (x1 - x) / (1 - t)
            x = x + (clean - x) / (1 - t) / steps
        return x


def _block(
    prefix: str, norms: tuple[str, str], hidden_size: int, intermediate_size: int, key_size: int
) -> State:
    shapes = {"self_attn.q_proj": (hidden_size, hidden_size)}
    shapes |= {f"self_attn.{n}_proj": (key_size, hidden_size) for n in "kv"}
    # only query, key and value have biases, as in Qwen2
    state = {f"{prefix}{n}.bias": torch.randn(s[0]) * 0.1 for n, s in shapes.items()}
    shapes |= {f"mlp.{n}_proj": (intermediate_size, hidden_size) for n in ("gate", "up")}
    shapes |= {
        "mlp.down_proj": (hidden_size, intermediate_size),
        "self_attn.o_proj": (hidden_size, hidden_size),
    }
    state |= {f"{prefix}{n}.weight": torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()}
    state |= {f"{prefix}{n}.weight": 1 + 0.1 * torch.randn(hidden_size) for n in norms}
    # a buffer that files hold and nobody reads: zeros would show if somebody did
    return state | {f"{prefix}self_attn.rope.inv_freq": torch.zeros(4)}


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _mlp(x: torch.Tensor, state: State, prefix: str) -> torch.Tensor:
    gate = x @ state[f"{prefix}gate_proj.weight"].T
    up = x @ state[f"{prefix}up_proj.weight"].T
    return (F.silu(gate) * up) @ state[f"{prefix}down_proj.weight"].T
