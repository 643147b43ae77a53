"""STDiT3, the diffusion transformer of Open-Sora 1.2: factorised spatial and temporal attention.

B batch, T H W latent sizes, T' H' W' in patches, S = H' * W', N = T' * S tokens, L text tokens,
C channels. Source: the published checkpoint hpcai-tech/OpenSora-STDiT-v3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from opensora.checkpoint import PretrainedMixin
from opensora.distributed.sequence import Sequence as SequenceGroup
from opensora.errors import UsageError
from opensora.models.stdit.block import Modulation, STDiT3Block
from opensora.models.stdit.config import PRESETS, STDiT3Config
from opensora.models.stdit.reuse import Anew, Reuse
from opensora.models.stdit.shards import TokenShards
from opensora.models.stdit.state_dict import infer_config
from opensora.nn import (
    CaptionEmbedder,
    PackedText,
    PatchEmbed3D,
    PositionEmbedding2D,
    RotaryEmbedding,
    SizeEmbedder,
    T2IFinalLayer,
    TimestepEmbedder,
    pack_text,
)


class STDiT3(PretrainedMixin, nn.Module):
    """Predict the velocity of a noisy latent video from its timestep, text and sizes.

    Blocks with `recompute` are computed again in the backward pass instead of keeping their
    activations. Compile block by block: `for b in model.blocks(): b.compile()`. With a `sequence`
    the model computes its part of the tokens of a batch that all its ranks are given, and returns
    the whole prediction on each of them. `parallelize` sets all this.

    Args:
        config: the architecture; see `STDiT3Config`.
    """

    family = "STDiT3"
    config_class = STDiT3Config
    infer_config = staticmethod(infer_config)

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        self.sequence: SequenceGroup | None = None
        self._reuse: Reuse | None = None
        width, heads = config.hidden_size, config.num_heads
        self.rope = RotaryEmbedding(width // heads)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, width)
        self.pos_embed = PositionEmbedding2D(width)
        self.t_embedder = TimestepEmbedder(width)
        self.fps_embedder = SizeEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(
            config.caption_channels, width, config.class_dropout_prob, config.model_max_length
        )

        def stack(temporal: bool) -> nn.ModuleList:
            rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
            return nn.ModuleList(
                STDiT3Block(
                    width,
                    heads,
                    config.mlp_ratio,
                    temporal=temporal,
                    qk_norm=config.qk_norm,
                    drop_path=rate,
                )
                for rate in rates
            )

        self.spatial_blocks = stack(temporal=False)
        self.temporal_blocks = stack(temporal=True)
        pt, ph, pw = config.patch_size
        self.final_layer = T2IFinalLayer(width, pt * ph * pw, config.out_channels)
        self.initialize_weights()

    def blocks(self) -> list[STDiT3Block]:
        """Return the blocks in running order: spatial 0, temporal 0, spatial 1, ..."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [cast(STDiT3Block, block) for pair in pairs for block in pair]

    def initialize_weights(self) -> None:
        """Set the published start: temporal blocks and the frame rate begin without effect.

        Linears are Xavier-uniform without bias; zero are the last weights of `fps_embedder` and
        of every branch of the temporal blocks, so that a video starts as independent images.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last = [self.fps_embedder.get_parameter("mlp.2.weight")]
        for block in self.temporal_blocks:
            names = ("attn.proj", "cross_attn.proj", "mlp.fc2")
            last += [block.get_parameter(f"{name}.weight") for name in names]
        for weight in last:
            nn.init.zeros_(weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        *,
        force_drop_ids: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Return the prediction, float32 [B, out_channels, T, H, W].

        x, timestep and y are cast to the weights' dtype; that rounds timesteps in bfloat16, as
        published.

        Args:
            x: noisy latent [B, in_channels, T, H, W]; sizes that are no multiple of the patch are
                padded and the result is cropped.
            timestep: [B], 0 to 1000 (noise).
            y: text [B, 1, L, caption_channels]. With `skip_y_embedder`: projected and packed,
                [1, sum of lengths, C].
            mask: [B, L], nonzero where a token of `y` counts; fewer rows (classifier-free
                guidance) are tiled over the batch. None: every token. With `skip_y_embedder`:
                the B lengths.
            x_mask: bool [B, T]; False marks a given, noise-free frame, treated as timestep 0.
            fps: [B] or [1], frames per second (120 for images).
            height: [B] or [1], pixels; with `width` it scales the position codes. Only sample 0
                is read, as published.
            width: like `height`.
            force_drop_ids: [B]; 1 replaces the caption by the null embedding.
            **unused: conditions of other models.

        Raises:
            UsageError: a shape or dtype that does not fit, named with the expected one; fps,
                height or width is missing.
        """
        if fps is None or height is None or width is None:
            given = {"fps": fps, "height": height, "width": width}
            missing = [name for name, value in given.items() if value is None]
            raise UsageError(f"STDiT3: missing {', '.join(missing)}; pass tensors [B] or [1]")
        self._check(x, timestep, y, x_mask)
        batch, _, *size = x.shape
        dtype = self.x_embedder.proj.weight.dtype
        patches = [-(-n // p) for n, p in zip(size, self.config.patch_size, strict=True)]
        frames, rows, columns = patches
        # What is computed for a gradient or in a traced graph belongs there and is not kept.
        keep: Anew = Anew()
        if self._reuse and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            keep = self._reuse

        step, times = keep.locate(timestep)
        t, modulations = keep(
            "modulations",
            (times, fps, batch, dtype),
            lambda: self._modulations(times.to(dtype), fps, batch),
        )
        t0 = rows0 = None
        if x_mask is not None:
            t0, rows0 = keep(
                "modulations at zero",
                (fps, batch, dtype),
                lambda: self._modulations(timestep.new_zeros(1, batch, dtype=dtype), fps, batch),
            )
            t0, rows0 = t0[0], rows0[0]
        text = keep(
            "text",
            (y, mask, batch, dtype, force_drop_ids),
            lambda: self._text(y.to(dtype), mask, batch, force_drop_ids),
        )
        positions = keep(
            "positions",
            (rows, columns, height, width, dtype),
            lambda: self._positions(rows, columns, height, width),
        )
        rotary = keep("rotary", (frames,), lambda: self.rope.table(frames))
        blocks = self.blocks()
        texts = [text] * len(blocks)
        if keep is self._reuse and not blocks[0].adds_table:  # else weights may be elsewhere
            texts = keep("keys", (text.states,), lambda: self._with_keys(text))

        x = x.to(dtype)
        shards = None
        if self.sequence is not None:
            dropped = self.training and self.config.drop_path > 0
            shards = TokenShards(self.sequence, (batch, frames, rows * columns), dropped)
            x = shards.latent(x, self.config.patch_size[0])
        conditions = [
            Modulation(row, x_mask, None if rows0 is None else rows0[i])
            for i, row in enumerate(modulations[step])
        ]
        # A block may compute the norm that the next one begins with, unless that costs memory, an
        # exchange or a table that only the next one has.
        always = shards is not None or blocks[0].adds_table
        recorded = torch.is_grad_enabled()
        apart = [always or (block.recompute and recorded) for block in blocks] + [True]
        tokens, normed = self.x_embedder(x, positions), None
        for i, block in enumerate(blocks):
            modulation, own_text, own_frames = conditions[i], texts[i], frames
            if shards is not None:
                tokens = shards.arrange(tokens, block.temporal)
                modulation, own_text = shards.conditions(modulation, own_text)
                own_frames = shards.frames()
            tokens, normed = block(
                tokens,
                own_text,
                modulation,
                own_frames,
                rotary=rotary if block.temporal else None,
                normed=normed,
                following=None if any(apart[i : i + 2]) else conditions[i + 1],
            )
        values = self.final_layer(tokens, t[step], x_mask, t0)
        values = values if shards is None else shards.gather(values)
        # FSDP2 hooks the backward pass to the result: a view of something else may lose that.
        copied = blocks[0].adds_table
        return self._unpatchify(values, patches, size).to(torch.float32, copy=copied)

    @contextmanager
    def reusing(self, schedule: Tensor | None = None) -> Iterator[None]:
        """Compute what the steps of a sample share once, while open, instead of at every call.

        That is the projected text with its keys and values in every block, position codes, rotary
        tables, and with a schedule the modulation of all blocks at all steps. Calls that need
        gradients, and calls with other tensors as conditions, compute everything as always. Do
        not change weights while open. `RFlow.sample` opens it.

        Args:
            schedule: timesteps [steps, B]; a call's `timestep` is found in it if it is
                `schedule[i]`.
        """
        before, self._reuse = self._reuse, Reuse(schedule)
        try:
            yield
        finally:
            self._reuse = before

    def _modulations(self, times: Tensor, fps: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return t [steps, B, C] and the rows of all blocks [steps, blocks, B, 6, C].

        They come without the tables of blocks that add theirs.

        Args:
            times: [steps, B].
            fps: as in `forward`.
            batch: B.
        """
        fps_embedding = self.fps_embedder(fps, batch)
        t = self.t_embedder(times.flatten()).unflatten(0, times.shape) + fps_embedding
        t_block = self.t_block(t.flatten(0, 1)).unflatten(0, times.shape).unflatten(-1, (6, -1))
        blocks = self.blocks()
        if blocks[0].adds_table:
            return t, t_block[:, None].expand(-1, len(blocks), -1, -1, -1)
        tables = torch.stack([block.scale_shift_table for block in blocks])
        return t, tables[:, None] + t_block[:, None]

    def _positions(self, rows: int, columns: int, height: Tensor, width: Tensor) -> Tensor:
        """Return the position codes [1, S, C] of a frame's patches."""
        # In float64 on the device: exact, and without waiting for it.
        area = height.reshape(-1)[0].double() * width.reshape(-1)[0].double()
        result: Tensor = self.pos_embed(
            self.x_embedder.proj.weight,
            rows,
            columns,
            area.sqrt() / self.config.input_sq_size,
            round((rows * columns) ** 0.5),
        )
        return result

    def _with_keys(self, text: PackedText) -> list[PackedText]:
        """Return the text with the keys and values of every block."""
        return [text._replace(keys=block.cross_attn.keys(text)) for block in self.blocks()]

    def _text(
        self,
        y: Tensor,
        mask: Tensor | Sequence[int] | None,
        batch: int,
        force_drop_ids: Tensor | None,
    ) -> PackedText:
        """Return the projected text of all samples."""
        if self.config.skip_y_embedder:
            if mask is None:
                raise UsageError(
                    "STDiT3: skip_y_embedder needs mask, the number of text tokens of each sample"
                )
            lengths = mask.tolist() if isinstance(mask, Tensor) else list(mask)
            if len(lengths) != batch:
                raise UsageError(f"STDiT3: expected {batch} text lengths, got {len(lengths)}")
            return pack_text(y, [int(n) for n in lengths])
        y = self.y_embedder(y, train=self.training, force_drop_ids=force_drop_ids).squeeze(1)
        if mask is None:
            return pack_text(y)
        visible = torch.as_tensor(mask, device=y.device) != 0
        rows = visible.shape[0] if visible.ndim == 2 else 0
        if rows == 0 or visible.shape[1] != y.shape[1] or batch % rows:
            raise UsageError(
                f"STDiT3: expected a text mask [{batch}, {y.shape[1]}] (or fewer rows, to be "
                f"tiled), got {list(visible.shape)}"
            )
        if rows != batch:
            visible = visible.repeat(batch // rows, 1)
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            # Prompts are short, captions padded; on a GPU finding the longest would stall it.
            # Whole blocks of 16: the products of odd widths are slower.
            longest = int(visible.any(0).nonzero().max()) + 1 if bool(visible.any()) else 1
            longest = -(-longest // 16) * 16
            y, visible = y[:, :longest], visible[:, :longest]
        return pack_text(y, visible)

    def _unpatchify(self, tokens: Tensor, patches: list[int], size: list[int]) -> Tensor:
        """Return [B, out, T, H, W] of values [B, N, pt * ph * pw * out], out fastest; crop."""
        voxels = tokens.view(tokens.shape[0], *patches, *self.config.patch_size, -1)
        video = voxels.permute(0, 7, 1, 4, 2, 5, 3, 6)
        video = video.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return video[:, :, : size[0], : size[1], : size[2]]

    def _check(self, x: Tensor, timestep: Tensor, y: Tensor, x_mask: Tensor | None) -> None:
        """Raise UsageError, naming the shape expected and the one given."""
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels or 0 in x.shape:
            raise UsageError(
                f"STDiT3: expected a latent [B, {config.in_channels}, T, H, W], got {list(x.shape)}"
            )
        batch, _, frames = x.shape[:3]
        if timestep.shape != (batch,):
            raise UsageError(f"STDiT3: expected timesteps [{batch}], got {list(timestep.shape)}")
        if config.skip_y_embedder:
            if y.ndim != 3 or y.shape[0] != 1 or y.shape[2] != config.hidden_size:
                raise UsageError(
                    f"STDiT3: expected projected, packed text [1, tokens, {config.hidden_size}], "
                    f"got {list(y.shape)}"
                )
        elif y.ndim != 4 or y.shape[:2] != (batch, 1) or y.shape[3] != config.caption_channels:
            raise UsageError(
                f"STDiT3: expected text [{batch}, 1, L, {config.caption_channels}], "
                f"got {list(y.shape)}"
            )
        if x_mask is None:
            return
        if config.patch_size[0] != 1:
            raise UsageError(
                f"STDiT3: x_mask marks single frames, but a patch spans {config.patch_size[0]}; "
                "frame masks need a model with patch_size (1, ., .)"
            )
        if x_mask.dtype != torch.bool or x_mask.shape != (batch, frames):
            raise UsageError(
                f"STDiT3: expected x_mask bool [{batch}, {frames}], got {x_mask.dtype} "
                f"{list(x_mask.shape)}"
            )


def build_stdit(name_or_config: str | STDiT3Config | Mapping[str, Any]) -> STDiT3:
    """Return a freshly initialised STDiT3.

    Args:
        name_or_config: a preset's name (`PRESETS`); a config; or its dictionary, where `type`
            may name the preset that the other keys change.

    Raises:
        UsageError: an unknown name or key.
    """
    if isinstance(name_or_config, STDiT3Config):
        return STDiT3(name_or_config)
    fields = (
        dict(name_or_config) if isinstance(name_or_config, Mapping) else {"type": name_or_config}
    )
    name = fields.pop("type", "STDiT3")
    if name == "STDiT3":
        return STDiT3(STDiT3Config.from_dict(fields))
    if name not in PRESETS:
        raise UsageError(f"unknown model {name!r}; known: STDiT3, {', '.join(PRESETS)}")
    return STDiT3(STDiT3Config.from_dict({**PRESETS[name].to_dict(), **fields}))
