"""Read tables of clips: csv with Open-Sora's columns, or parquet.

    path,text,num_frames,height,width,fps
    clips/a.mp4,"a red circle, moving right",120,240,426,24

`path` is required; num_frames, height, width and fps are read from the files where they are
missing; further columns (aes, flow, match, cmotion, ...) are kept. Also taken: files of
`path,text` rows without a header (Open-Sora 1.0), `video,caption` (MindONE), tabs or semicolons
instead of commas, blanks around names and cells, and a byte order mark.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.config_file import suggest
from opensora.errors import UsageError

#: Whole numbers; 0, as Open-Sora's tools write for files they cannot read, counts as missing.
WHOLE = ("num_frames", "height", "width")
NUMBERS = ("fps", "aspect_ratio", "resolution", "text_len", "aes", "flow", "match")
_ALIASES = {"video": "path", "caption": "text"}
#: What people call the column of files, with a column's own name not near enough to `path`.
_FILES = ("file", "filename", "file_name", "video_path", "filepath", "image", "url", "name", "clip")
_MISSING = ("", "nan", "none", "null", "n/a", "na")
MEDIA = ".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .ts .gif .jpg .jpeg .png .bmp .webp .tif .tiff"


@dataclass(slots=True)
class Row:
    """Hold one row of a table; None where a cell is empty.

    Attributes:
        line: of the file, from 1 on; of parquet the row.
        path: of the media file.
        extra: other columns.
    """

    line: int
    path: Path
    text: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """Hold a table.

    Attributes:
        path: of the table.
        root: folder that relative paths begin at.
        columns: names, as they are used here.
        rows: in the file's order.
    """

    path: Path
    root: Path
    columns: list[str]
    rows: list[Row]

    def name(self, row: Row) -> str:
        """Say which row this is: "meta.csv:12 clips/a.mp4"."""
        try:
            shown = row.path.relative_to(self.root)
        except ValueError:
            shown = row.path
        return f"{self.path.name}:{row.line} {shown}"


def read_table(
    path: str | Path, root: str | Path | None = None, *, check_files: bool = True
) -> Table:
    """Read a table of clips.

    Args:
        path: .csv, .tsv, .txt or .parquet.
        root: folder that relative paths begin at; the table's own if None.
        check_files: refuse a table none of whose files is there. Caches do without the files.

    Raises:
        UsageError: the table is missing, empty, not a table, lacks `path`, names a column twice, or
            has a cell that cannot be; the line is named.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"table {path} is a folder; name a .csv or .parquet file in it")
    if not path.exists():
        near = [p.name for p in path.parent.glob("*") if p.suffix in (".csv", ".parquet", ".tsv")]
        raise UsageError(f"table {path} does not exist{suggest(path.name, near)}")
    if root is not None and not Path(root).is_dir():
        raise UsageError(f"the folder of clips, {root}, does not exist")
    folder = path.parent if root is None else Path(root)
    names, cells = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    columns = _columns(path, names)
    rows = [_row(path, folder, columns, line, values) for line, values in cells]
    if not rows:
        raise UsageError(f"table {path} has a header and no rows")
    table = Table(path, folder, columns, rows)
    if check_files:
        _check_files(table, root)
    return table


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]:
    """Return the column names and the cells of every line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the table {path}: {error.strerror or error}") from error
    if data[:4] == b"PAR1":
        raise UsageError(f"{path} is a parquet file; name it {path.with_suffix('.parquet').name}")
    if data[:2] == b"PK":
        raise UsageError(f"{path} is a workbook or an archive; save the sheet as csv")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UsageError(
                f"{path}:{line}: not UTF-8; save the table as UTF-8, or convert it: iconv -f "
                f"latin1 -t utf-8 {path.name} > utf8.csv"
            ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"{path}:{line}: holds a null byte; this is no text table")
    head = next((line for line in text.splitlines() if line.strip()), "")
    if not head:
        raise UsageError(f"table {path} is empty")
    lines = _lines(path, text, _delimiter(head))
    first, names = next(lines)
    headless = _headless(names)
    if headless:
        names, rest = list(headless), [(first, names), *lines]
        return names, _same_length(path, names, rest)
    return names, _same_length(path, names, lines)


def _delimiter(head: str) -> str:
    """Return what parts the cells of the first line: a comma, unless there is none."""
    if "," in head:
        return ","
    return "\t" if "\t" in head else ";" if ";" in head else ","


def _lines(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells, without blank lines; a quoted cell may span lines."""
    csv.field_size_limit(1 << 24)  # captions longer than 128 KB
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UsageError(
                f"{path}:{line}: not csv: {error}; double quotes inside a quoted cell are doubled"
            ) from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, [cell.strip() for cell in cells]
        line = reader.line_num + 1


