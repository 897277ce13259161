"""What is taken for an answer, and when it is right: from the data sets' published rules, case by case."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
import sympy

from gemcut.errors import DataError, ParameterError
from gemcut.evaluation import Answer, DataFolder, Generate, Item, ScoreOptions, Setup, row
from gemcut.evaluation.latex import equal, final_answer, last_boxed
from gemcut.evaluation.rows.closed_book import normal_squad, normal_trivia


def score(name: str, text: str, target: Any, **meta: Any) -> Any:
    item = Item(id="1", request=Generate(max_new_tokens=1), target=target, meta=meta)
    return row(name).score([item], [Answer(texts=(text,))], ScoreOptions())[0]


@pytest.mark.parametrize(
    ("name", "text", "accepted", "right"),
    [
        ("triviaqa", " Washington, D.C.", ["Washington D.C."], True),
        ("triviaqa", " St. Louis\n", ["St. Louis, Missouri", "St. Louis"], True),
        ("triviaqa", " Washington, D.C.", ["washington, d.c."], True),
        ("triviaqa", "The Beatles!", ["beatles"], True),
        ("triviaqa", "Beatles and Stones", ["Beatles"], False),
        ("triviaqa", "", [""], False),
        ("nq_open", " the 14 December 1972 UTC", ["14 December 1972 UTC"], True),
        ("nq_open", " Washington, D.C.", ["Washington DC"], True),
    ],
)
def test_short_answers(name: str, text: str, accepted: list[str], right: bool) -> None:
    found = score(name, text, accepted)
    assert found.values["exact_match"] == right
    assert found.failed == (text == "")


@pytest.mark.parametrize("text", ["The_end’s  `a` An THE, of-it.", "a", "U.S.A. (the)", "x—y"])
def test_normalisations_step_by_step(text: str) -> None:
    """The rules as the data sets' papers tell them, one character after the other."""
    marks = set(string.punctuation) | set("‘’´`")
    spaced = "".join(" " if c in marks or c == "_" else c for c in text.lower())
    assert normal_trivia(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", spaced).split())
    gone = "".join(c for c in text.lower() if c not in string.punctuation)
    assert normal_squad(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", gone).split())


def test_gsm8k() -> None:
    assert score("gsm8k", "so 6*7 = 42.\n#### 42", "42").values == {"strict": 1, "flexible": 1}
    assert score("gsm8k", "#### $1,234.00", "1234").values == {"strict": 0, "flexible": 1}  # strict wants a digit there
    assert score("gsm8k", "#### 1,234.", "1234").values == {"strict": 1, "flexible": 1}
    found = score("gsm8k", "The answer is 42", "42")
    assert found.values == {"strict": 0, "flexible": 1}
    assert found.failed
    assert score("gsm8k", "#### 41\nThen 42", "42").values == {"strict": 0, "flexible": 1}
    assert score("gsm8k", "none", "42").values == {"strict": 0, "flexible": 0}


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("We see. So the answer is (B).", "(B)", True),
        ("So the answer is (B) the raven.", "(B)", True),
        ("So the answer is B.", "(B)", True),
        ("The answer is (A). No: the answer is (C).", "(C)", True),
        ("So the answer is True.", "True", True),
        ("So the answer is yes.", "Yes", True),
        ("So the answer is -1,219.", "-1219", True),
        ("So the answer is ] } ].", "] } ]", True),
        ("So the answer is ]}].", "] } ]", False),
        ("So the answer is arson aspect census", "arson aspect census", True),
        ("So the answer is 3.5.", "3.5", True),
        ("I cannot say.", "(B)", False),
        ("So the answer is bad.", "(B)", False),
    ],
)
def test_bbh(text: str, target: str, right: bool) -> None:
    found = score("bbh", text, target)
    assert found.values["exact_match"] == right
    assert found.failed == ("answer is" not in text)


def test_boxes_and_final_answers() -> None:
    assert last_boxed(r"so $\boxed{\frac{1}{2}}$ and $\fbox{3}$") == "3"
    assert last_boxed(r"\boxed{a{b}c} tail") == "a{b}c"
    assert last_boxed(r"\boxed 7$ more") == "7"
    assert last_boxed(r"\boxed{open") is None
    assert last_boxed("none") is None
    assert final_answer("Final Answer: The final answer is $[2,5)$. I hope it is correct.") == "$[2,5)$"
    assert final_answer(r"thus $\boxed{24}$.") == "24"
    assert final_answer("thus 24") is None


SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    ("x = 5", "5"),
    (r"10{,}000", "10000"),
    (r"\$32,500", "32500"),
    ("2x+3", "3+2x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("[2,5)", "[2, 5)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"90^\circ", "90"),
    (r"12\text{ cm}", "12"),
    ("1, -2", "-2,1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"2\sqrt[3]{4}", r"\sqrt[3]{32}"),
    (r"50\%", "50"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"4!", "24"),
    (r"-\frac{2}{3}", r"\frac{-2}{3}"),
]
DIFFERENT = [
    ("1", "2"),
    ("[2,5)", "[2,5]"),
    ("(1,2)", "(2,1)"),
    ("x+1", "x+2"),
    ("", ""),
    (r"\frac{1}{0}", r"\frac{1}{0.0}"),
    ("9^{9^{9^{9}}}", "3"),
    ("1,2", "1"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    ("__import__('os').system('true')", "0"),
    ("1000000!", "1"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_answers(one: str, other: str) -> None:
    assert equal(one, other)
    assert equal(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers(one: str, other: str) -> None:
    assert not equal(one, other)


def test_expressions_as_sympy_reads_them() -> None:
    """Random expressions, expanded by sympy: equal to themselves, and not once something is added."""
    x, y = sympy.symbols("x y")
    for seed in range(30):
        a, b, c = (seed * 7 % 5 - 2, seed % 3 + 1, seed % 4 + 1)
        expression = (x + a) ** b * (y - c) / (b + c) + sympy.sqrt(c) * x
        whole, expanded = sympy.latex(expression), sympy.latex(sympy.expand(expression))
        assert equal(whole, expanded), (whole, expanded)
        assert not equal(whole, sympy.latex(sympy.expand(expression + x / 7)))


def test_code_needs_permission() -> None:
    with pytest.raises(ParameterError, match="say --allow-code"):
        score("humaneval", "    return 1\n", "check(f)", before="def f():\n")


def test_programs_of_a_row_are_run() -> None:
    from gemcut.evaluation.sandbox import sandbox_refusal

    if sandbox_refusal():
        pytest.skip("no sandbox here")
    items = [
        Item(id=str(i), request=Generate(max_new_tokens=1), target="assert f(2) == 4", meta={"before": "def f(x):\n"})
        for i in range(2)
    ]
    answers = [Answer(texts=(text,)) for text in ("    return 2 * x", "    return x")]
    found = row("humaneval").score(items, answers, ScoreOptions(allow_code=True))
    assert [each.values["pass@1"] for each in found] == [1, 0]
    assert found[1].extracted.startswith("AssertionError")


def test_files_of_the_user(tmp_path: Path) -> None:
    """SocialIQA, TriviaQA and MATH in the forms that their sources have, on invented questions."""
    data = DataFolder(tmp_path)
    for name in ("social_iqa", "triviaqa", "math"):
        (tmp_path / name).mkdir()
    (tmp_path / "social_iqa" / "test.json").write_text(
        '[{"instruction": "Please choose the correct answer to the question: Kim met Lee. What next?\\n\\nAnswer1: go'
        ' Answer2: stay Answer3: eat\\n\\nAnswer format: answer1/answer2/answer3", "answer": "answer2"}]'
    )
    (item,) = row("social_iqa").build(row("social_iqa").load(data), Setup())
    assert (item.request.context, item.target) == ("Q: Kim met Lee. What next?\nA:", 1)  # type: ignore[union-attr]
    (tmp_path / "triviaqa" / "topics.dpr.trivia.test.txt").write_text(
        "".join(f"Who is {i}?\t['One {i}', \"Two's {i}\"]\n" for i in range(7))
    )
    items = row("triviaqa").build(row("triviaqa").load(data), Setup())
    assert [item.id for item in items] == ["5", "6"]
    assert items[0].target == ["One 5", "Two's 5"]
    assert items[0].request.prefix.startswith("Question: Who is 0?\nAnswer: One 0\n\n")  # type: ignore[union-attr]
    (tmp_path / "triviaqa" / "topics.dpr.trivia.test.txt").write_text("Who?\t__import__('os')\n")
    with pytest.raises(DataError, match="line 1: expected a question, a tab and a list of answers"):
        row("triviaqa").load(data)
    solutions = [f"so $\\boxed{{{i}}}$" for i in range(6)]
    lines = [
        json.dumps({"problem": f"P{i}", "solution": solution, "type": "Algebra", "idx": i})
        for i, solution in enumerate(solutions)
    ]
    (tmp_path / "math" / "test.json").write_text("\n".join(lines))
    items = row("math").build(row("math").load(data), Setup())
    assert [(item.id, item.target) for item in items] == [("4", "4"), ("5", "5")]
    assert "The final answer is $3$. I hope it is correct.\n\nProblem:" in (
        items[0].request.prefix + items[0].request.context  # type: ignore[union-attr]
    )
    (tmp_path / "math" / "test.json").write_text('{"problem": "P", "solution": "none"}')
    with pytest.raises(DataError, match=r"record 1: its solution has no \\boxed answer"):
        row("math").load(data)
