"""What sharing saves: tokens that go through the network, and seconds that prompts take."""

from __future__ import annotations

import io
import random
import tarfile
import time
from pathlib import Path

import pytest

from evaluation.benchmarks import real_data
from evaluation.test_asking import real_tokenizer
from gemcut.evaluation import DataFolder, Setup, row
from gemcut.evaluation.prompts import Prompts
from gemcut.evaluation.run import RunOptions, run_rows


def archive(folder: Path) -> DataFolder:
    """Two subjects of MMLU's form: questions as long as MMLU's are beside their five shots."""
    chance = random.Random(0)

    def lines(count: int) -> bytes:
        rows = ["question,choice0,choice1,choice2,choice3,answer"]
        for _ in range(count):
            words = ["".join(chance.choices("abcd", k=2)) for _ in range(5)]
            rows.append(f"{words[0]} {words[1]},{','.join(words[1:])},{chance.randrange(4)}")
        return "\n".join(rows).encode()

    (folder / "mmlu").mkdir(parents=True)
    with tarfile.open(folder / "mmlu" / "mmlu_csv.tar.gz", "w:gz") as file:
        for subject in ("first_one", "second_one"):
            for split, count in (("dev", 5), ("test", 24)):
                data, info = lines(count), tarfile.TarInfo(f"{split}/{subject}_{split}.csv")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return DataFolder(folder)


def test_mmlu_computes_fifteen_times_fewer_tokens(tmp_path: Path) -> None:
    """Counted by the engine, of a network whose context holds the shots, against four whole requests a question."""
    from engine.driver import CPU, small_model
    from evaluation.test_asking import Bytes
    from gemcut.engine import EngineConfig
    from gemcut.gemma import Gemma

    tokenizer = Bytes()
    model = small_model(vocab_size=320, context=1024)
    gemma = Gemma(model, tokenizer, CPU, engine=EngineConfig(max_batch_tokens=128, sequences=12))  # type: ignore[arg-type]
    log = run_rows(gemma, [row("mmlu")], archive(tmp_path / "data"), tmp_path / "run", RunOptions())
    done = log.rows["mmlu"].done
    assert done is not None
    items = log.rows["mmlu"].items
    prompts = [item.request.prefix + item.request.context for item in items]  # type: ignore[union-attr]
    alone = sum(4 * (len(tokenizer.encode(prompt)) + 1) for prompt in prompts)
    assert done["alone"] == alone
    assert done["computed"] * 15 <= alone
    answers = log.rows["mmlu"].answers
    assert all(len(answer.logprobs) == 4 for answer in answers)


@pytest.mark.slow
def test_all_of_mmlu_with_the_real_tokenizer() -> None:
    """14,042 prompts in less than 3 CPU seconds; with ids for all of them, counted in blocks of 16 as the cache has
    them, 15 times fewer tokens than four requests a question."""
    from engine.driver import CPU, twins
    from gemcut.gemma import Gemma

    data, mmlu = real_data(), row("mmlu")
    records = mmlu.load(data)
    began = time.process_time()
    items = mmlu.build(records, Setup())
    assert time.process_time() - began < 3
    assert len(items) == 14_042
    prompts = Prompts(Gemma(twins()[0], real_tokenizer(), CPU))
    alone = computed = 0
    seen: dict[str, int] = {}
    for item in items:
        ids = prompts.text(item.request.context, item.request.prefix)  # type: ignore[union-attr]
        prefix = item.request.prefix  # type: ignore[union-attr]
        alone += 4 * (len(ids) + 1)
        shared = seen.get(prefix, 0)
        if not shared:
            seen[prefix] = (len(prompts._known[prefix]) + 1) // 16 * 16
        computed += len(ids) + 1 - shared
    print(f"{alone:,} tokens alone, {computed:,} computed: {alone / computed:.1f} times fewer")
    assert computed * 15 <= alone
