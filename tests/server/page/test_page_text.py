"""Markdown into elements, as pure functions in the browser, against markdown-it-py (CommonMark and GitHub's tables)."""

from __future__ import annotations

import random
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from .conftest import Open

#: The elements that `render.js` made, as [name, children] and texts: what our page adds (bars, boxes) left out.
TREE = """
async (texts) => {
  const { renderMarkdown } = await import("/page/render.js");
  const tree = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.matches("div.code")) return tree(node.querySelector("pre"));
    if (node.matches("div.table")) return tree(node.firstChild);
    if (node.matches("code span")) return node.textContent;
    const size = /size-(\\d)/.exec(node.className);
    const name = size ? `h${size[1]}` : node.localName;
    const href = name === "a" ? [node.getAttribute("href")] : [];
    return [name, ...href, ...[...node.childNodes].map(tree)];
  };
  return texts.map((text) => renderMarkdown(text).map(tree));
}
"""
#: Shows each text piece by piece; gives what is there at the end, and where a piece gave something else than the whole.
GROW = """
async ([text, cuts]) => {
  const { MarkdownView, renderMarkdown } = await import("/page/render.js");
  const shown = document.createElement("div");
  const view = new MarkdownView(shown);
  const wrong = [];
  // Colours come when a block is whole, so structure and texts are compared.
  const plain = (element) => {
    const copy = element.cloneNode(true);
    for (const span of copy.querySelectorAll("code span")) span.replaceWith(span.textContent);
    for (const code of copy.querySelectorAll(".code")) code.removeAttribute("data-state");
    copy.normalize();
    return copy.innerHTML;
  };
  for (const cut of cuts) {
    view.update(text.slice(0, cut), false);
    const whole = document.createElement("div");
    whole.append(...renderMarkdown(text.slice(0, cut)));
    if (plain(shown) !== plain(whole)) wrong.push(cut);
  }
  view.update(text, true);
  const whole = document.createElement("div");
  whole.append(...renderMarkdown(text));
  return [shown.innerHTML === whole.innerHTML, wrong];
}
"""

SAMPLES = {
    "emphasis": "*a* **b** ***c*** _d_ __e__ ~~f~~ **a *b* c** *a **b** c* ***a** b* 2*3*4 snake_case_name a * b *",
    "emphasis that fails": "*a **b* c** __a_ _a__ ** ** **a* *a** a** b* **\\*a** ~~a~ ~b~",
    "emphasis and punctuation": '**"quoted"** (**bold**) foo**bar**baz _(a)_ foo_bar_ **a**: *b*.',
    "code": "`a` ``b ` c`` ` d ` `` ` `` `e\nf` `unclosed **x** ``` `x`` y",
    "escapes": "\\*a\\* \\`b\\` \\# \\[c](d) a\\\\b \\a 1\\. \\_x\\_",
    "entities": "&lt;b&gt; &amp; &quot; &#65; &#x42; &hellip; &nosuchname; &#0; & &;",
    "breaks": "one\ntwo  \nthree\\\nfour",
    "links": "[a](https://x.org/b) [a *b*](https://x.org 'title') [p](https://x.org/a_(b)) <https://x.org/c>",
    "no links": "[x] [a](b c) [a] (https) ](",
    "links within": "[a [b](mailto:b@x.org) c](mailto:c@x.org) *[a](https://x.org/3)* [`]`](https://x.org/4)",
    "headings": "# 1\n## Two ##\n### Three\n\n#### Four\n##### Five\n###### Six\n####### no\n#a\n\nSet\n===\nSet\n---",
    "paragraphs": "a\nb\n\n\nc\n   d\n\n    code\n\ne",
    "rules": "***\n---\n_ _ _\n\na\n\n- - -\n\n--\n",
    "quotes": "> a\nb\n\n> c\n> > d\n> - e\n> ```\n> f\n> ```\n\ng",
    "lists": "- a\n- b\n\n1. c\n2. d\n\n5) e\n6) f\n\n* g\n+ h",
    "nested lists": "- a\n  - b\n    - c\n  - d\n- e\n  1. f\n  2. g\n     - h\n",
    "loose lists": "- a\n\n- b\n\n1. c\n\n   d\n2. e",
    "lists with blocks": "- a\n\n  ```py\n  x = 1\n  ```\n- b\n  > c\n\n1. # d\n   e",
    "lists by paragraphs": "text\n- a\n- b\n\ntext\n1. c\n\nin\n1984. was no list",
    "fences": "```python\na  =  1\n\n  b\n```\n~~~\nc\n```\n~~~\n````\n```\n````\n```js x y\nd",
    "tables": "| a | b |\n|---|:-:|\n| 1 | **2** |\n| 3 |\n\nx | y\n-|-\n`a` | b \\| c\n\nno | table\n\n| a |\n| b |",
    "html": "a <b>bold</b> <script>alert(1)</script>\n\n<div>block</div>\n\n<!-- comment -->",
    "unicode": "**日本語** *é* „**x**“ 😀 *a*😀 ~~ü~~",
    "tabs": "-\ta\n\n\tcode\n\n1.\tb",
}


