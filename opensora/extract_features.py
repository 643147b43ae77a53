"""Run the VAE and the text encoder over a table once, and keep what they make for training.

    python scripts/misc/extract_feat.py CONFIG --data-path meta.csv --outputs features

CONFIG has Open-Sora's keys: dataset, bucket_config, vae, text_encoder, save_text_features. The
training's own file will do, with --outputs. Every row is encoded at the size of its bucket. What is
stored of a latent is mean and deviation, so that training goes on drawing it. The program can be
killed at any moment and called again: rows that are stored are skipped. `--start-index` and
`--end-index` share the table among processes that write into one folder. Without latents
(`--no-save-latents`) it is a cache of texts.

    dataset = dict(type="CachedFeatures", data_path="features")      # in the training's CONFIG
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.captions import clean_prompt, plain_caption
from opensora.config import parse_command_line
from opensora.data.batch import Dataset, Entry, Sample, SampleError, Size
from opensora.data.buckets import Buckets
from opensora.data.dataset import build_dataset
from opensora.data.feature_shards import FeatureRow, FeatureWriter
from opensora.data.quarantine import Quarantine
from opensora.data.sampler import BatchSampler
from opensora.data.table import read_table
from opensora.devices import DTYPES, choose_device, choose_dtype
from opensora.errors import NonFiniteError, UsageError
from opensora.extract_config import ExtractConfig
from opensora.feature_encoders import Encoders, load_encoders
from opensora.pipeline_parts import PipelineParts
from opensora.program import run_program, stop_if_requested
from opensora.train_config import TrainConfig

NO_SIZE = Size(0, 0, 0)


@dataclass(frozen=True)
class Task:
    """Name a row to encode: its place in the table, name, caption (if known), size."""

    index: int
    name: str
    text: str | None
    size: Size


class _Captions:
    """List a table's rows for their texts alone; the files need not be there."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if not settings.get("data_path"):
            raise UsageError(
                "no table was given; set dataset.data_path or use --data-path meta.csv"
            )
        self.table = read_table(settings["data_path"], settings.get("root"), check_files=False)

    def entries(self) -> Sequence[Entry]:
        return [Entry(self.table.name(row), 0, 0, 0) for row in self.table.rows]

    def load(self, index: int, size: Size, rng: random.Random) -> Sample:
        return Sample(text=self.table.rows[index].text or "")


def plan_tasks(
    config: ExtractConfig, dataset: Dataset, writer: FeatureWriter
) -> tuple[list[list[Task]], int]:
    """Return the batches to encode, rows of one size together and stored ones left out.

    Returns:
        The batches, and how many rows fit no bucket or cannot be read.
    """
    entries = dataset.entries()
    rows = range(*slice(config.start_index, config.end_index).indices(len(entries)))
    table = getattr(dataset, "table", None)
    batches: list[list[Task]] = []
    unfit = 0
    waiting: dict[Size, list[Task]] = {}
    texts = set() if config.overwrite else {row.text for row in writer.known.values()}
    choose = _sizes(config, dataset) if config.save_latents else lambda index: (NO_SIZE, 64)
    for index in rows:
        text = None if table is None else table.rows[index].text or ""
        name = entries[index].name
        if table is not None:  # the line in the table may move, and the row is the same
            path = table.rows[index].path
            inside = path.is_relative_to(table.root)
            name = (path.relative_to(table.root) if inside else path).as_posix()
        chosen = choose(index)
        if chosen is None:
            unfit += 1
            continue
        size, batch_size = chosen
        known = writer.known.get((name, size))
        if known is not None and (text is None or known.text == text) and not config.overwrite:
            continue
        if not config.save_latents and text is not None:
            if text in texts:
                continue
            texts.add(text)
        group = waiting.setdefault(size, [])
        group.append(Task(index, name, text, size))
        if len(group) >= (config.batch_size or batch_size):
            batches.append(waiting.pop(size))
    return batches + list(waiting.values()), unfit


def _sizes(config: ExtractConfig, dataset: Dataset) -> Callable[[int], tuple[Size, int] | None]:
    """Return what tells a row's size and how many of its kind are encoded together."""
    entries = dataset.entries()
    fixed: Size | None = getattr(dataset, "size", None)
    if fixed is not None or config.bucket_config is None:
        if fixed is None:
            raise UsageError(
                "which sizes? Give bucket_config, or a VideoTextDataset with num_frames and "
                "image_size"
            )
        return lambda index: (fixed, 1) if entries[index].num_frames > 0 else None
    sampler = BatchSampler(
        entries,
        Buckets(config.bucket_config, strict=getattr(dataset, "strict_buckets", True)),
        frame_interval=getattr(dataset, "frame_interval", 1),
        seed=config.seed,
    )

    def choose(index: int) -> tuple[Size, int] | None:
        bucket = sampler.choose(index, 0)
        return None if bucket is None else (bucket.size, sampler.buckets.batch_size(bucket))

    return choose