def _headless(cells: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file that begins with a row, () if it begins with names."""
    if "path" in cells or "video" in cells:
        return ()
    if cells and Path(cells[0]).suffix.lower() in MEDIA.split() and len(cells) <= 2:
        return ("path", "text")[: len(cells)]
    return ()


def _same_length(
    path: Path, names: Sequence[str], lines: Iterable[tuple[int, Sequence[str]]]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Check that no line has more cells than the header; missing ones at its end are empty."""
    for line, cells in lines:
        extra = [cell for cell in cells[len(names) :] if cell]
        if extra:
            raise UsageError(
                f"{path}:{line}: {len(cells)} cells, but {len(names)} columns "
                f"({', '.join(names)}); a text with commas must stand in double quotes"
            )
        yield line, [*cells[: len(names)], *[""] * (len(names) - len(cells))]


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(
            f"reading {path.name} needs pyarrow: pip install pyarrow, or save the table as csv"
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UsageError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    lists = [column.to_pylist() for column in table.columns]
    return list(table.column_names), enumerate(zip(*lists, strict=True), start=1)


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    """Return the names as they are used here; check that each is there once, `path` among them."""
    stripped = [name.strip() for name in names]
    columns = [
        _ALIASES[name] if name in _ALIASES and _ALIASES[name] not in stripped else name
        for name in stripped
    ]
    double = next((name for name in columns if name and columns.count(name) > 1), None)
    if double is not None:
        raise UsageError(f"{path}: the column {double!r} is there twice; rename or remove one")
    if "path" not in columns:
        found = [name for name in columns if name]
        lowered = {name.lower().replace(" ", "_"): name for name in reversed(found)}
        likely = [lowered[name] for name in ("path", *_FILES) if name in lowered]
        hint = f"; rename {likely[0]!r} to 'path'" if likely else suggest("path", found)
        raise UsageError(
            f"{path}: no column 'path' (columns: {', '.join(found)}){hint or ''}; the first line "
            "names the columns, as in: path,text,num_frames,height,width"
        )
    return columns


def _row(path: Path, root: Path, columns: Sequence[str], line: int, cells: Sequence[Any]) -> Row:
    """Convert the cells of a line."""
    values = dict(zip(columns, cells, strict=True))
    where = f"{path}:{line}"
    name = _text(values.pop("path"))
    if name is None:
        raise UsageError(f"{where}: the cell of 'path' is empty")
    numbers = {key: _whole(where, key, values.pop(key, None)) for key in WHOLE}
    fps = _number(where, "fps", values.pop("fps", None))
    if fps is not None and fps < 0:
        raise UsageError(f"{where}: fps must not be negative, got {fps:g}")
    text = _text(values.pop("text", None))
    extra = {
        key: _number(where, key, value) if key in NUMBERS else value
        for key, value in values.items()
        if key
    }
    return Row(line, root / name, text, **numbers, fps=fps or None, extra=extra)


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
    return text or None


def _number(where: str, key: str, value: Any) -> float | None:
    """Return a number; None for an empty cell, as pandas and people write it."""
    text = _text(value)
    if text is None or text.lower() in _MISSING:
        return None
    try:
        number = float(text)
    except ValueError:
        raise UsageError(f"{where}: {key} must be a number, got {text!r}") from None
    if not math.isfinite(number):
        raise UsageError(f"{where}: {key} must be finite, got {text!r}")
    return number


def _whole(where: str, key: str, value: Any) -> int | None:
    """Return a whole number of at least 1; None for an empty cell or 0."""
    number = _number(where, key, value)
    if number is None or number == 0:
        return None
    if number < 0 or number != int(number):
        raise UsageError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")
    return int(number)


def _check_files(table: Table, root: str | Path | None) -> None:
    """Refuse a table none of whose files is there: the folder is wrong then, not the files."""
    step = max(1, len(table.rows) // 32)
    looked = table.rows[::step]
    if any(row.path.exists() for row in looked):
        return
    told = "dataset.root" if root is None else f"dataset.root={str(root)!r}"
    raise UsageError(
        f"{table.path}: none of the files is there that were looked for ({len(looked)}), such as "
        f"{looked[0].path}; paths are relative to the table's folder, or to {told}"
    )


def summary(values: Mapping[str, int]) -> str:
    """Return "3 a, 1 b" of counts."""
    return ", ".join(f"{count} {name}" for name, count in values.items() if count)