class _Tree(HTMLParser):
    """HTML into the form that ``TREE`` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[list[Any]] = [["root"]]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node: list[Any] = [tag, *(value for name, value in attrs if name == "href")]
        self.stack[-1].append(node)
        if tag not in ("br", "hr"):
            self.stack.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("br", "hr"):
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].append(data)


def _reference(text: str) -> list[Any]:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    reader = _Tree()
    reader.feed(parser.render(text))
    return _tidy(reader.stack[0][1:])


def _tidy(nodes: list[Any], code: bool = False) -> list[Any]:
    """Texts joined; white space between blocks, and at their ends, dropped; addresses without an end /."""
    joined: list[Any] = []
    for node in nodes:
        if isinstance(node, list):
            start = 2 if node[0] == "a" else 1
            head = [node[0], *(address.rstrip("/") for address in node[1:start])]
            head[0] = "s" if head[0] == "del" else head[0]
            joined.append([*head, *_tidy(node[start:], code or node[0] in ("pre", "code"))])
        elif joined and isinstance(joined[-1], str):
            joined[-1] += node
        else:
            joined.append(node)
    if code:
        return [node.rstrip("\n") if isinstance(node, str) else node for node in joined]
    kept = [node.strip("\n") if isinstance(node, str) else node for node in joined]
    return [node for node in kept if node != "" and not (isinstance(node, str) and not node.strip() and len(kept) > 1)]


def test_it_reads_markdown_as_commonmark_says(open_page: Open) -> None:
    tab = open_page()
    found = tab.page.evaluate(TREE, list(SAMPLES.values()))
    wrong = {}
    for (name, text), tree in zip(SAMPLES.items(), found, strict=True):
        if (ours := _tidy(tree)) != (theirs := _reference(text)):
            wrong[name] = (ours, theirs)
    assert not wrong, "\n".join(f"{name}:\n  {ours}\n  {theirs}" for name, (ours, theirs) in wrong.items())


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        # What models write and CommonMark does not say.
        ("1. a\n  - b\n2. c", [["ol", ["li", "a", ["ul", ["li", "b"]]], ["li", "c"]]]),  # indented by two
        ("- [ ] a\n- [x] b", [["ul", ["li", ["span", "☐ "], "a"], ["li", ["span", "☑ "], "b"]]]),
        ("see https://x.org/a_b.", [["p", "see ", ["a", "https://x.org/a_b", "https://x.org/a_b"], "."]]),
        ("(www.x.org)", [["p", "(", ["a", "https://www.x.org/", "www.x.org"], ")"]]),
        ("mail@x.org/https", [["p", "mail@x.org/https"]]),
        ("![cat](https://x.org/c.png)", [["p", ["a", "https://x.org/c.png", "Image: ", "cat"]]]),
        ("[m](mailto:a@x.org)", [["p", ["a", "mailto:a@x.org", "m"]]]),
        # Addresses that lead nowhere are shown, not followed.
        ("[a](javascript:alert(1))", [["p", "a (javascript:alert(1))"]]),
        ("[a]()", [["p", "a ()"]]),
        ("[a](/relative)", [["p", "a (/relative)"]]),
        ("[a](https://bank.org@evil.org/)", [["p", "a (https://bank.org@evil.org/)"]]),
        ("![a](data:image/png;base64,AA)", [["p", "a (data:image/png;base64,AA)"]]),
    ],
)
def test_what_models_write(open_page: Open, text: str, tree: list[Any]) -> None:
    (found,) = open_page().page.evaluate(TREE, [text])

    def joined(nodes: list[Any]) -> list[Any]:
        result: list[Any] = []
        for node in nodes:
            node = [node[0], *joined(node[1:])] if isinstance(node, list) else node
            if isinstance(node, str) and len(result) > 1 and isinstance(result[-1], str) and node[0] == " ":
                result[-1] += node
            else:
                result.append(node)
        return result

    assert [joined(node) for node in found] == [joined(node) for node in tree]


def test_a_growing_text_is_the_whole_text_at_every_piece(open_page: Open) -> None:
    tab = open_page()
    chance = random.Random(5)
    names = list(SAMPLES)
    texts = [*SAMPLES.values()]
    for _ in range(12):
        texts.append("\n\n".join(SAMPLES[name] for name in chance.sample(names, 5)))
    # A number alone may still become a list's next item.
    texts.append("1. a\n\n2. b\n\n2\n\n- c\n\n-\n\n+ d\n\n  e\r\n\r\nf\r\n")
    for text in texts:
        step = 1 if len(text) < 300 else 7
        same, wrong = tab.page.evaluate(GROW, [text, list(range(1, len(text), step))])
        assert same, text
        assert not wrong, (text, wrong)


HOSTILE = {
    "stars": "*" * 60_000,
    "stars and letters": "*a " * 30_000,
    "pairs": "**a" * 20_000,
    "closers": "a* " * 30_000,
    "mixed": "*_" * 30_000,
    "brackets": "[" * 60_000,
    "images": "![" * 30_000 + "[a](https://x.org)" * 500,
    "labels": "[a](" * 15_000,
    "links": "[a](https://x.org" + "(" * 50_000,
    "spaces in a link": "[a](x" + " " * 60_000,
    "backticks": "".join("`" * n + "a" for n in range(1, 400)),
    "ticks": "`a" * 30_000,
    "angles": "<a:" * 20_000,
    "ampersands": "&a" * 30_000,
    "addresses": "https://x" * 8_000,
    "quotes": ">" * 60_000,
    "nested quotes": "\n".join(">" * n for n in range(1, 250)),
    "lists": "- " * 30_000,
    "nested lists": "\n".join(" " * 2 * n + "- a" for n in range(400)),
    "heading": "# " + " " * 60_000 + "#" * 1000 + "x",
    "hashes": "# a" + " #" * 30_000 + "x",
    "fence": "```" + "a" * 60_000 + "`",
    "delimiter": "a|b\n-" + " " * 60_000 + "x",
    "table": "|" * 60_000 + "\n" + "|-" * 30_000,
    "pipes": "a|b\n-|-\n" + "`|" * 30_000,
    "rows": "a|b\n-|-\n" + "|\n" * 8_000,
    "blank lines": "a\n" + "\n" * 60_000 + "b",
    "tabs": "\t" * 60_000 + "a",
    "one word": "a" * 300_000,
    "code": "```python\n" + '"' * 49_000,
    "comments": "```c\n" + "/*" * 24_000,
    "tags": "```html\n" + "<a" * 24_000,
    "numbers": "```rust\n" + "1e" * 24_000,
}


@pytest.mark.slow
def test_no_text_keeps_the_page_waiting(open_page: Open) -> None:
    """Each takes milliseconds. What is not linear takes minutes at these lengths."""
    tab = open_page()
    times = tab.page.evaluate(
        """async (texts) => {
          const { renderMarkdown } = await import("/page/render.js");
          return texts.map((text) => {
            const begin = performance.now();
            renderMarkdown(text);
            return performance.now() - begin;
          });
        }""",
        list(HOSTILE.values()),
    )
    slow = {name: round(ms) for name, ms in zip(HOSTILE, times, strict=True) if ms > 2500}
    assert not slow


CODE = {
    "python": 'def f(x: int) -> str:\n    """Doc."""\n    return f"{x:>3}" + \'a\\\'b\'  # comment\n',
    "js": "const a = `x ${1}`; // c\nclass B extends A { f() { return /* d */ 0x1F; } }",
    "json": '{"a": [1, -2.5e3, true, null], "b\\"c": "d"}',
    "bash": 'for f in *.txt; do echo "$f" # c\ndone; a=$#',
    "c++": "#include <a>\nint main() { return \"a\"[0] + '\\n'; }",
    "rust": "fn main<'a>(x: &'a str) -> char { '\\n' }",
    "sql": "SELECT a FROM b WHERE c = 'd''e' -- f",
    "html": '<!-- c --><a href="x">y</a><br/>',
    "css": ".a:hover { color: #fff; /* c */ }",
    "yaml": "a: 'b' # c\nd: true\n",
    "toml": "[a]\nb = 1_000\n",
    "diff": "--- a\n+++ b\n@@ 1 @@\n-c\n+d\n e",
    "go": "func f(x int) map[string]int { return nil }",
    "java": 'public final class A { @Override String a() { return ""; } }',
    "nosuch": "a b c",
    "__proto__": "a",
    "constructor": "b",
    "": "c",
}


def test_colours_change_no_character(open_page: Open) -> None:
    tab = open_page()
    found = tab.page.evaluate(
        """async (code) => {
          const { highlight } = await import("/page/highlight.js");
          return code.map(([language, text]) => {
            const element = document.createElement("code");
            element.append(...highlight(text, language));
            const kinds = [...element.querySelectorAll("span")].map((one) => [one.className, one.textContent]);
            return [element.textContent, kinds];
          });
        }""",
        list(CODE.items()),
    )
    for (language, code), (text, kinds) in zip(CODE.items(), found, strict=True):
        assert text == code, language
        assert bool(kinds) == (language not in ("nosuch", "__proto__", "constructor", "")), language
    python = found[0][1]
    assert ["t-keyword", "def"] in python
    assert ["t-call", "f"] in python
    assert ["t-string", '"""Doc."""'] in python
    assert ["t-comment", "# comment"] in python