def extract(
    config: ExtractConfig,
    dataset: Dataset,
    encoders: Encoders,
    writer: FeatureWriter,
    say: Callable[[str], None] = lambda message: None,
) -> int:
    """Encode all rows of a dataset that are not stored; returns how many were.

    Rows that cannot be read are noted in quarantine.jsonl beside the features.
    """
    quarantine = Quarantine(writer.folder)
    batches, unfit = plan_tasks(config, dataset, writer)
    total = sum(len(batch) for batch in batches)
    say(f"{total} rows to encode, {len(writer.known)} are stored")
    if unfit:
        say(
            f"{unfit} rows fit no bucket or cannot be read; `opensora data explain TABLE --config "
            "CONFIG` says why"
        )
    done = failed = 0
    begun = said = time.monotonic()
    with writer:
        for tasks, read in _read_ahead(config, dataset, batches):
            stop_if_requested()
            good: list[tuple[Task, Sample]] = []
            for task, result in zip(tasks, read, strict=True):
                if isinstance(result, Sample):
                    good.append((task, result))
                    continue
                failed += 1
                quarantine.add(task.name, result)
                say(f"left out: {task.name}: {result}")
            made = _encode(encoders, [sample for _, sample in good])
            errors = [tensors for tensors in made if isinstance(tensors, NonFiniteError)]
            if errors and len(errors) == len(made) and done == failed and not writer.known:
                raise errors[0]  # nothing ever came out well: no fault of these rows
            for (task, sample), tensors in zip(good, made, strict=True):
                if isinstance(tensors, NonFiniteError):
                    failed += 1
                    quarantine.add(task.name, SampleError(str(tensors)))
                    say(f"left out: {task.name}: {tensors}")
                    continue
                row = FeatureRow(task.name, task.size, sample.fps, sample.text or "")
                writer.add(row, tensors)
            done += len(tasks)
            now = time.monotonic()
            if now - said >= config.log_every or done == total:
                said = now
                rate = done / max(now - begun, 1e-9)
                left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
                say(f"{done}/{total} rows, {rate:.2f} rows/s, {left} left, {failed} left out")
    return done - failed


def _encode(
    encoders: Encoders, samples: Sequence[Sample]
) -> list[dict[str, Tensor] | NonFiniteError]:
    """Encode samples together; where the result is not finite, one by one to find which."""
    try:
        return [*encoders.encode(samples)] if samples else []
    except NonFiniteError as error:
        if len(samples) == 1:
            return [error]
    return [made for sample in samples for made in _encode(encoders, [sample])]


def _read_ahead(
    config: ExtractConfig, dataset: Dataset, batches: Sequence[Sequence[Task]]
) -> Iterator[tuple[Sequence[Task], list[Sample | SampleError]]]:
    """Read batches in threads, one batch ahead of the models."""

    def read(task: Task) -> Sample | SampleError:
        if not config.save_latents and task.text is not None:
            return Sample(text=task.text)
        try:
            sample = dataset.load(
                task.index, task.size, random.Random(f"{config.seed}/0/{task.index}")
            )
        except SampleError as error:
            return error
        if config.save_latents and sample.video is None:
            return SampleError("its dataset gives no pixels")
        return sample

    waiting: deque[tuple[Sequence[Task], list[Future[Sample | SampleError]]]] = deque()
    # One thread within an operation: there are as many readers as the processor has room for.
    pool = ThreadPoolExecutor(config.num_workers, "opensora-extract", torch.set_num_threads, (1,))
    try:
        for tasks in batches:
            waiting.append((tasks, [pool.submit(read, task) for task in tasks]))
            if len(waiting) > 1:
                first, rows = waiting.popleft()
                yield first, [row.result() for row in rows]
        for first, rows in waiting:
            yield first, [row.result() for row in rows]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run(config: ExtractConfig, say: Callable[[str], None] = lambda message: None) -> int:
    """Do what a configuration says; returns the number of rows that were encoded.

    Raises:
        OpenSoraError: anything the user can act on.
    """
    save_text = config.save_text_features or config.save_compressed_text_features
    if not (save_text or config.save_latents):
        raise UsageError("nothing to extract: set save_latents or save_text_features")
    given = dict(config.dataset or {})
    if config.data_path is not None:
        given["data_path"] = config.data_path
    dataset = build_dataset(given) if config.save_latents else _Captions(given)
    parts = PipelineParts.from_config(
        vae=config.vae, text_encoder=config.text_encoder, ckpt_path=config.ckpt_path
    )
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    encoders, settings = load_encoders(
        parts,
        vae=config.save_latents,
        text_encoder=save_text,
        prepare=clean_prompt if config.clean_captions else plain_caption,
        distribution=config.save_distribution,
        stored=DTYPES[config.features_dtype],
        dtype=dtype,
        device=device,
    )
    settings["clean_captions"] = config.clean_captions if save_text else None
    settings["frame_interval"] = getattr(dataset, "frame_interval", 1)
    settings["seed"] = config.seed if config.save_latents else None
    if hasattr(dataset, "table"):
        settings["root"] = str(dataset.table.root.resolve())
    writer = FeatureWriter(Path(config.outputs), settings, config.bin_size)
    return extract(config, dataset, encoders, writer, say)


def main(argv: Sequence[str] | None = None, program: str = "extract_feat.py") -> int:
    """Run the program and return its exit status; see `opensora.program`."""

    def start() -> int:
        words = sys.argv[1:] if argv is None else argv
        config, sources = parse_command_line(
            ExtractConfig,
            words,
            program,
            description=(__doc__ or "").split("\n\n")[0],
            others=TrainConfig,
        )
        for note in sources.notes:
            print(f"note: {note}", file=sys.stderr)
        count = run(config, lambda message: print(message, file=sys.stderr, flush=True))
        print(f"{config.outputs}  {count} rows encoded")
        return 0

    return run_program(start)
