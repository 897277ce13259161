"""Bringing a set's files from the Hugging Face hub, where a person asks for it; Parquet becomes JSON lines."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path

from gemcut.errors import DataError, ParameterError
from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.registry import all_rows


def fetch_set(name: str, folder: DataFolder) -> Iterator[tuple[Path, int]]:
    """Bring the files of a set that has an address on the hub: each path with its number of records.

    Raises:
        ParameterError: there is no such set, or it has no address; the message says where its data are.
        DataError: the hub does not have it, or it cannot be reached.
    """
    sets: dict[str, SetOfData] = {}
    for row in all_rows().values():
        if row.data.name not in sets or row.data.fetch:
            sets[row.data.name] = row.data
    if name not in sets:
        raise ParameterError(f"there is no set {name!r}; there are {', '.join(sorted(sets))}")
    wanted = sets[name]
    if not wanted.fetch:
        raise ParameterError(f"{name} has to be put there by hand: {wanted.source} (licence: {wanted.licence})")
    for repository, pattern, file in wanted.fetch:
        target = folder.root / name / file
        yield target, _bring(repository, pattern, target)


def _bring(repository: str, pattern: str, target: Path) -> int:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ParameterError("fetching needs the package pyarrow: pip install 'gemcut[data]'") from None
    from huggingface_hub import HfApi, hf_hub_download

    try:
        every = HfApi().list_repo_files(repository, repo_type="dataset")
        names = sorted(name for name in every if fnmatch.fnmatch(name, pattern))
        if not names:
            raise DataError(f"{repository} on the hub has no file like {pattern}")
        paths = [hf_hub_download(repository, name, repo_type="dataset") for name in names]
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"cannot fetch {repository} from the hub: {said}") from None
    except DataError:
        raise
    except Exception as error:  # the hub's client has errors of the libraries below it
        raise DataError(f"cannot fetch {repository} from the hub: {type(error).__name__}") from None
    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.unfinished")
    try:
        with open(part, "w", encoding="utf-8") as out:
            for path in paths:
                for record in parquet.read_table(path).to_pylist():
                    out.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                    count += 1
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return count
