"""Encode prompts with the encoder half of T5, T5 v1.1 or ByT5.

transformers supplies model and tokenizer and is imported on first use. Padding is always to the
full length and the attention mask is passed, as in Open-Sora: STDiT drops the padded tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora.errors import UsageError, WeightsError
from opensora.models.text_encoder.lazy_transformers import load_transformers, quiet
from opensora.models.text_encoder.locate import locate, weights_in

#: Text tokens of Open-Sora 1.2.
MAX_LENGTH = 300
#: Key added to the model's config.json, so that a saved pipeline keeps its length.
LENGTH_KEY = "opensora_max_length"


class T5TextEncoder(nn.Module):
    """Encode prompts.

    Args:
        model: transformers.T5EncoderModel (or a module with its call and config).
        tokenizer: its tokenizer, e.g. T5Tokenizer or ByT5Tokenizer.
        max_length: tokens per prompt, end token included, >= 1.

    Raises:
        UsageError: max_length is not a positive whole number.
        WeightsError: the tokenizer has ids that the model has no embedding for.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int = MAX_LENGTH) -> None:
        super().__init__()
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise UsageError(
                f"text encoder: max_length must be a whole number >= 1, got {max_length!r}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        config: Any = model.config
        self.hidden_size: int = config.d_model
        if len(tokenizer) > config.vocab_size:
            raise WeightsError(
                f"text encoder: the tokenizer has {len(tokenizer)} entries but the model embeds "
                f"{config.vocab_size}; use the tokenizer that belongs to the model"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    @classmethod
    def like(cls, encoder: T5TextEncoder) -> T5TextEncoder:
        """Return an encoder of the same shape and tokenizer, with weights of its own."""
        import transformers

        config: Any = encoder.model.config
        return cls(transformers.T5EncoderModel(config), encoder.tokenizer, encoder.max_length)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the encoded states."""
        return next(self.model.parameters()).dtype

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into ids and mask, both int64 [B, L] on the model's device, L = max_length.

        A longer text is cut (its end token stays) with a UserWarning that counts the lost tokens.
        """
        batch = self.tokenizer(
            list(texts),
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for index in mask.all(dim=1).nonzero().flatten().tolist():
            total = len(self.tokenizer(texts[index], verbose=False)["input_ids"])
            if total > self.max_length:
                warnings.warn(
                    f"prompt {index} is {total} tokens long; the last {total - self.max_length} "
                    f"were cut, the text encoder takes {self.max_length}",
                    stacklevel=3,
                )
        return ids.to(self.device), mask.to(self.device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run the encoder, with gradients where they are enabled.

        Args:
            ids: int64 [B, L] token ids.
            mask: int64 [B, L], 1 for tokens and 0 for padding.

        Returns:
            Last hidden states [B, 1, L, C] in the model's dtype.
        """
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[:, None]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode prompts.

        Args:
            texts: B prompts, already cleaned.

        Returns:
            Text states [B, 1, L, C] in the model's dtype, and the mask int64 [B, L].
        """
        if isinstance(texts, str):
            raise UsageError("encode takes a list of prompts; write [prompt]")
        ids, mask = self.tokenize(texts)
        return self(ids, mask), mask

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `<folder>/text_encoder` (safetensors) and `<folder>/tokenizer`."""
        model: Any = self.model
        setattr(model.config, LENGTH_KEY, self.max_length)
        with quiet():
            model.save_pretrained(Path(folder) / "text_encoder")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @classmethod
    def byt5(
        cls,
        *,
        max_length: int,
        d_model: int,
        d_ff: int,
        num_layers: int,
        num_heads: int,
        d_kv: int | None = None,
        dropout_rate: float = 0.0,
        extra_ids: int = 0,
    ) -> T5TextEncoder:
        """Build a small byte-level encoder with random weights, to be trained with its model.

        Its tokenizer reads UTF-8 bytes and needs no vocabulary file.

        Args:
            max_length: bytes per prompt, end token included.
            d_model: width of the states.
            d_ff: width of the gated-GELU feed-forward layers.
            num_layers: transformer layers.
            num_heads: attention heads.
            d_kv: width of a head; None is d_model // num_heads.
            dropout_rate: in training mode.
            extra_ids: sentinel tokens of the tokenizer.

        Returns:
            An encoder in training mode, float32, on the CPU.
        """
        transformers = load_transformers()
        tokenizer = transformers.ByT5Tokenizer(extra_ids=extra_ids)
        config = transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=d_model,
            d_kv=d_model // num_heads if d_kv is None else d_kv,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            dropout_rate=dropout_rate,
            feed_forward_proj="gated-gelu",
        )
        model = transformers.T5EncoderModel(config).train()
        _look_at_neighbours(model)
        return cls(model, tokenizer, max_length)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> T5TextEncoder:
        """Load model and tokenizer.

        Safetensors are preferred; .bin files are read by torch's weights-only reader, never
        unpickled. A full T5 (with decoder) is accepted, its decoder is not read.

        Args:
            source: folder written by `save_pretrained`, folder of a T5 model, or Hugging Face id
                ("DeepFloyd/t5-v1_1-xxl"). A cached id loads without network access.
            subfolder: model folder inside the source; None finds it.
            tokenizer_subfolder: tokenizer folder inside the source; None takes `tokenizer` if the
                source has one, else the model folder.
            max_length: tokens per prompt; None takes the saved length, else 300.
            dtype: of the weights; None is float32, what Open-Sora uses for inference.
            device: where the weights go.

        Raises:
            WeightsError: missing, incomplete, unreadable or not a T5 encoder.
        """
        folder = locate(source, subfolder)
        root = folder.parent if folder.name == (subfolder or "text_encoder") else folder
        tokenizer_folder = folder
        if tokenizer_subfolder is not None:
            tokenizer_folder = root / tokenizer_subfolder
        elif (root / "tokenizer").is_dir():
            tokenizer_folder = root / "tokenizer"
        model = _load_model(folder, dtype or torch.float32)
        tokenizer = _load_tokenizer(tokenizer_folder)
        if max_length is None:
            max_length = getattr(model.config, LENGTH_KEY, MAX_LENGTH)
        return cls(model.to(device), tokenizer, max_length).eval().requires_grad_(False)


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load T5EncoderModel from a complete local folder; every tensor must come from the files."""
    transformers = load_transformers()
    safe = (weights_in(folder) or "").startswith("model.safetensors")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "t5":
            raise WeightsError(
                f"text encoder: {folder} holds a {config.model_type!r} model; a T5 or ByT5 encoder "
                "is needed"
            )
        with quiet():
            model, info = transformers.T5EncoderModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=safe,
                weights_only=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except WeightsError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, RuntimeError, safetensors and pickle errors.
        raise WeightsError(f"text encoder: cannot load {folder}: {_first_line(error)}") from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise WeightsError(
            f"text encoder: {folder} lacks {len(lost)} tensors that config.json asks for, "
            f"such as {lost[0]}"
        )
    return model


def _load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local folder."""
    transformers = load_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Missing vocabulary or missing sentencepiece surface as OSError, ValueError, ImportError...
        raise WeightsError(
            f"text encoder: cannot load the tokenizer in {folder}: {_first_line(error)} (needs "
            "tokenizer_config.json and, for T5, spiece.model with sentencepiece and protobuf)"
        ) from error


def _first_line(error: Exception) -> str:
    """Shorten an error of another library to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@torch.no_grad()
def _look_at_neighbours(model: nn.Module, bias: float = 4.0) -> None:
    """Let the heads start by attending to the previous, next, second previous, ... token.

    Bytes mean nothing without their order, and T5 knows order by this bias alone. From its usual
    start, below 0.3, it takes thousands of steps to grow to where words can be told apart.
    """
    table = model.get_parameter(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    )  # [buckets, heads]; the upper half of the buckets holds the tokens to the right
    right = table.shape[0] // 2
    offsets = [bucket for distance in (1, 2, 3, 4) for bucket in (distance, right + distance)]
    for head in range(table.shape[1]):
        table[offsets[head % len(offsets)], head] = bias
