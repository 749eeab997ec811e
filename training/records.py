"""Records of text, JSON and CSV files, one after the other, each with what is wrong with it, if
anything is.

A byte-order mark is removed. What is no UTF-8 is refused, with a guess at what it is, unless
`data.encoding` names it: a wrong guess would be learnt. A record is known by its file, its
number from 0 and, where there are lines, its line from 1.
"""

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = {  # the longer ones first: UTF-16's is the beginning of UTF-32's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DIALOGUES = ("prompt", "messages", "conversations")  # fields that make a record a dialogue
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
# guesses to make
COMMON = (
    "cp1252",
    "cp1250",
    "cp1251",
    "gb18030",
    "big5",
    "shift_jis",
    "euc_jp",
    "euc_kr",
    "koi8_r",
)
SHOWN = 60  # characters of a bad value in a message
# what a file raises that is missing, cut off or damaged, compressed or not
UNREADABLE = (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error)
SEPARATORS = ",;\t|"  # of a .csv file, told by its header


def near_miss(name: str, names: list[str]) -> str:
    """The end of a sentence: a hint at the name that was meant, or a full stop."""
    close = difflib.get_close_matches(name.lower(), [known.lower() for known in names], 1, 0.6)
    meant = [known for known in names if known.lower() in close]
    return f"; did you mean {meant[0]!r}?" if meant else "."


def shown(value: Any) -> str:
    """A value as messages show it: its type in words and its beginning."""
    if value is None:
        return "null"
    kinds = {
        bool: "the truth value",
        int: "the number",
        float: "the number",
        list: "the list",
        dict: "the object",
    }
    text = json.dumps(value, ensure_ascii=False, default=str)
    rest = "..." if len(text) > SHOWN else ""
    return f"{kinds.get(type(value), type(value).__name__)} {text[:SHOWN]}{rest}"


def open_bytes(path: Path) -> BinaryIO:
    """A file of bytes, decompressed by its suffix."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _encoding(path: Path, encoding: str | None) -> str:
    """The encoding of a file under Python's name for it: what its mark says, or what is given."""
    try:
        given = codecs.lookup(encoding or "utf-8").name
    except LookupError as error:
        raise ValueError(
            f"`data.encoding` ({encoding!r}) is no encoding that Python knows."
        ) from error
    try:
        with open_bytes(path) as stream:
            # the longest byte-order mark
            start = stream.read(4)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read ({error}); repair or remove the file.") from error
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), given)


