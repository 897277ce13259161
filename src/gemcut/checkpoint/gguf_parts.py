"""The parts of a split GGUF file, found from the name of any of them."""

from __future__ import annotations

import re
from pathlib import Path

from gemcut.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from gemcut.errors import CheckpointError

#: llama-gguf-split's names: prefix, number of the part from 1 on, number of parts.
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MAX_PARTS = 9999


def read_parts(path: Path) -> tuple[GgufHeader, list[GgufHeader]]:
    """(the header that holds the metadata, the headers of all parts in order); a whole file is its only part.

    Raises CheckpointError where a part is missing, of another file, or the parts' tensors are not as many as promised.
    """
    header = read_header(path)
    count = _number(header, "split.count", 1)
    if count <= 1:
        return header, [header]
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or count > _MAX_PARTS:
        raise CheckpointError(
            f"{path} is part {_number(header, 'split.no', 0) + 1} of {count} of a split GGUF, whose parts are found by "
            f"their names, NAME-00001-of-{count:05}.gguf and so on; give it its old name, beside the others"
        )
    paths = [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} is one of {count} parts; {missing[0]}{more} is missing: copy or download it too")
    headers = [header if each == path else read_header(each) for each in paths]
    promised = _number(headers[0], "split.tensors.count", 0)
    found = 0
    for index, part in enumerate(headers):
        if _number(part, "split.count", 1) != count or _number(part, "split.no", -1) != index:
            raise CheckpointError(
                f"{part.file.path} says it is part {_number(part, 'split.no', -1) + 1} of "
                f"{_number(part, 'split.count', 1)}, not {index + 1} of {count}: it belongs to another file"
            )
        if _number(part, "split.tensors.count", promised) != promised:
            raise CheckpointError(f"{part.file.path} belongs to another file than {paths[0].name}: get both again")
        found += len(part.tensors)
    if found != promised:
        raise CheckpointError(f"{path}: its {count} parts hold {found} tensors of {promised}: get them again")
    return headers[0], headers


def all_tensors(headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    """The tensors of all parts by the file's names. Raises CheckpointError where two have one name."""
    tensors: dict[str, GgufTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in {tensors[name].file.path} and in {header.file.path}: get both again"
                )
            tensors[name] = tensor
    return tensors


def _number(header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"{header.file.path}: metadata {key} is {str(value)[:40]!r}; expected a whole number")
    return value
