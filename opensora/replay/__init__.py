"""Replay recorded runs of Open-Sora against this library: which agree, by how much, which cannot.

A case is one file: tensors with metadata (`.safetensors`) or a table (`.json`). What to run is read
from the file's own metadata and the names of its tensors, never from its file name.

    recording.py   open a case; its weights and inputs in a working precision
    judging.py     errors, tolerances and verdicts
    kinds.py       find what a case is and replay it
    modules.py, layers.py, transformer.py, autoencoder.py, flow.py     tensors
    tables.py, table_entries.py                                        tables
    data.py, training.py                                               both kinds, of training
    program.py     the program behind `scripts/replay_golden.py`
"""

from opensora.replay.judging import Result
from opensora.replay.kinds import replay_file

__all__ = ["Result", "replay_file"]
