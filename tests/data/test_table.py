"""Test tables as people write them, and the line that an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora.data.table import Table, read_table
from opensora.errors import UsageError


def table(folder: Path, text: str | bytes, name: str = "meta.csv", **settings: object) -> Table:
    for clip in ("a.mp4", "b.mp4", "c.jpg"):
        (folder / clip).touch()
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, **settings)  # type: ignore[arg-type]


def test_reads_upstreams_columns_and_keeps_others(tmp_path: Path) -> None:
    read = table(
        tmp_path,
        "path,text,num_frames,height,width,aspect_ratio,fps,aes,flow,match,cmotion,note\n"
        'a.mp4,"red, then blue",120,240,426,0.56,23.976,5.1,2.5,20.0,pan left,x y\n'
        "c.jpg,a picture,1,480,854,,,,,,,\n",
    )
    first, second = read.rows
    assert (first.path, first.text) == (tmp_path / "a.mp4", "red, then blue")
    assert (first.num_frames, first.height, first.width, first.fps) == (120, 240, 426, 23.976)
    assert first.extra["aes"] == 5.1
    assert first.extra["cmotion"] == "pan left"
    assert first.extra["note"] == "x y"
    assert (second.fps, second.extra["aes"]) == (None, None)
    assert read.name(first) == "meta.csv:2 a.mp4"


@pytest.mark.parametrize(
    "text",
    [
        "path, text, num_frames\na.mp4, a cat, 12\n\n b.mp4 , a dog, 14\n",  # blanks after commas
        "\ufeffpath,text,num_frames\r\na.mp4,a cat,12\r\nb.mp4,a dog,14.0\r\n",  # Excel
        "path;text;num_frames\na.mp4;a cat;12\nb.mp4;a dog;14\n",
        "path\ttext\tnum_frames\na.mp4\ta cat\t12\nb.mp4\ta dog\t14\n",
        "num_frames,video,caption\n12,a.mp4,a cat\n14,b.mp4,a dog\n",  # MindONE
        '"path","text","num_frames","",\n"a.mp4","a cat","12"\n"b.mp4","a dog","14","",\n',
        "path,text,num_frames\na.mp4, \"a cat\",12\nb.mp4, 'a dog',14\n".replace("'", ""),
    ],
)
def test_reads_tables_as_people_write_them(tmp_path: Path, text: str) -> None:
    rows = table(tmp_path, text).rows
    assert [row.path.name for row in rows] == ["a.mp4", "b.mp4"]
    assert [row.text for row in rows] == ["a cat", "a dog"]
    assert [row.num_frames for row in rows] == [12, 14]


def test_reads_1_0_tables_without_header(tmp_path: Path) -> None:
    rows = table(tmp_path, 'a.mp4,"a cat, asleep"\nc.jpg,a dog\n').rows
    assert [(row.line, row.path.name, row.text) for row in rows] == [
        (1, "a.mp4", "a cat, asleep"),
        (2, "c.jpg", "a dog"),
    ]


@pytest.mark.parametrize("word", ["", "nan", "NaN", "None", "0", "0.0"])
def test_cells_without_a_number_are_missing(tmp_path: Path, word: str) -> None:
    row = table(tmp_path, f"path,text,num_frames,height,fps\na.mp4,,{word},{word},{word}\n").rows[0]
    assert (row.text, row.num_frames, row.height, row.fps) == (None, None, None, None)


def test_long_and_broken_lines_keep_their_numbers(tmp_path: Path) -> None:
    long = "word " * 60_000
    text = f'path,text,height\na.mp4,"two\nlines {long}",240\nb.mp4,x,tall\n'
    with pytest.raises(UsageError, match=r"meta.csv:4: height must be a number, got 'tall'"):
        table(tmp_path, text)


def test_relative_paths_begin_at_the_table_or_the_root(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "d.mp4").touch()
    assert table(tmp_path, "path\nclips/d.mp4\n").rows[0].path == clips / "d.mp4"
    assert table(tmp_path, "path\nd.mp4\n", root=clips).rows[0].path == clips / "d.mp4"
    assert table(tmp_path, f"path\n{clips}/d.mp4\n").rows[0].path == clips / "d.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("path,text\n", "a header and no rows"),
        ("file_path,text\na.mp4,x\n", "no column 'path'.*did you mean file_path"),
        ("filename,text\na.mp4,x\n", "rename 'filename' to 'path'"),
        ("Path,text\na.mp4,x\n", "rename 'Path' to 'path'"),
        ("path,text,path\na.mp4,x,b.mp4\n", "the column 'path' is there twice"),
        ("path,video, path\na.mp4,x,b.mp4\n", "the column 'path' is there twice"),
        ("path,text\na.mp4,a cat, asleep\n", r":2: 3 cells, but 2 columns .*double quotes"),
        ('path,text\na.mp4,x\nb.mp4,"open\n', r":3: not csv"),
        ("path,text\na.mp4,x\n,y\n", r":3: the cell of 'path' is empty"),
        ("path,num_frames\na.mp4,12.5\n", r":2: num_frames must be a whole number"),
        ("path,num_frames\na.mp4,-1\n", r":2: num_frames must be a whole number"),
        ("path,height\na.mp4,240p\n", r":2: height must be a number, got '240p'"),
        ("path,fps\na.mp4,inf\n", r":2: fps must be finite"),
        ("path,fps\na.mp4,-3\n", r":2: fps must not be negative"),
        ("path,aes\na.mp4,good\n", r":2: aes must be a number"),
        ("path,text\na.mp4,x\0y\n", r":2: holds a null byte"),
        (b"path,text\na.mp4,ok\nb.mp4,caf\xe9\n", r":3: not UTF-8"),
        (b"PAR1xxxx", "is a parquet file"),
        (b"PK\x03\x04", "is a workbook"),
        ("path,text\nno.mp4,x\nclips/no.mp4,y\n", "none of the files is there.*no.mp4"),
    ],
)
def test_says_what_is_wrong_and_where(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table(tmp_path, text)


def test_missing_tables_and_folders(tmp_path: Path) -> None:
    (tmp_path / "meta.csv").touch()
    with pytest.raises(UsageError, match=r"does not exist; did you mean meta.csv"):
        read_table(tmp_path / "metta.csv")
    with pytest.raises(UsageError, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(UsageError, match="folder of clips"):
        read_table(tmp_path / "meta.csv", tmp_path / "none")


def test_reads_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    path = tmp_path / "meta.parquet"
    columns = {
        "path": ["a.mp4", "b.mp4"],
        "text": ["a cat", None],
        "num_frames": [12, None],
        "fps": [24.0, float("nan")],
        "aes": [5.5, 1.0],
    }
    parquet.write_table(pyarrow.table(columns), path)
    first, second = read_table(path).rows
    assert (first.text, first.num_frames, first.fps, first.extra) == (
        "a cat",
        12,
        24.0,
        {"aes": 5.5},
    )
    assert (second.text, second.num_frames, second.fps) == (None, None, None)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UsageError, match="cannot read"):
        read_table(path)
