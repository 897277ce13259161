"""MMLU: 57 subjects of four-way questions, answered by one letter."""

from __future__ import annotations

from gemcut.evaluation.folder import DataFolder, SetOfData
from gemcut.evaluation.requests import Letters
from gemcut.evaluation.row import CardValues, Item, Records, Row, Setup, each
from gemcut.evaluation.scoring import choice_score

_COLUMNS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
_LETTERS = (" A", " B", " C", " D")


def load(data: DataFolder) -> Records:
    """The test questions, and each subject's own five for shots."""
    found = Records([])
    for name, records in data.csv_archive("mmlu/mmlu_csv.tar.gz", _COLUMNS).items():
        split, _, file = name.removeprefix("./").partition("/")
        subject = file.removesuffix(f"_{split}.csv")
        if split == "dev":
            found.shots[subject] = records
        elif split == "test":
            found.records += [{**record, "subject": subject} for record in records]
    return found


def build(records: Records, setup: Setup) -> list[Item]:
    """A description of the subject, its first shots, the question."""
    shots = 5 if setup.shots is None else setup.shots
    prefixes = {
        subject: f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        + "".join(f"{_ask(shot)}{_LETTERS[int(shot['answer'])]}\n\n" for shot in own[:shots])
        for subject, own in records.shots.items()
    }
    return [
        Item(
            id=f"{record['subject']}/{number}",
            group=record["subject"],
            request=Letters(letters=_LETTERS, prefix=prefixes[record["subject"]], context=_ask(record)),
            target=int(record["answer"]),
        )
        for number, record in enumerate(records.records)
    ]


def _ask(record: dict[str, str]) -> str:
    return (
        f"{record['question'].strip()}\nA. {record['choice0']}\nB. {record['choice1']}\nC. {record['choice2']}\n"
        f"D. {record['choice3']}\nAnswer:"
    )


ROWS = (
    Row(
        id="mmlu",
        title="MMLU",
        setting="5-shot, top-1",
        card=CardValues(pt_9b=71.3, pt_27b=75.2),
        shots=5,
        metric="acc",
        data=SetOfData(
            name="mmlu",
            files=("mmlu_csv.tar.gz",),
            source="the dataset cais/mmlu on Hugging Face",
            licence="MIT",
            count=14_042,
        ),
        load=load,
        build=build,
        score=each(choice_score),
        differs=("Google does not say whether it averages over questions (as here) or over subjects.",),
    ),
)