def read_text(path: Path, encoding: str | None = None) -> str:
    """The text of a file, with `\\n` at the end of every line; `ValueError` if it is none."""
    encoding = _encoding(path, encoding)
    try:
        with open_bytes(path) as stream:
            # the whole file: a wrong encoding may show at its end only
            content = stream.read()
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read ({error}); repair or remove the file.") from error
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_text(content, encoding, error)}") from error
    if "\0" in text:
        raise ValueError(
            f"{path} has a NUL character at {text.index(chr(0))}, so it is no text, or it is "
            "UTF-16 without a mark; convert it to UTF-8, or name its encoding by "
            "data.encoding=utf-16-le."
        )
    # one kind of line end, or a model would learn two tokens for one thing
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_text(content: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    """Why bytes are no text, and how to say what they are."""
    found = f"byte {error.start} ({content[error.start]:#04x}) is no {encoding.upper()}"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return f"{found}; convert the file, or name its encoding by data.encoding=..."
    # the first MiB tells enough, and a corpus may have gigabytes
    guess = from_bytes(content[: 1 << 20], cp_isolation=list(COMMON)).best()
    if guess is None or "\0" in str(guess):
        return f"{found}, and it looks like no text at all; convert or remove the file."
    # of encodings that give the same text, the most common one
    alike = {guess.encoding, *guess.could_be_from_charset}
    name = next((name for name in COMMON if name in alike), guess.encoding)
    return f"{found}; perhaps it is {name}: convert the file, or set data.encoding={name}."


def read_rows(path: Path, encoding: str | None = None) -> Iterator[tuple[str, Any]]:
    """`(where, record)` of a .json, .jsonl, .csv or .tsv file. A record that cannot be read is a
    `ValueError` in its place."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in OPENERS else path.suffix
    if suffix.lower() in (".csv", ".tsv"):
        return _csv_rows(path, suffix.lower(), encoding)
    if suffix.lower() == ".json" and not _is_lines(path, encoding):
        return _json_rows(path, encoding)
    return _line_rows(path, encoding)


def _is_lines(path: Path, encoding: str | None) -> bool:
    """Whether a .json file has a record on each line: then its first line is a whole object."""
    name = _encoding(path, encoding)
    if name.startswith(("utf-16", "utf-32")):  # whose lines cannot be split as bytes
        return False
    with open_bytes(path) as stream:
        first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
        follows = any(line.strip() for line in stream)
    try:
        # one object that is printed over many lines does not end on its first
        return follows and isinstance(json.loads(first.decode(name)), dict)
    except ValueError:
        return False


def _json_rows(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    text = read_text(path, encoding)
    try:
        content = json.loads(text)
    # a few kilobytes of nested brackets exceed Python's recursion limit
    except (ValueError, RecursionError) as error:
        yield f"{path}", ValueError(f"{path} is no JSON ({error}).")
        return
    for index, record in enumerate(content if isinstance(content, list) else [content]):
        yield f"{path}, record {index}", record


def _line_rows(path: Path, encoding: str | None) -> Iterator[tuple[str, Any]]:
    name = _encoding(path, encoding)
    wide = name.startswith(("utf-16", "utf-32"))  # whose lines cannot be split as bytes
    lines = io.BytesIO(read_text(path, encoding).encode()) if wide else open_bytes(path)
    name = "utf-8" if wide else name
    index = 0
    with lines:
        for number, line in enumerate(lines, 1):
            # a mark belongs to the beginning of the file; inside it is a character of the text
            if number > 1 and name == "utf-8-sig":
                name = "utf-8"
            if not line.strip():
                continue
            where = f"{path}, record {index} (line {number})"
            try:
                yield where, json.loads(line.decode(name))
            except UnicodeDecodeError as error:
                yield where, ValueError(f"{where}: {_not_text(line, name, error)}")
            except (ValueError, RecursionError) as error:
                yield where, ValueError(f"{where} is no JSON ({error}).")
            # of records, since blank lines hold none
            index += 1


def _csv_rows(path: Path, suffix: str, encoding: str | None) -> Iterator[tuple[str, Any]]:
    # Python's default of 131,072 characters refuses a book in one field. The limit is a C long, of
    # 32 bits on Windows.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = read_text(path, encoding)
    first, _, rest = text.partition("\n")
    if first.startswith("sep=") and len(first) == 5:  # Excel's way of naming it
        separator = first[-1]
        text = rest
    elif suffix == ".tsv":
        separator = "\t"
    else:
        separator = max(SEPARATORS, key=first.count)
    # strict, for a quote that is never closed would make one text of all lines behind it
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    rows = _csv_fields(reader)
    header = next(rows, [])
    if isinstance(header, ValueError):
        yield f"{path}", ValueError(f"{path} has a header that is no CSV ({header}).")
        return
    if len(set(header)) < len(header):
        yield (
            f"{path}",
            ValueError(f"{path} names a column twice ({', '.join(header)}); rename one."),
        )
        return
    # a blank line is a row without fields
    for index, row in enumerate(row for row in rows if row):
        where = f"{path}, record {index} (line {reader.line_num})"
        if isinstance(row, ValueError):
            yield where, ValueError(f"{where} is no CSV ({row}); close its quotes, or double them.")
        elif len(row) != len(header):
            yield (
                where,
                ValueError(
                    f"{where} has {len(row)} fields, but the header {len(header)}; quote its text."
                ),
            )
        else:
            yield where, dict(zip(header, row))


def _csv_fields(reader) -> Iterator[list[str] | ValueError]:
    """The rows of a reader; where it fails the reason, and then the next row."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield ValueError(str(error))


def first_record(path: Path, encoding: str | None = None) -> dict | None:
    """The first object of a file, which says what its fields are; None if it holds no record at
    all. A file that cannot be read holds one without fields: why is found when its records are."""
    found = None
    try:
        for _, record in read_rows(path, encoding):
            if isinstance(record, dict):
                return record
            # records of another kind: there are some, but without fields
            found = {}
    except UNREADABLE:
        return {}
    return found


def text_of(record: Any, column: str, where: str) -> str:
    """The text of a record; `ValueError` if its field is missing, null or of another type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {shown(record)}, not an object with fields.")
    if column not in record:
        fields = list(record)
        raise ValueError(
            f"{where} has no field {column!r} (fields: "
            f"{', '.join(fields)}){near_miss(column, fields)} Repair or remove it."
        )
    text = record[column]
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has no text in field {column!r} but {shown(text)}; repair or remove it."
        )
    try:
        # JSON may escape one half of a surrogate pair, which no encoding can write
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {column!r} has half a character at {error.start}; repair it."
        ) from error
    return text


def messages_of(record: dict, where: str = "the dialogue") -> list[dict[str, str]]:
    """`[{"role", "content"}, ...]` of a record of any of the three forms; `ValueError` if it
    does not end with an answer."""
    if record.get("prompt") is not None:
        pairs = [("user", record["prompt"]), ("assistant", record.get("answer"))]
    else:
        # tables that joined several sources have all of the fields, and null in most
        turns = record.get("messages") or record.get("conversations")
        if turns is None and not set(DIALOGUES) & set(record):
            raise ValueError(
                f"{where} has none of the fields {', '.join(DIALOGUES)} (fields: "
                f"{', '.join(record)}); repair or remove it."
            )
        pairs = _turns(turns or [], where)
    messages = []
    for number, (role, content) in enumerate(pairs):
        if not isinstance(content, str):
            raise ValueError(
                f"{where}: turn {number} ({role}) of {pairs!r:.200} holds {shown(content)} "
                "instead of a text; repair or remove it."
            )
        messages.append(
            {"role": ROLES[role], "content": text_of({"content": content}, "content", where)}
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where} {pairs!r:.200} must end with an answer of the assistant to something."
        )
    # nothing would be learnt but to stop
    if not messages[-1]["content"].strip():
        raise ValueError(f"{where} {pairs!r:.200} has a blank answer; repair or remove it.")
    return messages


def _turns(turns: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"{where}: its turns are {shown(turns)}, not a list.")
    pairs = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(
                f"{where}: a turn is {shown(turn)}, not an object with role and content."
            )
        # OpenAI's names, or those of ShareGPT
        role, content = ("role", "content") if "role" in turn else ("from", "value")
        if turn.get(role) not in list(ROLES) or content not in turn:
            raise ValueError(
                f"{where}: a turn of {turns!r:.200} has no {content!r} or an unknown {role!r}; "
                f"known roles are {sorted(ROLES)}."
            )
        pairs.append((turn[role], turn[content]))
    return pairs
